"""What the report of a job says of its runs, also while the last one has not ended."""

import os
import re
from contextlib import suppress
from math import inf
from pathlib import Path

import pytest
from distributed import Client

from dask_imgread import ImageReaderStage, run_job, write_report
from dask_imgread.jobs.execution import Execution
from dask_imgread.report import page
from dask_imgread.report.runs import find_news, list_working, render_runs
from dask_imgread.testing import make_shards
from tests.helpers.pages import Page

ENDED = {
    "began": 1.77e9,
    "ended": 1.77e9 + 61.5,
    "new_shards": 1,
    "changed_shards": 0,
    "gone_shards": 0,
    "new_images": 1234,
    "new_failed": 5,
    "new_partitions": 3,
    "images_per_second": 20.6,
    "memory": 1_500_000_000,
    "images": 1234,
    "failed": 5,
}
IDLE = ENDED | {"new_images": 0, "new_failed": 0, "new_partitions": 0, "images_per_second": 0.0}
KILLED = {name: ENDED[name] for name in ("began", "new_shards", "changed_shards", "gone_shards")}


class Killed(BaseException):
    """No error of a job."""


@pytest.fixture(scope="module")
def client():
    with Client(n_workers=1, processes=False, dashboard_address=":0") as client:
        yield client


def measure(batch):
    return {"mean": [image.image_data.mean() for image in batch.data]}


class Job:
    """A set of shards that grows, and the job that follows it."""

    def __init__(self, folder, client, **options):
        reader = ImageReaderStage(device="cpu", verbose=False)
        self.shards, self.out = str(folder / "shards"), str(folder / "out")
        self.options = {"client": client, "reader": reader, "update": True, **options}

    def add(self, day, **options):
        """Add shards ``<day>_0.tar`` and so on, in place of those that have the names."""
        for number, path in enumerate(make_shards(f"{self.shards}/new", **options)):
            os.replace(path, f"{self.shards}/{day}_{number}.tar")

    def run(self, killed_at=None):
        """Run it, or stop it where it begins to do something, with nothing that cleans up."""

        def stop(*args, **kwargs):
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            if killed_at:
                patch.setattr(Execution, killed_at, stop)
            with suppress(Killed):
                run_job(f"{self.shards}/*.tar", self.out, **self.options)

    def read_report(self):
        """Return the page, the cells of the runs' table and the shards of the newest images."""
        html = Path(write_report(self.out)).read_text("utf-8")
        return Page(html), list_cells(html), list_newest(html)


def list_cells(html):
    """Return the cells of each row, but for when the run began."""
    rows = re.search('<table class="runs">(.*?)</table>', html)[1].split("</tr><tr>")[1:]
    return [re.findall("<td>(.*?)</td>", row)[1:] for row in rows]


def list_newest(html):
    section = re.search(r"New in the newest run.*?</section>", html)
    return section and re.findall(r'<figure title="(\w+)-', section[0])


@pytest.mark.parametrize("rows_per_file", [None, 12])
def test_a_set_that_grows(tmp_path, client, rows_per_file):
    """Of the runs some are killed, and one has nothing to do."""
    job = Job(tmp_path, client, images_per_partition=4, rows_per_file=rows_per_file)
    job.add("day1", shards=3, broken=1)
    job.run()
    shown, cells, newest = job.read_report()
    assert [row[1:3] + row[4:7] for row in cells] == [["23", "1", "3", "0", "0"]]
    assert newest is None
    assert "Images in the dataset" not in shown.text

    job.add("day2", shards=1)
    job.run(killed_at="merge")
    shown, cells, newest = job.read_report()
    staged = "8 of 8 partitions read, 6 of them in the dataset"
    assert f"unfinished: {staged if rows_per_file else 'the last run has not ended'}" in shown.text
    assert "Images read 31 of 32" in shown.text
    assert "Partitions 8 of 8" in shown.text
    assert cells[0] == ["has not ended", "", "", "", "1", "0", "0", ""]
    assert newest == ["day2_0"] * 6
    assert "it has not ended; 6 drawn at random from what it wrote" in shown.text

    job.run(killed_at="finish")  # parts lie in the dataset, and where they waited
    shown, cells, _ = job.read_report()
    assert "unfinished: the last run has not ended" in shown.text
    assert "Images read 31 of 32" in shown.text
    assert "Partitions 8 of 8" in shown.text

    job.run()
    job.run()
    job.add("day3", shards=1)
    job.run()
    shown, cells, newest = job.read_report()
    assert "done metadata" in shown.text
    assert "Images read 39 of 40" in shown.text
    assert "Partitions 10 of 10" in shown.text
    assert "What each did 1 other had nothing to do" in shown.text
    assert "did not end" in [row[0] for row in cells]
    assert cells[0][1:3] + cells[0][4:7] == ["8", "0", "1", "0", "0"]
    assert newest == ["day3_0"] * 6
    assert "8 images read, 0 failed; 6 drawn at random from what it wrote" in shown.text
    assert "Images in the dataset after each run" in shown.text
    assert f"in {len(cells)} runs" in shown.text
    assert ("Throughput" in shown.text) == (rows_per_file is None)


