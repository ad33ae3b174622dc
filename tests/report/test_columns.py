"""What the report says of the columns of sidecars and functions, and of captions and warnings."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client
from fsspec.implementations.local import LocalFileSystem

from dask_imgread import ImageReaderStage, run_job, write_report
from dask_imgread.report.columns import Column, Spread, render_columns, survey_columns
from dask_imgread.report.failures import render_shards
from dask_imgread.report.statistics import Lowest, Statistics
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.pages import Page

HOSTILE = "</p><script>alert(1)</script> &"


def make_column(values, kind=None):
    """Return a column of which one thread has read one half, and one the other."""
    array = pa.array(values, kind)
    halves = []
    for some in (array[::1][: len(array) // 2], array[len(array) // 2 :]):
        halves.append(Column("a", array.type))
        halves[-1].add(pa.chunked_array([some], array.type))
    whole, other = halves
    whole.merge(other)
    return whole


def say(column):
    return Page(render_columns([column])).text.partition("values a ")[2]


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        (
            [1.5, 2.5, None, math.nan, 9.5] * 9,
            None,
            "double 18 (40.0%) 3 different a 3 values 1.5 9 (33.3%)",
        ),
        ([1.5, 2.5, None, 9.5], None, "double 1 (25.0%) 1.5 to 9.5, median about 2.5"),
        ([7] * 5, None, "int64 0 all 7"),
        (["x", None, "x"], None, "string 1 (33.3%) all x"),
        (["dog", "cat", "dog", "dog"], None, "string 0 2 different a 2 values dog 3 (75.0%) cat 1"),
        (["dog", "dog", "cat"] * 2, pa.dictionary(pa.int8(), pa.string()), "dictionary<"),
        ([True, False, True], None, "bool 0 2 different a 2 values true 2 (66.7%) false 1 (33.3%)"),
        ([1, 2, 1, 2], None, "int64 0 2 different a 2 values 1 2 (50.0%) 2 2 (50.0%)"),
        ([None, None], pa.int32(), "int32 2 (100.0%) none"),
        ([1.0000001, 1.0000002, 3.0] * 3, None, "double 0 1 to 3, median about 1"),
        ([10_000.1, 10_000.2], None, "double 0 about 10 k"),
        (["x" * 120, "x" * 130], None, f"string 0 all begin with {'x' * 100}"),
        ([math.inf] * 3 + [-math.inf] * 3, None, "double 0 2 different"),
        (["a", "bc", "def"], None, "3 different; characters: 1 to 3, median about 2 Length"),
        ([f"{n:05}" for n in range(3000)], None, "more than 1,000 different; characters: all 5"),
        ([[1, 2], [3]], None, "list<item: int64> not counted"),
    ],
)
def test_what_a_column_holds(values, kind, said):
    column = make_column(values, kind) if "list" not in said else Column("a", pa.list_(pa.int64()))
    assert said in say(column)


def test_plots_of_columns_that_vary():
    assert 'class="plot"' in render_columns([make_column(np.arange(100) / 7)])
    assert 'class="ranking' in render_columns([make_column(["a", "b"] * 3)])
    assert 'class="plot"' not in render_columns([make_column([2.5] * 9)])


@pytest.mark.parametrize("scale", [1e-300, 1e-3, 1.0, 1e18, 1e299])
@pytest.mark.parametrize("offset", [0, 5])
def test_a_spread_of_any_numbers(scale, offset):
    """In any order, and in any number of threads, it is the same."""
    numbers = (np.random.default_rng(1).normal(size=1000) + offset) * scale
    whole, parts = Spread(), [Spread() for _ in range(3)]
    whole.add(numbers)
    for n, part in enumerate(parts):
        part.add(np.sort(numbers)[n::3])
        part.add(np.array([]))
    merged = Spread()
    for part in parts:
        merged.merge(part)
    assert merged.counts == whole.counts
    assert len(whole.counts) <= 1025
    assert (whole.low, whole.high) == (numbers.min(), numbers.max())
    edges, counts = merged.bins()
    assert counts.sum() == 1000
    assert len(counts) <= 48
    assert edges[0] <= numbers.min() < numbers.max() <= edges[-1]
    assert abs(whole.median() - np.median(numbers)) <= 2 * np.ptp(numbers) / 512


def test_a_spread_grows_with_its_numbers():
    spread = Spread()
    for power in range(0, 40, 5):
        spread.add(np.array([0.1, 2.0**power]))
        assert spread.is_log == (power > 0)
        assert len(spread.counts) <= 1025
    spread.add(np.array([1e20]))
    assert not spread.is_log
    assert spread.bins()[1].sum() == 17
    whole = Spread()
    whole.add(np.arange(30.0), is_integer=True)
    assert whole.bins()[0].tolist() == list(range(31))


def test_many_columns_and_no_rows(tmp_path):
    table = pa.table({f"c{n:03}": [n] for n in range(250)} | {"image_id": ["x"]})
    pq.write_table(table, tmp_path / "a.parquet")
    files = LocalFileSystem()
    found = survey_columns(files, [str(tmp_path / "a.parquet")], {"image_id"})
    text = Page(render_columns(found)).text
    assert "200 of 250" in text
    assert "c039 int64 0 all 39 c040 int64 not counted" in text
    assert survey_columns(files, [], set()) == []
    assert render_columns([]) == ""


def test_many_shards():
    stats = Statistics(Lowest(0))
    stats.shards = Counter({f"{n:05}.tar": 100 for n in range(10_000)})
    stats.broken = Counter({"00007.tar": 99, "00009.tar": 100, "09999.tar": 1})
    html = render_shards(stats)
    page = Page(html)
    assert "10,000 shards, 3 with failures; the worst 200" in page.text
    assert "00009.tar 100 100 100.00% 00007.tar 100 99 99.00% 09999.tar 100 1 1.00%" in page.text
    assert page.count("tr") == 201


@pytest.fixture(scope="module")
def client():
    with Client(n_workers=1, processes=False, dashboard_address=":0") as client:
        yield client


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards with captions; of the JSON beside the pictures one is broken, and one is odd."""
    members = []
    for n in range(8):
        members.append((f"{n}.jpg", encode_picture(draw_picture(n, (32 + 8 * n, 48)))))
        members.append((f"{n}.txt", f"{HOSTILE} {n} {'long ' * (90 + n)}".encode()))
        value = {"score": n / 2 if n != 3 else "odd", "kind": "ab"[n % 2]}
        members.append((f"{n}.json", json.dumps(value).encode() if n != 5 else b"{"))
    folder = tmp_path_factory.mktemp("captions")
    return [write_shard(folder / f"{n}.tar", members[n * 12 : n * 12 + 12]) for n in range(2)]


