import subprocess
import sys

import pandas as pd
import pytest
from PIL import Image

from dask_imgread.cli.commands import find_free, main


def run(*arguments, cwd):
    command = [sys.executable, "-m", "dask_imgread", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100)


def test_demo(tmp_path):
    done = run("demo", "--images", 40, "--workers", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "39 images, 1 failed" in done.stdout
    assert "truncated" in done.stdout
    assert "images/s" in done.stdout
    assert "/000000.jpg" in done.stdout
    folder = tmp_path / "dask-imgread-demo"
    rows = pd.read_parquet(folder / "metadata")
    assert len(rows) == 40
    assert rows["error"].notna().sum() == 1
    assert "bokeh" in (folder / "report.html").read_text()
    with Image.open(folder / "contact-sheet.png") as sheet:
        assert sum(count > 0 for count in sheet.convert("L").histogram()) > 50
    assert "Traceback" not in done.stderr
    before = sorted(folder.rglob("*"))
    again = run("demo", "--folder", folder, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert "is not empty, and stays as it is: give another --folder" in again.stderr
    assert sorted(folder.rglob("*")) == before
    assert find_free(str(folder)) == f"{folder}-2"


def test_metadata(tmp_path, photo_shards):
    done = run(
        "metadata", *photo_shards, "--out", "out", "--images-per-partition", 10, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "100 images, 0 failed" in done.stdout
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 12
    assert len(pd.read_parquet(tmp_path / "out")) == 100


@pytest.mark.parametrize("wrong", ["nope.tar", "empty", "text.tar", "zero.tar", "page.html"])
def test_wrong_paths(tmp_path, monkeypatch, capsys, wrong):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dask_imgread.progress.start_logging", lambda log_format: None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("hello")
    (tmp_path / "zero.tar").write_text("")
    (tmp_path / "page.html").write_text("<p>" * 1000)
    assert main(["metadata", wrong, "--out", "out"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert wrong in printed.err


def test_a_damaged_shard_among_good_ones_is_no_wrong_path(tmp_path, photo_shards):
    (tmp_path / "text.tar").write_text("hello")
    done = run("metadata", "text.tar", photo_shards[0], "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "25 images, 1 failed" in done.stdout
    assert "unreadable shard: not a tar archive" in done.stdout


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "metadata" in capsys.readouterr().out
