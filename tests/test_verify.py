"""Everything decoded, and what is broken said."""

from dask_imgread.testing import write_shard
from tests.helpers.images import JPEG


def test_verify(tmp_path):
    from dask_imgread import verify_shards

    good = write_shard(tmp_path / "good.tar", [("a.jpg", JPEG)])
    bad = write_shard(tmp_path / "bad.tar", [("a.jpg", JPEG), ("b.jpg", b""), ("c.jpg", b"x" * 50)])
    found = verify_shards(str(tmp_path))
    assert found.table.to_dict("index") == {
        bad: {"good": 1, "empty": 1, "not an image": 1},
        good: {"good": 1, "empty": 0, "not an image": 0},
    }
    assert not found.ok
    assert list(found.bad["key"]) == ["b", "c"]
    text = str(found)
    assert "bad.tar" in text
    assert "good.tar" not in text
    assert "2 good images in 2 shards: 2 bad, in 1 of them" in text
    assert verify_shards(good).ok
    assert str(verify_shards(good)) == "1 good images in 1 shards: all good"


def test_verify_on_the_command_line(tmp_path, client, capsys, monkeypatch):
    import pandas as pd

    from dask_imgread.cli.main import main

    monkeypatch.setattr("dask_imgread.cli.commands.start_logging", lambda log_format: None)
    shard = write_shard(tmp_path / "s.tar", [("a.jpg", JPEG), ("b.jpg", JPEG[:500])])
    out = str(tmp_path / "bad.parquet")
    where = "--scheduler", client.scheduler.address, "--device", "cpu"
    assert main(["verify", shard, "--out", out, *where]) == 1
    assert "truncated" in capsys.readouterr().out
    assert len(pd.read_parquet(out)) == 1
    good = write_shard(tmp_path / "t.tar", [("a.jpg", JPEG)])
    assert main(["verify", good, *where]) == 0
    assert "all good" in capsys.readouterr().out
