"""The command line that does a job again: the job takes it for its own."""

import shlex

import pytest
from distributed import Client

from dask_imgread import ImageReaderStage, fingerprint, run_job
from dask_imgread.cli.main import main
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.report.command import describe_options, name_shards, write_command
from dask_imgread.report.parts import list_shards
from dask_imgread.testing import draw_picture, encode_picture, make_shards, write_shard


@pytest.fixture(scope="module")
def client():
    with Client(n_workers=1, processes=False, dashboard_address=":0") as client:
        yield client


def read_job(folder, client, fn=None, reader=None, **options):
    """Run a job on shards in a folder whose name needs quotes; return its description."""
    shards = make_shards(folder / "my shards", shards=3, images_per_shard=2)
    out = JobFolder(str(folder / "out"))
    run_job(shards, out.url, fn, reader=reader, client=client, **options)
    return out, out.read_job()


METADATA = {"sidecars": False, "verbose": False}


@pytest.mark.parametrize(
    ("fn", "reader", "options", "said"),
    [
        (None, {"decode": False, **METADATA}, {}, ""),
        (
            None,
            {"resize": (32, 48), "max_pixels": 10**9, "decoder": "dali", **METADATA},
            {"checksum": True, "files_per_partition": 2, "rows_per_file": 9},
            "decode: yes · checksum: yes · max pixels: 1000000000 · resize: 32, 48 · ",
        ),
        (
            None,
            {"decode": False, **METADATA},
            {"sidecars": {"txt": {"caption": None}, "json": {"a.b": None, "url": "string"}}},
            "sidecars: caption from txt, a.b from json, url from json",
        ),
        (fingerprint, None, {"blocksize": 1000}, "blocksize: 1000"),
        (fingerprint, {"sidecars": False, "checksum": True}, {}, "min side: none"),
    ],
)
def test_the_job_takes_it_for_its_own(tmp_path, client, fn, reader, options, said):
    reader = fingerprint.reader if reader is None else ImageReaderStage(**reader)
    out, job = read_job(tmp_path, client, fn, reader, **options)
    command = write_command(job, list_shards(out, job), out.url, "--dry-run")
    program, *words = shlex.split(command)
    assert program == "dask-imgread"
    assert f"{tmp_path}/my shards/{{00000..00002}}.tar" in words
    assert main(words) == 0
    assert describe_options(job).startswith(said)


def make_reader(**options):
    return {"command": "metadata", "options": {"reader": "ImageReaderStage", **options}}


@pytest.mark.parametrize(
    "job",
    [
        {"command": "apply", "function": "__main__:measure"},
        {"command": "apply", "function": "module:make.<locals>.measure"},
        {"command": "apply", "function": "module:measure", "options": {"output": "device"}},
        make_reader(reader="MyReader"),
        make_reader(mine=3),
        make_reader(sidecars=["txt"]),
        make_reader(max_pixels=None),
        make_reader(sidecar_columns=[["whole", "json", None, "json"]]),
        make_reader(sidecar_columns=[["a,b", "json", "a,b", None]]),
    ],
)
def test_what_only_python_can_ask_for(job):
    assert write_command(job, ["a.tar"], "out") == ""


def test_shards_without_a_short_name(tmp_path, client):
    assert name_shards([f"s-{n}.tar" for n in range(8, 12)]) == ["s-{8..9}.tar", "s-{10..11}.tar"]
    assert name_shards([f"{name}.tar" for name in "abcdefgh"])[-1] == "h.tar"
    for names in (map(str, "abcdefghi"), ["{1..2}"], ["https://x/a.tar?key=***"]):
        assert name_shards(names) == ["SHARDS"]
    assert "metadata SHARDS --out" in write_command(make_reader(), ["{a,b}.tar"], "out")


def test_a_shard_that_is_gone_is_not_named(tmp_path, client):
    members = [("a.jpg", encode_picture(draw_picture(1)))]
    shards = [write_shard(tmp_path / f"{name}.tar", members) for name in "ab"]
    out = JobFolder(str(tmp_path / "out"))
    run_job(shards, out.url, client=client)
    run_job(shards[1:], out.url, client=client, update=True)
    assert list_shards(out, out.read_job()) == shards[1:]
