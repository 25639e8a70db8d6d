"""``python -m benchmarks.gpu`` with the mini models on a CPU, and its FLOPs against PyTorch's counter."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.workloads import Card, random_model, sampling_work
from models import SamplingOptions, UserError


@pytest.mark.slow
def test_rows_of_mini_models(tmp_path, monkeypatch, capsys):
    """A row that fails reports its error, and the other rows run. Rows of compiled models run eagerly."""
    rows = gpu.rows(small=True)
    broken = gpu.Row("broken", "no such kind", "var-mini", 1)
    monkeypatch.setattr(gpu, "rows", lambda small: {"broken": broken, **rows})
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "results" / "gpu.md"
    gpu.main(["--small", "--jobs", "2", "--output", str(output)])
    text = output.read_text()
    assert capsys.readouterr().out == text and "torch 2." in text and "TFLOP/s" in text
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cells = {name: cells for name, *cells in lines[1:]}
    assert set(cells) == {"broken", *rows} and cells.pop("broken")[1] == "failed: KeyError: 'no such kind'"
    assert all(float(row[1]) > 0 and float(row[3].rstrip("%")) >= 0 for row in cells.values()), cells


def test_selection_of_rows(tmp_path, monkeypatch, capsys):
    gpu.main(["--list", "--only", "decode-var-256", "--only", "train-llamagen-l"])
    assert capsys.readouterr().out.split() == ["train-llamagen-l", "decode-var-256"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, message in (
        (["--only", "decode"], "--only: there is no row 'decode'"),
        (["--output", str(tmp_path / "gpu.md")], "--small: .*no GPU"),
    ):
        with pytest.raises(UserError, match=message):
            gpu.main(arguments)
    assert not list(tmp_path.iterdir())


def test_slow_row_is_stopped():
    row = gpu.rows(small=True)["decode-var-mini"]
    ((name, cells),) = gpu.run_group([row], Card(1, 1, 1), 0.1)
    assert name == row.name and cells == [
        str(row.images),
        "failed: it took longer than its share of --minutes",
    ]


def plain_attention(q, k, v, attn_mask=None, scale=None, **_):
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", gpu.MINI)
def test_flops_of_sampling(name, scale, monkeypatch):
    """``sampling_work`` counts all FLOPs of sampling, except VAR's small matmuls outside the blocks."""
    model, images = random_model(name, torch.device("cpu")), 4
    options = SamplingOptions(scale, model.default_cfg_schedule)
    uniforms = torch.rand(images, model.sequence_length, dtype=torch.float64)
    # PyTorch does not count the FLOPs of the CPU's attention kernel.
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    with FlopCounterMode(display=False) as counter:
        model.generate(torch.zeros(images, dtype=torch.int64), uniforms, options)
    measured = counter.get_total_flops()
    assert 0.9 < sampling_work(model, images, options, torch.float32).flops / measured <= 1