def test_what_sidecars_hold(tmp_path, client, shards):
    run_job(
        shards,
        tmp_path / "out",
        reader=ImageReaderStage(device="cpu", verbose=False, decode=False, md5=True),
        client=client,
        sidecars={"txt": "caption", "json": {"score": "float64", "kind": "string"}},
    )
    html = Path(write_report(tmp_path / "out")).read_text("utf-8")
    page = Page(html)
    for words in (
        "only headers were read", "sidecars: caption from txt, score from json, kind from json",
        "Images with a warning: 1 1 cause", "sidecar 1 sidecar 5.json: ",
        f"{HOSTILE} 3 long long", "kind: b", "What is in them 4 of 4",
        "score double 2 (25.0%) 0 to 3.5, median about ", "kind string 1 (12.5%) 2 different",
        "error_sidecar string 6 (75.0%) ", "The smallest 6 of 8, the least area first",
        "The oddest aspect ratios", "Length of caption",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.count("script") == 1
    assert "long " * 70 not in page.text
    assert "md5:" not in page.text.partition("Samples, drawn at random")[2]  # no caption


def measure(batch):
    return {
        "mean": [float(image.image_data.mean()) for image in batch.data],
        "name": [HOSTILE for _ in batch.data],
        "shard": ["one"] * len(batch),
    }


def test_what_a_function_makes(tmp_path, client, shards):
    reader = ImageReaderStage(device="cpu", verbose=False)
    run_job(shards, tmp_path / "out", measure, reader=reader, client=client)
    page = Page(Path(write_report(tmp_path / "out")).read_text("utf-8"))
    assert f"name string 0 all {HOSTILE}" in page.text
    assert "mean double 0 " in page.text
    assert page.count("script") == 1
