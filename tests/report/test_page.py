"""The report of a batch job: what it says, what it shows, and that a browser can show it."""

import json
import os
import shlex
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from dask_imgread import ImageReaderStage, partition_shards
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.jobs.parts import Footer, PartName, Place, ShardRun
from dask_imgread.report import pictures
from dask_imgread.report.page import write_report
from dask_imgread.shards.samples import make_shard_id
from dask_imgread.tasks import make_frame
from dask_imgread.testing import draw_picture, encode_picture, make_shards, write_shard
from tests.helpers.browser import CHROMIUM, NARROW, WIDE, draw, probe
from tests.helpers.pages import Page

JPEG = encode_picture(draw_picture(1, (64, 48)))
HOSTILE = "</script><script>document.title='taken'</script>"


def write_job(folder, paths, command="metadata", unfinished=0, **partitioning):
    """Read shards and write them as a job does, but for the last ``unfinished`` partitions."""
    tasks = partition_shards(paths, **partitioning)
    out = Path(folder) / "out"
    out.mkdir(parents=True)
    job = {
        "format": 4,
        "id": "0",
        "command": command,
        "partitions": len(tasks),
        "shards": len(paths),
        "version": "9.9",
        "finished": not unfinished,
    }
    (out / "_job.json").write_text(json.dumps(job))
    for number, task in enumerate(tasks[: len(tasks) - unfinished]):
        batches = ImageReaderStage(device="cpu").process(task)
        rows = make_frame([image for batch in batches for image in [*batch.data, *batch.failed]])
        failed = int(rows["error"].notna().sum())
        run = ShardRun(0, 0, len(rows), len(rows), len(rows) - failed, failed, 0)
        began = 1.77e9 + number
        footer = Footer("0", (run,), number, began, began + 2, f"worker-{number % 2}")
        table = pa.Table.from_pandas(rows)
        made = (pa.table({"brightness": [0.5]}), table) if command == "apply" else (table, None)
        JobFolder(str(out)).write_part(PartName(Place.OUT, number), *made, footer)
    return str(out)


def read_report(out, **options):
    return Page(Path(write_report(str(out), **options)).read_text("utf-8"))


@pytest.fixture(scope="module")
def hostile_out(tmp_path_factory):
    """A job whose shards and members, read and broken, have names that try to be HTML.

    Its folder's name has blanks, which HTML does not keep.
    """
    folder = tmp_path_factory.mktemp("hostile")
    names = ["a.jpg", f"{HOSTILE}1.jpg", f"{HOSTILE}2.jpg", "<img src=x onerror=alert(1)>.jpg"]
    members = zip(names, [JPEG, JPEG[:-300], JPEG, b"<script>"], strict=True)
    hostile = write_shard(folder / "<img src=x onerror=alert(1)>$$x$$.tar", list(members))
    return write_job(
        folder / "a  b\tc\n d", [hostile, *make_shards(folder, images_per_shard=40, broken=7)]
    )


def test_the_numbers(tmp_path):
    paths = make_shards(tmp_path, shards=3, images_per_shard=8, extensions=("jpg", "png"), broken=2)
    out = write_job(tmp_path, paths, images_per_partition=4)
    assert write_report(out) == f"{out}/_report.html"
    page = read_report(out, samples=5)
    for words in (
        "done metadata", "dask-imgread 9.9", "Images read 22 of 24", "Failed 2 8.33%",
        "Shards 3 2 with failures", "Partitions 6 of 6", "Pixels 270 kpx 12.3 kpx an image",
        "Time 0:00:07 from 2026-02-02 02:40:00 UTC", "Images per second 3.43 workers: 2",
        "By cause 1 cause truncated 2 (100.0%)",
        "3 shards, 2 with failures shard images failed failure rate",
        "Examples 2 of 2", "truncated: ",
        " kB, median about ", "Width all 128 px",
        "Aspect ratio (width / height) all 1.33",
        "Area all 0.0123 MP", "Format 2 formats", "128 \u00d7 96 \u00b7 png",
    ):  # fmt: skip
        assert words in page.text
    assert page.count("figure") == 5 + 2 * 3
    assert page.count("img") == 5 + 2 * 2


