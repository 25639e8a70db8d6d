"""``python -m benchmarks.gpu`` on the mini models and a CPU, and the limits against what the code does."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.workloads import Card, random_model, sampling_work
from models import SamplingOptions, UserError


@pytest.mark.slow
def test_rows_of_the_mini_models(tmp_path, monkeypatch, capsys):
    """A row that fails says so, and the next goes on; compiled rows run, without a compiler."""
    found = gpu.rows(small=True)
    broken = gpu.Row("broken", "no such kind", "var-mini", 1)
    monkeypatch.setattr(gpu, "rows", lambda small: {"broken": broken, **found})
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "results" / "gpu.md"
    gpu.main(["--small", "--jobs", "2", "--output", str(output)])
    text = output.read_text()
    assert capsys.readouterr().out == text and "torch 2." in text and "TFLOP/s" in text
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cells = {name: cells for name, *cells in lines[1:]}
    assert set(cells) == {"broken", *found} and cells.pop("broken")[1] == "failed: KeyError: 'no such kind'"
    assert all(float(row[1]) > 0 and float(row[3].rstrip("%")) >= 0 for row in cells.values()), cells


def test_what_is_asked_for(tmp_path, monkeypatch, capsys):
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


def test_a_row_that_takes_too_long_is_ended():
    row = gpu.rows(small=True)["decode-var-mini"]
    ((name, cells),) = gpu.run_group([row], Card(1, 1, 1), 0.1)
    assert name == row.name and cells == [
        str(row.images),
        "failed: it took longer than its share of --minutes",
    ]


def attention(q, k, v, attn_mask=None, scale=None, **_):
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", gpu.MINI)
def test_limits(name, scale, monkeypatch):
    """All FLOPs of sampling but VAR's small products outside the blocks."""
    model, images = random_model(name, torch.device("cpu")), 4
    options = SamplingOptions(scale, model.default_cfg_schedule)
    uniforms = torch.rand(images, model.sequence_length, dtype=torch.float64)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)  # that of a CPU is not counted
    with FlopCounterMode(display=False) as counter:
        model.generate(torch.zeros(images, dtype=torch.int64), uniforms, options)
    done = counter.get_total_flops()
    assert 0.9 < sampling_work(model, images, options, torch.float32).flops / done <= 1
