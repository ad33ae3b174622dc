import subprocess
import sys
from dataclasses import fields
from functools import partial

import pandas as pd
import pytest
from PIL import Image

from dask_imgread import ImageReaderStage
from dask_imgread.cli.arguments import NOT_OFFERED, READER_HELP, make_parser
from dask_imgread.cli.commands import make_reader
from dask_imgread.cli.demo import find_free
from dask_imgread.cli.main import main
from tests.helpers import commands


def test_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = commands.run_command("demo", "--images", 40, "--workers", 2)
    assert status == 0, err
    assert "39 images, 1 failed" in out
    assert "truncated" in out
    assert "images/s" in out
    assert "/000000.jpg" in out
    folder = tmp_path / "dask-imgread-demo"
    rows = pd.read_parquet(folder / "metadata")
    assert len(rows) == 40
    assert rows["error"].notna().sum() == 1
    assert "<svg" in (folder / "report.html").read_text()
    with Image.open(folder / "contact-sheet.png") as sheet:
        assert sum(count > 0 for count in sheet.convert("L").histogram()) > 50
    assert "Traceback" not in err
    before = sorted(folder.rglob("*"))
    status, out, err = commands.run_command("demo", "--folder", folder)
    assert (status, out) == (2, "")
    assert "is not empty, and stays as it is: give another --folder" in err
    assert sorted(folder.rglob("*")) == before
    assert find_free(str(folder)) == f"{folder}-2"


@pytest.fixture
def read_metadata(client, run_command, tmp_path, monkeypatch):
    """Run the command in this process, on the tests' own cluster."""
    monkeypatch.chdir(tmp_path)
    return partial(run_command, "metadata", "--scheduler", client.scheduler.address)


def test_metadata(tmp_path, photo_shards, read_metadata):
    status, out, err = read_metadata(*photo_shards, "--out", "out", "--images-per-partition", 10)
    assert status == 0, err
    assert "100 images, 0 failed" in out
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 12
    assert len(pd.read_parquet(tmp_path / "out")) == 100


@pytest.mark.parametrize("wrong", ["nope.tar", "empty", "text.tar", "zero.tar", "page.html"])
def test_wrong_paths(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dask_imgread.cli.commands.start_logging", lambda log_format: None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("hello")
    (tmp_path / "zero.tar").write_text("")
    (tmp_path / "page.html").write_text("<p>" * 1000)
    assert main(["metadata", wrong, "--out", "out"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert wrong in printed.err


def test_a_damaged_shard_among_good_ones_is_no_wrong_path(tmp_path, photo_shards, read_metadata):
    (tmp_path / "text.tar").write_text("hello")
    status, out, err = read_metadata("text.tar", photo_shards[0], "--out", "out")
    assert status == 0, err
    assert "25 images, 1 failed" in out
    assert "unreadable shard: not a tar archive" in out


LIST_MODULES = """
import sys
from dask_imgread.cli.main import main
for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit:
        pass
    print("loaded after", line, "loaded:", *sys.modules)
"""


def list_modules(*lines):
    """Return what is loaded after each command line, one after the other in a new process."""
    command = [sys.executable, "-c", LIST_MODULES, *lines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    told = [line for line in done.stdout.splitlines() if line.startswith("loaded after")]
    modules = ({*line.partition(" loaded:")[2].split()} for line in told)
    return dict(zip(lines, modules, strict=True))


def test_help_and_refusals_do_not_wait_for_dask():
    lines = [
        *("--help", "--version", "metadata --help", "apply --help", "demo --help", "verify --help"),
        *("select --help", "select s", "select s --out o --not-ids i --where x"),
        *("", "nonsense", "metadata --nonsense", "apply f:f s --out o --resize big"),
        *("metadata", "metadata s --out o --resize 9", "verify", "demo --images 0"),
        "metadata --config nonsense.toml",
    ]
    for line, modules in list_modules(*lines).items():
        assert "dask_imgread.cli.arguments" in modules
        slow = modules & {"dask", "distributed", "numpy", "pandas", "pyarrow", "PIL"}
        assert slow == set(), line


def test_commands_on_shards_do_not_wait_for_dasks_frames():
    for line, modules in list_modules("verify nope.tar", "metadata nope.tar --out o").items():
        assert "dask_imgread.verify" in modules
        assert "dask.dataframe" not in modules, line


def test_every_option_of_the_reader_is_offered_or_left_out_for_a_reason():
    apply = {*vars(make_parser().parse_args(["apply"]))}
    options = {field.name for field in fields(ImageReaderStage)}
    assert apply & options == {*READER_HELP}
    assert options - apply == {*NOT_OFFERED}


def test_the_readers_options_are_parsed_as_its_types_say():
    plain = make_parser().parse_args(["apply"])
    assert make_reader(plain) == ImageReaderStage(verbose=False)
    words = "--no-sidecars --num-gpus-per-worker 0.5 --max-pixels 9 --resize 3x4 --decoder dali"
    words += " --fit crop --resample lanczos"
    given = make_parser().parse_args(["apply", *words.split(), "--max-batch-bytes", "1MiB"])
    assert make_reader(given) == ImageReaderStage(
        verbose=False,
        sidecars=False,
        num_gpus_per_worker=0.5,
        max_pixels=9,
        resize=(3, 4),
        fit="crop",
        resample="lanczos",
        decoder="dali",
        max_batch_bytes=1 << 20,
    )


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "metadata" in capsys.readouterr().out
