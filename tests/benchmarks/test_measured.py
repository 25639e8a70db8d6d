"""Figures of ``benchmarks.gpu`` beside what was predicted."""

from pathlib import Path

import pytest
from benchmarks.gpu_rows import Row, rows
from benchmarks.measured import COLUMNS, Compiling, alike, comparison, pays_from

from models import UserError

TABLE = """# On a GPU

## card 1

- (1) before

| row | images at once | images/s | peak memory, GB | by bytes | by FLOPs | compiling, s | run |
|---|---|---|---|---|---|---|---|
| sample-var-d16-free-eager | 64 | 1 | 1 | 1% | 1% |  | 1 |

## card 2

| row | images at once | images/s | peak memory, GB | by bytes | by FLOPs | compiling, s | run |
|---|---|---|---|---|---|---|---|
| sample-var-d16-free-eager | 64 | 100 | 4.00 | 1% | 1% |  | 1 |
| sample-var-d16-free-compiled | 64 | 200 | 3.00 | 2% | 2% | 20 | 1 |
| decode-var-256 | 64 | 50 | 2.00 | 2% | 2% |  | 1 |
| decode-var-256-compiled | 64 | 100 | 1.00 | 2% | 2% | 10 | 1 |
| sample-llamagen-b-free-eager | 64 | 8 | 2.00 | 1% | 1% |  | 1 |
| sample-llamagen-b-free-compiled | 64 | failed: took more than its time |  |  |  |  | 1 |
"""


def test_side_by_side(tmp_path):
    """Of the last machine; what failed or was not run is a dash."""
    path = tmp_path / "gpu.md"
    path.write_text(TABLE)
    predicted = {alike(Row("", "sample", "var-d16", 0)): "1,234"}
    machine, _, head, _, *lines = comparison(path, predicted).splitlines()
    found = {name: cells for name, *cells in (line.strip("| ").split(" | ") for line in lines)}
    assert machine == "card 2:" and head.strip("| ").split(" | ") == list(COLUMNS)
    assert list(found) == [row.name.replace("-eager", "") for row in rows(False) if not row.compiled]
    # 20 s for tokens and 10 s for pixels, which save 5 and 10 ms of an image.
    assert found["sample-var-d16-free"] == [
        "1,234", "100", "200", "2.0", "2,000", found["sample-var-d16-free"][5], "4.00", "3.00",
    ]  # fmt: skip
    assert 2 < float(found["sample-var-d16-free"][5]) < 8
    assert found["sample-llamagen-b-free"][1:5] == ["8", "–", "–", "–"]
    assert set(found["encode-var-256"]) == {"–"}


def test_what_never_pays():
    row = ["64", "100", "4", "", "", "20"]
    assert pays_from([Compiling(row, row)]) is None


def test_no_table(tmp_path):
    with pytest.raises(UserError, match="--measured: .*gpu.md has no table of benchmarks.gpu"):
        comparison(Path(tmp_path / "gpu.md"), {})
