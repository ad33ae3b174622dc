"""What the command line says: help, refusals, progress, previews."""

import argparse
import contextlib
import os
import re
import termios
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest

from dask_imgread import ImageReaderStage, __version__
from dask_imgread.cli.arguments import make_parser, parse_arguments
from dask_imgread.cli.main import main
from dask_imgread.cli.preview import format_rows
from dask_imgread.testing import make_shards, write_shard
from tests.helpers.commands import Command, run_command

MODULE = "def measure(batch):\n    return {'width': [image.width for image in batch.data]}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dask_imgread.cli.commands.start_logging", lambda log_format: None)
    return tmp_path


def run_on_terminal(*arguments, width=80):
    """Return the exit status, and what a terminal of that width is sent as stdout and stderr."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        command = Command(*arguments, terminal=theirs)
    shown = os.read(ours, 1 << 16)
    os.close(theirs)  # only now: the command has opened it
    with contextlib.suppress(OSError):  # so a terminal says that nobody writes to it any more
        while piece := os.read(ours, 1 << 16):
            shown += piece
    os.close(ours)
    (status,) = command.wait()
    return status, shown.decode()


def list_commands():
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices


@pytest.mark.parametrize("name", list_commands())
def test_every_help_has_defaults_and_an_example_that_parses(name):
    command = list_commands()[name]
    examples = re.findall(r"^  dask-imgread (.*)", command.format_help(), re.MULTILINE)
    assert examples
    for example in examples:
        assert parse_arguments(make_parser(), example.replace('"', "").split()).command == name
    for action in command._actions:
        optional = action.option_strings and action.dest not in ("help", "scheduler", "out")
        if optional and action.dest != "scheduler_file":
            assert "(default" in action.help, action.dest


def test_the_defaults_in_the_help_are_the_readers():
    actions = {action.dest: action.help for action in list_commands()["apply"]._actions}
    said = {"yes": True, "no": False, "none": None, "256MiB": 256 << 20, "64MiB": 64 << 20}
    seen = 0
    for field in fields(ImageReaderStage):
        if field.name in actions and field.name != "decode":
            told = re.search(r"\(default:? ([^):]+)", actions[field.name])[1]
            assert said.get(told, told) == field.default or told == str(field.default), field.name
            seen += 1
    assert seen == 19
    assert (
        "(default no)" in {a.dest: a.help for a in list_commands()["metadata"]._actions}["sidecars"]
    )


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert (exit_.value.code, capsys.readouterr().out) == (0, f"dask-imgread {__version__}\n")


@pytest.mark.parametrize(
    ("text", "number"), [("64MB", 64_000_000), ("1GiB", 1 << 30), ("500", 500), ("1.5 kB", 1500)]
)
def test_sizes_have_units(folder, text, number):
    (folder / "job.toml").write_text(f'blocksize = "{text}"')
    for given in (["--blocksize", text], ["--config", "job.toml"]):
        assert parse_arguments(make_parser(), ["metadata", "s", *given]).blocksize == number
    given = ["apply", "a:b", "s", "--max-batch-bytes", text]
    assert parse_arguments(make_parser(), given).max_batch_bytes == number


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["apply", "good.py:measure", "shards"], "do you mean good:measure?"),
        (["apply", "./good.py:measure", "shards"], "do you mean good:measure in the folder .?"),
        (["apply", "good.py", "shards"], "do you mean good:FUNCTION?"),
        (["apply", "good.measure", "shards"], "do you mean good:measure?"),
        (["apply", "bad:measure", "shards"], "run the command where this one can be imported"),
        (["apply", "good:__name__", "shards"], "give one that takes an ImageBatch"),
        (["metadata"], 'give files, folders, globs or URLs, such as "shards/*.tar"'),
        (["metadata", "nope.tar"], "check the path"),
        (["metadata", "*.tar"], "give the path of shards"),
        (["metadata", "good.py"], "give tar shards"),
        (["metadata", "shards", "--out", "."], "and 1 more: give another folder"),
        (["metadata", "shards", "--blocksize", "9", "--files-per-partition", "2"], "give one"),
        (["report", "shards"], "give the folder that a job writes to"),
    ],
)
def test_refusals_say_what_to_do(folder, capsys, arguments, told):
    make_shards("shards", images_per_shard=2)
    out = [] if {"--out", "report"} & {*arguments} else ["--out", "result"]
    assert main([*arguments, *out]) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert printed.err.count("\n") == 1


def test_what_is_missing_is_said_with_an_example(folder, capsys):
    assert main(["metadata", "x.tar"]) == 2
    assert "such as --out result" in capsys.readouterr().err
    assert main(["apply", "--out", "x"]) == 2
    assert "such as brightness:measure" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["metadata", "x.tar", "--blocksize", "many"])
    assert "bytes such as 64MB or 67108864 are expected, not 'many'" in capsys.readouterr().err


def test_lists_that_are_cut_say_how_many_more(folder, client, capsys):
    broken = [(f"{n}.jpg", b"") for n in range(9)]
    shards = [write_shard(f"{n}.tar", broken) for n in range(6)]
    where = "--scheduler", client.scheduler.address
    assert main(["metadata", shards[0], "--out", "out", *where]) == 0
    printed = capsys.readouterr().out
    assert printed.count("failed: ") == 5
    assert "and 4 more failed" in printed
    assert main(["metadata", *shards, "--out", "out"]) == 2
    assert re.search(r"5 shards are new: \S+, \S+, \S+ and 2 more", capsys.readouterr().err)


def test_nothing_left_to_do(folder):
    shards = make_shards("shards", images_per_shard=4)
    job = ["metadata", *shards, "--out", "out", "--workers", 1]
    first, again = run_command(*job), run_command(*job)
    assert first[0] == again[0] == 0
    assert "nothing left to read: all 2 partitions are done" in again[1]
    assert "nothing left" not in first[1]
    assert "images/s" not in again[1]


@pytest.mark.parametrize("command", ["metadata", "verify", "demo"])
def test_no_bar_goes_into_a_log(folder, command):
    make_shards("shards", images_per_shard=4)
    what = {"metadata": ["shards", "--out", "out"], "verify": ["shards"], "demo": ["--images", 8]}
    status, _, err = run_command(command, *what[command], "--workers", 1)
    assert status == 0
    assert "\r" not in err
    assert re.search(r"\d+ of \d+ partitions, 8|7 images, .* images/s, 0 s left\n", err)


def test_no_time_left_is_told_before_it_is_known(capsys):
    from dask_imgread.progress import ProgressLog

    with ProgressLog(3) as progress:
        progress.show()
        progress.update(1, 10, 0)
    first, last = capsys.readouterr().err.splitlines()
    assert first.endswith("0 of 3 partitions, 0 images, 0 failed, 0 images/s")
    assert last.endswith("s left")


def test_warnings_do_not_glue_to_the_bar(folder):
    """Neither the log's, nor Python's own, from worker processes."""
    (folder / "noisy.py").write_text(
        "import time, warnings\n"
        "def measure(batch):\n"
        "    time.sleep(0.3)\n"
        "    warnings.warn(f'beware of {batch.data[0].key}', stacklevel=1)\n"
        "    return {'width': [image.width for image in batch.data]}\n"
    )
    make_shards("shards", shards=2, images_per_shard=20, broken=5)
    job = ["apply", "noisy:measure", "shards", "--out", "out", "--workers", 1, "--device", "cpu"]
    status, shown = run_on_terminal(*job, "--images-per-partition", 5, width=120)
    assert status == 0
    # What is on the screen: a line is erased from where the cursor is put back to.
    lines = [line.rsplit("\r\x1b[K", 1)[-1] for line in shown.replace("\r\n", "\n").split("\n")]
    told = [line for line in lines if "truncated" in line or "beware" in line]
    assert len(told) >= 10
    written = re.compile(r"failed: |\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|  warnings.warn")
    assert [line for line in told if not written.match(line)] == []
    assert any("images/s" in line and "8/8" in line for line in re.split(r"[\r\n]", shown))


ROWS = pd.DataFrame(
    {
        "image_id": ["00000-5ac5de3b55/000000.jpg"] * 2,
        "path": ["/a/very/long/path/" + "of/folders/" * 9 + "00000.tar/000000.jpg"] * 2,
        "thumbnail": [bytes(30_000)] * 2,
        "vector": [np.arange(512.0)] * 2,
        "boxes": [[[1, 2], [3, 4]], None],
        "name": ["\x1b[2J\nclear"] * 2,
    }
)


@pytest.mark.parametrize("width", [10, 40, 80, 200])
def test_a_preview_is_cut_to_the_terminal(width):
    text = format_rows(ROWS, width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert len(text.splitlines()) == {10: 10, 40: 5, 80: 4, 200: 3}[width]
    if width >= 40:
        assert "00000-5ac5de3b55/000000.jpg" in text
    if width == 80:
        assert "and 3 more columns: vector, boxes, name" in text
    if width == 200:
        assert "<30,000 bytes>" in text
        assert "[0, 1, 2, and 509 more]" in text
        assert "[[1, 2], [3, 4]]" in text


def test_the_preview_of_a_job_fits(folder):
    make_shards("shards", images_per_shard=2)
    status, shown = run_on_terminal("metadata", "shards", "--out", "out", "--workers", 1, width=72)
    assert status == 0
    preview = shown.replace("\r\n", "\n").split("while reading\n")[-1].splitlines()
    assert max(map(len, preview)) <= 72
    assert any(line.startswith("and ") and "more columns: " in line for line in preview)
