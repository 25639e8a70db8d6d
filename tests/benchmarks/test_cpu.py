"""``python -m benchmarks.cpu`` runs on the mini models and small data sets."""

import pytest

from benchmarks import cpu


def run_rows(names, capsys):
    """Run these rows of the benchmark, and return the printed cells of each row by its name."""
    cpu.main([*(word for name in names for word in ("--only", name)), "--rounds", "1"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    return {cells[0]: cells for cells in lines if cells[0] in names}


@pytest.mark.parametrize(
    "names",
    [
        ("sample-llamagen-mini", "train-var-mini", "read-mini"),
        pytest.param(("sample-var-mini", "train-llamagen-mini", "index-mini"), marks=pytest.mark.slow),
    ],
)
def test_rows_are_measured(names, capsys):
    """Both implementations sample the same tokens: 0.00% differ, without and with guidance."""
    rows = run_rows(names, capsys)
    assert rows.keys() == set(names) and rows[names[0]].count("0.00%") == 2
