"""What the report of a job says of its images' fingerprints, and which images it shows."""

import json
import re
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client
from PIL import Image, ImageFilter

from dask_imgread import fingerprint, run_job, write_report
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.jobs.parts import Footer, PartName, Place, ShardRun
from dask_imgread.report import fingerprints as section
from dask_imgread.report.fingerprints import survey_fingerprints
from dask_imgread.report.parts import find_parts
from dask_imgread.report.statistics import Histogram
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.browser import CHROMIUM, NARROW, WIDE, probe
from tests.helpers.images import encode
from tests.helpers.pages import Page

READER = fingerprint.reader.with_options(device="cpu", verbose=False)
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def client():
    with Client(n_workers=1, processes=False, dashboard_address=":0") as client:
        yield client


def run(folder, client, members, function=fingerprint, **options):
    """Run a job on shards of members, one shard for each list."""
    shards = [write_shard(folder / f"{n}" / "shard.tar", some) for n, some in enumerate(members)]
    out = str(folder / "out")
    run_job(shards, out, function, reader=READER, client=client, **options)
    return out


def survey(out, **options):
    folder = JobFolder(out, options)
    return survey_fingerprints(folder, find_parts(folder, folder.read_job()))


def list_names(rows):
    return [row.image_id.partition("/")[2] for row in rows]


