"""How long a job has read, by its parts and by its runs."""

import numpy as np

from dask_imgread.report.times import close_gaps, find_reading

# Images, began, ended and place of each part: one overlaps others, one is of a run a day later.
SPANS = [(10, 0.0, 4.0, 0), (10, 1.0, 2.0, 1), (10, 3.0, 6.0, 2), (10, 86400.0, 86402.0, 3)]
TIMES = np.array(SPANS[::-1]).T
FIRST = {"began": -2.0, "ended": 7.0, "new_images": 29, "new_failed": 1, "images_per_second": 4.0}
SECOND = {"began": 86399, "ended": 86403, "new_images": 10, "new_failed": 0, "images_per_second": 5}


def measure(runs=(), staged=(), merged=()):
    is_staged = np.isin(range(4), staged)
    times = np.vstack([TIMES, np.isin(TIMES[3], merged)])
    found = find_reading({"runs": runs}, times, is_staged)
    return found.images, found.seconds


def test_the_rate_is_that_of_the_time_in_which_parts_were_read():
    assert measure() == measure([FIRST, SECOND]) == (40, 8.0)
    assert measure([{"began": -2.0}, SECOND]) == (40, 8.0)  # the first was killed


def test_pauses_are_left_out():
    images, began, ended, moved = close_gaps(TIMES[:3])
    assert images.tolist() == [10, 10, 10, 10]
    assert began.tolist() == [0, 1, 3, 6]
    assert ended.tolist() == [4, 2, 6, 8]
    assert (began + moved).tolist() == [0, 1, 3, 86400]


def test_parts_that_were_merged_have_the_times_of_the_merge():
    assert measure([FIRST, SECOND], merged=[1])[1] == 30 / 4 + 2.0


def test_parts_that_wait_to_be_merged_are_as_they_were_read():
    assert measure([FIRST, SECOND], merged=range(4)) == (40, 30 / 4 + 10 / 5)
    assert measure([FIRST, {"began": 86399}], staged=[3], merged=range(3)) == (40, 30 / 4 + 2.0)
    nothing = SECOND | {"new_images": 0, "images_per_second": 0.0}
    assert measure([FIRST, nothing], merged=range(4)) == (30, 30 / 4)
    assert measure([{"began": 0}], merged=range(4)) == (0, 0)
