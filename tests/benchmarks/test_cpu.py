"""``python -m benchmarks.cpu`` on the mini models, so that it does not rot."""

import pytest

from benchmarks import cpu
from models import UserError


def test_all_rows_of_the_mini_models(tmp_path, monkeypatch):
    """Every part has a table; both ways of sampling draw the same tokens."""
    for name in ("llamagen-mini", "var-mini"):
        monkeypatch.setitem(cpu.ROWS, f"sample-{name}", (name, None, 4, "float32"))
        monkeypatch.setitem(cpu.ROWS, f"train-{name}", (name, None, 2))
    monkeypatch.setitem(cpu.ROWS, "evaluate-mini", (200, 150, 28))
    output = tmp_path / "cpu.md"
    cpu.main(["--small", "--rounds", "1", "--output", str(output)])
    text = output.read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [line for line in lines if line[0] != "row"]
    assert text.count("## ") == len(cpu.PARTS)
    assert sorted({row[0] for row in rows}) == sorted(name for name in cpu.ROWS if "mini" in name)
    for _, images, *speeds, decoding in (row for row in rows if row[0].startswith("sample")):
        assert images == "4" and speeds[3] == speeds[7] == "0.00%"
        assert all(float(speed) > 0 for speed in (*speeds[:3], *speeds[4:7], decoding))
    assert {row[1] for row in rows if row[0] == "load-llamagen-mini"} == set(cpu.FORMATS)
    assert "fid" in {row[1] for row in rows if row[0] == "evaluate-mini"}


def test_what_is_asked_for(tmp_path, capsys):
    cpu.main(["--list", "--only", "train-var-d16", "--only", "sample-var-mini"])
    assert capsys.readouterr().out.split() == ["sample-var-mini", "train-var-d16"]
    with pytest.raises(UserError, match="--only: no row is called 'train-var-d16'"):
        cpu.main(["--small", "--only", "train-var-d16", "--output", str(tmp_path / "cpu.md")])
    assert not list(tmp_path.iterdir())
