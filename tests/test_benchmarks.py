"""The benchmarks run; what they measure is no test's business."""

import json

from benchmarks.__main__ import main
from benchmarks.scale import main as scale


def test_a_tiny_run_of_every_row(tmp_path, capfd):
    out = tmp_path / "table.json"
    arguments = ["--images", "12", "--long", "24", "--rounds", "1", "--json", str(out)]
    assert main(arguments) == 0
    table = json.loads(out.read_text())
    assert len(table["rows"]) == 29
    assert all(row["ours"] > 0 and row["other"] > 0 for row in table["rows"])
    printed = capfd.readouterr().out
    assert all(row["what"] in printed for row in table["rows"])
    assert "dask" in table["about"]["versions"]


def test_a_tiny_run_at_scale(capfd):
    assert scale(["--tasks", "200", "--partitions", "200"]) == 0
    assert "ms a task" in capfd.readouterr().out
