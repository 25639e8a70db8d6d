"""``python -m benchmarks.gpu`` on the mini models and a CPU, so that it does not rot."""

import pytest
import torch

from benchmarks import gpu
from benchmarks.workloads import Card
from models import UserError

FAILING = gpu.Row("broken", "no such kind", "var-mini", 1)


def table_of(path) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines if name != "row"}


def test_rows_of_the_mini_models(tmp_path, monkeypatch, capsys):
    """One of each kind; a row that fails says so, and the next goes on. Compiled ones without a compiler."""
    names = [
        "train-llamagen-mini", "sample-var-mini-guided-eager", "decode-llamagen-mini", "encode-var-mini",
        "broken", "train-var-mini-compiled", "sample-llamagen-mini-free-compiled",
    ]  # fmt: skip
    known = {**gpu.rows(small=True), "broken": FAILING}
    monkeypatch.setattr(gpu, "rows", lambda small: {name: known[name] for name in names})
    monkeypatch.setattr(gpu, "LONGEST_MEASURED", 0.0)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "results" / "gpu.md"
    gpu.main(["--small", "--output", str(output)])
    found = table_of(output)
    assert sorted(found) == sorted(names)
    assert found.pop("broken")[1] == "failed: KeyError: 'no such kind'"
    for name, cells in found.items():
        assert float(cells[1]) > 0, (name, cells)
        assert all(float(share.rstrip("%")) >= 0 for share in cells[3:5]), (name, cells)
    text = output.read_text()
    assert "torch 2." in text and f"--small --output {output}" in text and "TF32" in text
    assert capsys.readouterr().out == text


def test_a_row_that_takes_too_long_is_ended():
    row = gpu.rows(small=True)["encode-var-mini"]
    (found,) = gpu.run_group([row], Card(1.0, 1.0, 1.0), seconds=0.0)
    assert found == (row.name, ["2", "failed: took more than its time"])


def test_what_is_asked_for(tmp_path, monkeypatch, capsys):
    gpu.main(["--list", "--only", "decode-var-256", "--only", "train-llamagen-l-compiled"])
    assert capsys.readouterr().out.split() == ["decode-var-256", "train-llamagen-l-compiled"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, message in (
        (["--only", "decode"], "--only: no row is called 'decode'"),
        (["--output", str(tmp_path / "gpu.md")], "--small: there is no GPU"),
    ):
        with pytest.raises(UserError, match=message):
            gpu.main(arguments)
    assert not list(tmp_path.iterdir())


def test_what_compiles_at_once():
    """Four rows at most, and rows of training, which need most memory, each in another group."""
    groups = gpu.in_groups(list(gpu.rows(small=False).values()), jobs=4)
    assert [len(group) for group in groups] == [4, 4, 4, 3, 3, 4, 4, 4]
    assert [group[0].compiled for group in groups] == [False] * 5 + [True] * 3
    assert all(sum(row.kind == "train" for row in group) <= 1 for group in groups)


def test_the_rate_is_that_of_the_precision():
    card = Card(bandwidth=1e12, half=1e15, single=5e14)
    work = {dtype: gpu.Work(5e11, 1e14, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}
    assert [card.shares(work[dtype], seconds=1.0) for dtype in work] == [(0.5, 0.1), (0.5, 0.1), (0.5, 0.2)]