def test_shards_that_have_changed(tmp_path, client):
    """Their rows are merged with earlier ones, which are not new, though they are written anew."""
    job = Job(tmp_path, client, files_per_partition=2)
    job.add("day1", shards=2)
    job.run()
    os.remove(f"{job.shards}/day1_1.tar")
    job.add("day1", shards=1, images_per_shard=7, seed=1)
    job.run()
    shown, cells, newest = job.read_report()
    assert cells[0][1:3] + cells[0][4:7] == ["7", "0", "0", "1", "1"]
    assert newest == ["day1_0"] * 6
    assert "Images read 15 of 15" in shown.text
    assert "Partitions 1 of 1" in shown.text
    assert "Throughput" not in shown.text


def test_what_a_function_makes(tmp_path, client):
    """The report is about the images' records, which wait to be merged beside the rows."""
    job = Job(tmp_path, client, fn=measure, images_per_partition=4, rows_per_file=12)
    job.add("day1", shards=2, broken=1)
    job.run()
    job.add("day2", shards=1)
    job.run(killed_at="merge")
    shown, _, newest = job.read_report()
    assert "6 of 6 partitions read, 4 of them in the dataset" in shown.text
    assert "Images read 23 of 24" in shown.text
    assert newest == ["day2_0"] * 6
    job.run()  # it only merges
    shown, cells, newest = job.read_report()
    assert "done apply" in shown.text
    assert "Images read 23 of 24" in shown.text
    assert cells[0][1:4] == ["0", "0", ""]
    assert newest == []


def test_parts_that_are_removed_meanwhile(tmp_path, client, monkeypatch):
    """Once they were merged; then the page is about the merged ones."""
    job = Job(tmp_path, client, images_per_partition=4, rows_per_file=12)
    job.add("day1", shards=2)
    job.run(killed_at="merge")
    find = page.find_parts

    def find_and_merge(*args):
        found = find(*args)
        monkeypatch.undo()
        job.run()
        return found

    monkeypatch.setattr(page, "find_parts", find_and_merge)
    text = job.read_report()[0].text
    assert "Images read 16 of 16" in text
    assert "Partitions 4 of 4" in text


def test_runs_that_did_something():
    removed = IDLE | {"images": 1200}
    runs = [KILLED, ENDED, IDLE, removed, removed, KILLED, IDLE]
    assert list_working(runs) == [KILLED, ENDED, removed, KILLED, IDLE]
    assert list_working([]) == []


def test_since_when_images_are_new():
    later = {"began": 1.78e9}
    assert find_news([]) == find_news([ENDED]) == find_news([ENDED, IDLE]) == inf
    assert find_news([ENDED, ENDED | later, IDLE]) == 1.78e9
    assert find_news([ENDED, KILLED | later]) == 1.78e9
    assert find_news([ENDED, IDLE | later | {"images": 1200}]) == inf  # it only removed rows


def test_many_runs():
    runs = [ENDED | {"new_failed": number} for number in range(25)]
    html = render_runs([*runs, IDLE, IDLE], [], {})
    assert "the last 20 of 25; 2 others had nothing to do" in html
    cells = list_cells(html)
    assert [row[2] for row in cells] == [f"{number}" for number in range(24, 4, -1)]
    assert cells[0] == ["0:01:02", "1,234", "24", "20.6", "1", "0", "0", "1.5 GB"]
    assert "2026-02-02 02:40:00" in html
    assert render_runs([], [], {}) == ""