def test_it_needs_nothing_from_elsewhere(hostile_out):
    page = read_report(hostile_out)
    links = [found[name] for _, found in page.tags for name in ("src", "href") if name in found]
    assert links
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert page.count("link") == 0
    assert "default-src 'none'" in str(page.tags)
    assert os.path.getsize(f"{hostile_out}/_report.html") < 1_000_000
    assert {name for name in os.listdir(hostile_out) if name.startswith("_")} == {
        "_job.json",
        "_report.html",
    }


def test_names_are_text(hostile_out, tmp_path):
    page = read_report(hostile_out)
    harmless = read_report(write_job(tmp_path, make_shards(tmp_path, broken=1)))
    assert page.count("script") == harmless.count("script")
    assert not any("onerror" in found for _, found in page.tags)
    assert f"{HOSTILE}1.jpg" in page.text
    assert f"{HOSTILE}2.jpg" in page.members
    assert "<img src=x onerror=alert(1)>.jpg" in page.text


def test_a_failure_stands_between_its_neighbours(tmp_path):
    """Though each image is in a part of its own, and the shards have equal names in them."""
    members = [(f"{name}.jpg", JPEG) for name in "abcd"]
    members[2] = ("c.jpg", JPEG[:-200])
    paths = [write_shard(tmp_path / "0.tar", members), write_shard(tmp_path / "1.tar", members[2:])]
    page = read_report(write_job(tmp_path, paths, images_per_partition=1), samples=0)
    assert sorted([page.members[:3], page.members[3:]]) == [
        ["b.jpg", "c.jpg", "d.jpg"],
        ["c.jpg", "d.jpg"],
    ]
    assert "none before it truncated" in page.text
    assert page.kinds.count("trio") == 2


def test_the_failures_that_are_shown_differ(tmp_path):
    broken = [JPEG[:-200]] * 20 + [b"", b"text"]
    members = [(f"{n:02}.jpg", content) for n, content in enumerate(broken)]
    paths = [write_shard(tmp_path / f"{n}.tar", members) for n in range(3)]
    paths.append(str(tmp_path / "lost.tar"))
    Path(paths[-1]).write_bytes(b"no tar at all")
    page = read_report(write_job(tmp_path, paths))
    assert "Failed 67 100.00%" in page.text
    assert "By cause 4 causes" in page.text
    shown = set(page.members)
    assert len(page.members) == 6
    assert {"20.jpg", "21.jpg"} < shown
    assert "unreadable shard: not a tar archive" in page.text
    assert "Sizes and formats" not in page.text


def test_records_of_apply_are_in_a_folder_of_their_own(tmp_path):
    paths = make_shards(tmp_path, images_per_shard=3)
    page = read_report(write_job(tmp_path, paths, "apply"))
    assert "Images read 6 of 6" in page.text
    assert "None: every image could be read." in page.text
    assert page.count("img") == 6


def test_what_changed(tmp_path):
    before = [("a.jpg", JPEG), ("b.jpg", JPEG), ("c.jpg", JPEG), ("d.jpg", b"text")]
    new = encode_picture(draw_picture(2, (32, 24)))
    after = [("a.jpg", JPEG), ("b.jpg", new), ("d.jpg", JPEG), (f"{HOSTILE}.jpg", JPEG)]
    old = write_job(tmp_path / "<old>", [write_shard(tmp_path / "s.tar", before)])
    shard, lost = write_shard(tmp_path / "s.tar", after), write_shard(tmp_path / "t.tar", before)
    out = write_job(tmp_path / "new", [shard, lost], unfinished=1)
    page = read_report(out, since=old, samples=0)
    for words in (
        f"Since {old}: 4 images then, 4 now", "Added 1 of 1", "Gone, or not read yet 1 of 1",
        f"Changed 1 of 1 image_id {make_shard_id(shard)}/b.jpg size {len(JPEG)} to {len(new)}",
        ", width 64 to 32", "Newly readable 1 of 1", "before: not an image: ",
        "Added, changed, newly readable: 3 of 3",
    ):  # fmt: skip
        assert words in page.text
    assert page.members[:3] == [f"{HOSTILE}.jpg", "b.jpg", "d.jpg"]
    page = read_report(out, since=Path(out), samples=1)
    assert "No image differs." in page.text
    with pytest.raises(ValueError, match="expected, or a job's folder, not"):
        write_report(out, since=str(tmp_path))
    with pytest.raises(ValueError, match="a frame of images needs the columns"):
        write_report(write_job(tmp_path / "apply", [shard], "apply"), since=old)


