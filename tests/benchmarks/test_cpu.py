"""``python -m benchmarks.cpu`` on the mini models, so that it does not rot."""

import pytest

from benchmarks import cpu


@pytest.mark.parametrize("name", ["llamagen-mini", "var-mini"])
def test_both_ways_draw_the_same_tokens(name, capsys):
    cpu.main(["--only", f"sample-{name}", "--only", f"train-{name}", "--rounds", "1"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = {cells[0]: cells for cells in lines if cells[0].endswith(name)}
    assert set(rows) == {f"sample-{name}", f"train-{name}"}
    assert rows[f"sample-{name}"].count("0.00%") == 2
