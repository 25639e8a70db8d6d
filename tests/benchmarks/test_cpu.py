"""``python -m benchmarks.cpu`` on the mini models and small data sets, so that it does not rot."""

import pytest

from benchmarks import cpu


def rows_of(names, capsys):
    """Return the cells of each row that is printed, by its name."""
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
def test_rows_are_measured_and_both_ways_sample_the_same_tokens(names, capsys):
    rows = rows_of(names, capsys)
    assert rows.keys() == set(names) and rows[names[0]].count("0.00%") == 2
