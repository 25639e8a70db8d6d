"""What is told of a GPU, on a machine that has none."""

import json

import pytest
import torch
from specimens import weights

import cca.training.command as command
import train_llamagen_cca
from cca.training.gpu import peak_rate
from cca.training.trainer import Trainer
from models.errors import UserError, one_line

GPU = torch.device("cuda", 0)
FULL = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
    "1.00 GiB is free. Process 1 has 78.00 GiB memory in use."
)


def train(*options):
    fixed = ["--codes=codes", "--max-steps", "2", "--batch-size", "8", "--micro-batch-size", "4"]
    train_llamagen_cca.main([*weights("llamagen"), *fixed, *options])


@pytest.mark.parametrize(
    "name, rate",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_rates_of_gpus(name, rate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_rate(GPU) == rate and peak_rate(torch.device("cpu")) is None


@pytest.mark.parametrize("loss, passes", [("cca", 4), ("sft", 3)])
def test_share_of_the_rate(loss, passes, disk, monkeypatch):
    monkeypatch.setattr(command, "peak_rate", lambda device: 1e12)
    shown, own = [], command.show
    monkeypatch.setattr(command, "show", lambda *given: (shown.append(given[1]), own(*given)))
    extra = ["--lr", "1e-3", "--beta", "0.1", "--lambda", "1"] if loss == "sft" else []
    train("--loss", loss, "--output", "run", *extra)
    dim, length, matrices = 32, 16, 2 * (4 * 32 * 32 + 3 * 32 * 256) + 32 * 16
    forward = 2 * length * matrices + 2 * 4 * length**2 * dim
    for line in (disk / "run" / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        seconds = 8 / metrics["images_per_second"]
        # With dropout all pairs are run, the reference's as well.
        sequences = 16 if loss == "cca" else 8
        assert metrics["mfu"] * seconds * 1e12 == pytest.approx(passes * sequences * forward)
    assert all("mfu" in metrics for metrics in shown)


def test_nothing_is_told_on_a_cpu(disk):
    train("--output", "run")
    assert "mfu" not in (disk / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "options, others", [((), ", or --checkpointing, or "), (("--checkpointing",), ", or ")]
)
@pytest.mark.parametrize("place", ["__init__", "optimizer_step"])
def test_memory_that_runs_out_is_one_line(place, options, others, disk, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(Trainer, place, full)
    with pytest.raises(UserError) as caught:
        train("--output", "run", *options)
    assert one_line(caught.value) == (
        "--micro-batch-size: the memory does not suffice for 4 images at once "
        "(CUDA out of memory. Tried to allocate 20.00 GiB); take fewer (the results stay the same)"
        f"{others}more GPUs with --parallel fsdp. The same command goes on from the last saved state"
    )
