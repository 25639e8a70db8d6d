"""``python -m benchmarks.gpu`` on the mini models and a CPU, so that it does not rot."""

import pytest
from benchmarks.gpu_rows import Row, rows
from benchmarks.report import Report

from benchmarks import gpu
from models import UserError


def table_of(path) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines if name != "row"}


def test_all_rows_of_the_mini_models(tmp_path, monkeypatch, capsys):
    """A row that fails says so, and the next goes on; compiled rows run, without a compiler."""
    first, *others = rows(small=True)
    monkeypatch.setattr(
        gpu, "rows", lambda small: [first, Row("broken", "no such kind", "var-mini", 1), *others]
    )
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "results" / "gpu.md"
    gpu.main(["--small", "--output", str(output)])
    found = table_of(output)
    assert list(found) == [first.name, "broken", *(row.name for row in others)]
    assert found.pop("broken")[1] == "failed: KeyError: 'no such kind'"
    for name, cells in found.items():
        assert float(cells[1]) > 0 and float(cells[2]) > 0, (name, cells)
        assert all(float(share.rstrip("%")) >= 0 for share in cells[3:5]), (name, cells)
    text = output.read_text()
    assert "torch 2." in text and f"--small --output {output}" in text and "TFLOP/s" in text
    assert capsys.readouterr().out.count("\n") == len(found) + 1


def test_a_row_that_is_run_again_replaces_the_old_one(tmp_path):
    """With the run that it is of; a run of which no row is left is no longer told."""
    path, columns = tmp_path / "gpu.md", ("row", "a", "b")
    for machine, note, table in (
        ("card 1", "first", {"x": ["1", "2"], "y": ["3", ""]}),
        ("card 2", "other", {"x": ["5", "6"]}),
        ("card 1", "second", {"z": ["7", "8"]}),
        ("card 1", "third", {"x": ["failed: out of memory"], "z": ["9", ""]}),
    ):
        report = Report(path, "# Title\n\nText.", machine, note, columns)
        for name, cells in table.items():
            report.put(name, cells)
    head = "| row | a | b | run |\n|---|---|---|---|\n"
    assert path.read_text() == (
        "# Title\n\nText.\n\n## card 1\n\n- (1) first\n- (3) third\n\n"
        f"{head}| x | failed: out of memory |  | 3 |\n| y | 3 |  | 1 |\n| z | 9 |  | 3 |\n"
        f"\n## card 2\n\n- (1) other\n\n{head}| x | 5 | 6 | 1 |\n"
    )


def test_a_table_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "gpu.md"
    path.write_text("# Title\n\n## card\n\nTold.\n\n| row | a |\n|---|---|\n| x | 1 |\n")
    before = path.read_text()
    with pytest.raises(UserError, match="gpu.md has a table of other columns for this machine; move it"):
        Report(path, "# Title", "card", "note", ("row", "a"))
    assert path.read_text() == before


def test_what_is_asked_for(tmp_path, monkeypatch, capsys):
    gpu.main(["--list", "--only", "decode-var-256", "--only", "train-llamagen-l-fsdp"])
    assert capsys.readouterr().out.split() == ["train-llamagen-l-fsdp", "decode-var-256"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, message in (
        (["--only", "decode"], "--only: no row is called 'decode'"),
        (["--output", str(tmp_path / "gpu.md")], "--small: there is no GPU"),
    ):
        with pytest.raises(UserError, match=message):
            gpu.main(arguments)
    assert not list(tmp_path.iterdir())


def test_a_row_that_takes_too_long_is_ended():
    worker = gpu.Worker()
    worker.prepare(rows(small=True)[0])
    assert worker.ready(end=0.0) == "took more than its time"
    assert not worker.alive


def test_what_compiles_at_once():
    sizes = [len(group) for group in gpu.in_groups(rows(small=True), jobs=4)]
    compiled = [row for row in rows(small=True) if row.compiled]
    assert sizes == [1] * (len(rows(small=True)) - len(compiled)) + [4, len(compiled) - 4]