def cut_off(photo):
    pixels = np.array(photo)
    pixels[len(pixels) // 2 :] = 128
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def planted_out(tmp_path_factory, client, photographs):
    """A job on photographs, of which some copies are of no use."""
    photos = [photo.resize((180, 120)) for photo in photographs]
    members = [(f"photo{n}.png", encode(photo, "PNG")) for n, photo in enumerate(photos)]
    members += [
        ("dark.png", encode(photos[4].point(lambda level: level // 12), "PNG")),
        ("blurred.png", encode(photos[6].filter(ImageFilter.GaussianBlur(30)), "PNG")),
        ("black.png", encode(Image.new("RGB", (60, 40)), "PNG")),
        ("white.png", encode(Image.new("RGB", (60, 40), "white"), "PNG")),
        ("grey.png", encode(photos[1].convert("L"), "PNG")),
        ("cut.png", encode(cut_off(photos[2]), "PNG")),
        (f"{HOSTILE}.png", encode(photos[5], "PNG")),
        ("again.jpg", encode(photos[5].resize((120, 80)), "JPEG", quality=60)),
        ("broken.jpg", b"no picture"),
    ]
    folder = tmp_path_factory.mktemp("planted")
    return run(folder, client, [members[::2], members[1::2]], images_per_partition=3)


def test_what_the_page_says(planted_out):
    page = Page(Path(write_report(planted_out, samples=0)).read_text("utf-8"))
    for words in (
        "Blank 2 13.33% · of one colour", "Grey 3 20.00% · without colours",
        "Flat tail 1 6.67% · the lower part is of one colour",
        "Brightness (0 to 255) 0 to 255, median about ", "Entropy 0 bits to 7.",
        "Sharpness (without blank images) ",
        "The most blurred 12 of 13, the lowest sharpness first, without blank images blurred.png",
        "The darkest 12 of 15, the lowest brightness first black.png", "brightness 0 dark.png",
        "Flat tails 1 of 1, drawn at random cut.png", " 180 \u00d7 120 · png Equal files",
        "Equal files: 2 in 1 group They have the same SHA-256. 2 images 2 of 2 ",
        "differ in 4 bits or fewer; blank images are not compared. 3 images 3 of 3 ",
    ):  # fmt: skip
        assert words in page.text
    assert f"{HOSTILE}.png" in page.members
    assert not any("onerror" in found for _, found in page.tags)
    assert page.count("img") == page.count("figure") - 1  # all but that of the broken one


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("size", "is_dark"), [(WIDE, False), (NARROW, True)])
def test_a_browser_shows_it(planted_out, tmp_path, size, is_dark):
    found = probe(write_report(planted_out), tmp_path, size, is_dark)
    for words in ("Brightness (0 to 255)0 to ", "The most blurred12 of 13", "Similar images: "):
        assert words in found["text"]
    assert found["width"] == size[0]
    assert found["plots"] == 10  # all pictures are 3:2
    assert found["unlabelled"] == found["overprints"] == found["beyond"] == found["lost"] == 0
    assert found["contrast"] > 4.5
    assert found["enlarged"]
    assert found["selected"].startswith("dask-imgread fingerprint")


def test_which_images_are_shown(planted_out):
    found = survey(planted_out)
    assert (found.images, found.flags["grey"]) == (15, 3)
    rows = pq.read_table(planted_out).to_pandas().sort_values("sharpness")
    lowest = found.pictured["sharpness"]
    assert list_names(lowest.rows)[0] == "blurred.png"
    assert lowest.numbers == rows["sharpness"][~rows["blank"]].tolist()[:12]
    assert list_names(found.pictured["brightness"].rows)[:2] == ["black.png", "dark.png"]
    assert list_names(found.pictured["flat_tail"].rows) == ["cut.png"]
    assert found.histograms["sharpness"].counts.sum() == 13
    for name in ("brightness", "contrast", "entropy", "colourfulness"):
        histogram = found.histograms[name]
        assert histogram.counts.sum() == 15
        assert (histogram.low, histogram.high) == (rows[name].min(), rows[name].max())
        assert abs(histogram.median() - rows[name].median()) < histogram.limit / 512
    (equal,) = found.duplicates["sha256"].biggest
    assert sorted(list_names(equal.rows)) == [f"{HOSTILE}.png", "photo5.png"]
    near = next(group for group in found.duplicates["phash"].biggest if group.size == 3)
    assert {*list_names(near.rows)} == {f"{HOSTILE}.png", "photo5.png", "again.jpg"}
    assert near.bits[0] == 0 <= max(near.bits) <= 4


def test_the_biggest_groups_of_many(tmp_path, client):
    pictures = [encode_picture(draw_picture(n, (48, 36))) for n in range(9)]
    members = [
        (f"{n}-{copy}.jpg", picture) for n, picture in enumerate(pictures) for copy in range(n + 1)
    ]
    out = run(tmp_path, client, [members[::2], members[1::2]], images_per_partition=7)
    found = survey(out).duplicates["sha256"]
    assert (found.groups, found.images) == (8, 44)
    assert [group.size for group in found.biggest] == [9, 8, 7, 6, 5, 4]
    assert [len(group.rows) for group in found.biggest] == [6, 6, 6, 6, 5, 4]
    assert [{name[0] for name in list_names(group.rows)} for group in found.biggest] == [
        {str(n)} for n in range(8, 2, -1)
    ]
    page = Page(Path(write_report(out, samples=0)).read_text("utf-8"))
    assert "Equal files: 44 in 8 groups, the biggest 6 " in page.text
    assert "9 images 6 of 9 " in page.text


def test_no_duplicates_and_only_blank_images(tmp_path, client):
    blank = [(f"{n}.png", encode(Image.new("RGB", (9, 9), (n, n, n)), "PNG")) for n in range(3)]
    out = run(tmp_path, client, [blank])
    page = Page(Path(write_report(out)).read_text("utf-8"))
    assert "Blank 3 100.00%" in page.text
    assert "None: no two have the same SHA-256." in page.text
    assert "None: no two have hashes that differ in 4 bits or fewer; blank " in page.text
    assert "Sharpness" not in page.text
    assert "The most blurred" not in page.text


def test_duplicates_are_not_looked_for_among_too_many(planted_out, monkeypatch):
    monkeypatch.setattr(section, "MOST_ROWS", 14)
    page = Page(Path(write_report(planted_out)).read_text("utf-8"))
    assert page.text.count("Not looked for among more than 14 images: ") == 2


def test_ids_that_are_ambiguous(tmp_path, client):
    """As they are if a job's rows have ids of the user's."""
    picture = encode_picture(draw_picture(1))
    out = run(tmp_path, client, [[("a.jpg", picture)], [("b.jpg", picture)]])
    for part in Path(out).glob("*.parquet"):
        rows = pq.read_table(part)
        place = rows.schema.get_field_index("image_id")
        rows = rows.set_column(place, "image_id", pa.array(["<b>same</b>"] * len(rows)))
        pq.write_table(rows, part)
    page = Page(Path(write_report(out)).read_text("utf-8"))
    assert "<b>same</b> is the image_id of several duplicates" in page.text


def test_parts_that_wait_to_be_merged(planted_out, tmp_path):
    """Their rows are in the section; duplicates are looked for once some are in the dataset."""
    rows = pq.read_table(sorted(Path(planted_out).glob("*.parquet"))[0])
    job = {"format": 4, "id": "0", "command": "apply", "partitions": 2, "shards": 1}
    job |= {"version": "9.9", "finished": False}
    (tmp_path / "_job.json").write_text(json.dumps(job))
    counts = len(rows), len(rows), len(rows), 0, 0
    footer = Footer("0", (ShardRun(0, 0, *counts),), 0, 1.77e9, 1.77e9 + 1, "worker")
    JobFolder(str(tmp_path)).write_part(PartName(Place.STAGED, 0), rows, rows, footer)
    found = survey(str(tmp_path))
    assert found.images == len(rows) > 0
    assert found.duplicates == {}


def test_any_file_system(planted_out):
    files = fsspec.filesystem("memory")
    files.put(planted_out, "/planted", recursive=True)
    page = write_report("memory://planted", out_options={"skip_instance_cache": True})
    text = Page(files.cat_file(page).decode()).text
    assert "Equal files: 2 in 1 group" in text
    files.rm("/planted", recursive=True)


def drop_hashes(batch):
    return fingerprint(batch).drop(columns=["phash"])


def write_texts(batch):
    return fingerprint(batch).astype({"brightness": "string[pyarrow]"})


def add_column(batch):
    return fingerprint(batch).assign(name="fine")


@pytest.mark.parametrize(
    ("function", "has_section"),
    [(drop_hashes, False), (write_texts, False), (add_column, True)],
)
def test_the_columns_decide(tmp_path, client, function, has_section):
    members = [[(f"{n}.jpg", encode_picture(draw_picture(n))) for n in range(2)]]
    out = run(tmp_path, client, members, function)
    page = Page(Path(write_report(out)).read_text("utf-8"))
    assert ("The darkest 2 of 2" in page.text) == has_section
    assert bool(re.search("Fingerprints|Equal files|Brightness", page.text)) == has_section


def test_a_histogram_with_a_linear_axis():
    histogram = Histogram(256)
    histogram.add(np.array([0.0, 100.1, 100.2, 300.0]))
    edges, counts = histogram.bins()
    assert (edges[0], edges[-1]) == (0, 256)
    assert len(counts) <= 48
    assert counts.sum() == 4
    assert counts[-1] == 1
    assert 100 < histogram.median() < 100.5
    narrow = Histogram(1)
    narrow.add(np.array([0.5]))
    edges, counts = narrow.bins()
    assert edges[0] == 0
    assert counts.tolist() == [0] * (len(counts) - 1) + [1]
    zero = Histogram(8)
    zero.add(np.zeros(3))
    edges, counts = zero.bins()
    assert (zero.low, zero.median(), zero.high) == (0, 0, 0)
    assert edges[-1] > 0.5
    assert counts.tolist() == [3] + [0] * (len(counts) - 1)