def test_an_unfinished_job(tmp_path):
    paths = make_shards(tmp_path, shards=3)
    page = read_report(write_job(tmp_path, paths, unfinished=1))
    assert "unfinished: 2 of 3 partitions done" in page.text
    assert f"Go on dask-imgread metadata SHARDS --out {tmp_path}/out" in page.text
    assert "Images read 16 of 16" in page.text


@pytest.mark.parametrize("command", ["metadata", "apply"])
def test_no_images(tmp_path, command):
    shard = write_shard(tmp_path / "s.tar", [("a.txt", b"no picture")])
    page = read_report(write_job(tmp_path / "read", [shard], command))
    assert "Images None: no part has a row." in page.text
    assert "Images read 0 of 0" in page.text
    begun = write_job(tmp_path / "begun", [shard], command, unfinished=1)
    assert "unfinished: 0 of 1 partitions done" in read_report(begun).text


def test_one_image(tmp_path):
    shard = write_shard(tmp_path / "s.tar", [("a.jpg", JPEG)])
    page = read_report(write_job(tmp_path, [shard]))
    assert "Images read 1 of 1" in page.text
    assert page.members == ["a.jpg"]


def test_a_shard_that_is_gone_leaves_grey_tiles(tmp_path, monkeypatch):
    paths = make_shards(tmp_path, images_per_shard=3)
    out = write_job(tmp_path, paths)
    os.remove(paths[1])
    page = read_report(out)
    assert page.count("img") == page.kinds.count("gone") == 3
    assert "No such file" in page.text
    monkeypatch.setattr(pictures, "_MAX_PIXELS", 10_000)
    assert "too large: 128 x 96 pixels" in read_report(out).text


def test_any_file_system(tmp_path):
    out = write_job(tmp_path, make_shards(tmp_path, broken=3))
    files = fsspec.filesystem("memory")
    files.put(out, "/job", recursive=True)
    page = write_report("memory://job", samples=2, out_options={"skip_instance_cache": True})
    assert page == "memory://job/_report.html"
    assert write_report(out, "memory://copy.html", samples=2) == "memory://copy.html"
    for name in ("/job/_report.html", "/copy.html"):
        assert "Images read 13 of 16" in Page(files.cat_file(name).decode()).text
    files.rm("/job", recursive=True)


def test_what_is_no_job(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no batch job in {tmp_path}: no _job.json"):
        write_report(str(tmp_path))
    with pytest.raises(ValueError, match="samples must be at least 0, not -1"):
        write_report(str(tmp_path), samples=-1)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("size", "is_dark"), [(WIDE, False), (NARROW, True)])
def test_a_browser_shows_it(hostile_out, tmp_path, size, is_dark):
    found = probe(write_report(hostile_out), tmp_path, size, is_dark)
    assert (found["width"], found["beyond"]) == (size[0], 0)
    assert found["title"] == "out"  # which a member's name would set
    assert found["plots"] == 5  # all pictures are 4:3
    assert found["unlabelled"] == found["overprints"] == found["lost"] == 0
    assert found["contrast"] > 4.5
    assert found["enlarged"]
    assert found["closed"]
    ascending, descending, by_name = found["sorted"]
    assert ascending == descending[::-1] == sorted(ascending, key=lambda rate: float(rate[:-1]))
    assert by_name == sorted(by_name)
    program, command, *words = shlex.split(found["selected"])
    assert (program, command) == ("dask-imgread", "metadata")
    assert words[-3:] == ["--out", hostile_out, "--retry-failed"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_it(hostile_out, tmp_path):
    colours = draw(write_report(hostile_out), tmp_path, (1280, 4000))
    for bar in ("4a86e8", "e0566a"):
        assert colours.get(tuple(bytes.fromhex(bar)), 0) > 5_000
    assert len(colours) > 5000
