"""GPU speed (mfu) and GPU memory in training, simulated on a machine without a GPU."""

from types import SimpleNamespace

import pytest
import torch
from commands import metrics
from limits import memory_full
from specimens import weights

import cca.training.loop as loop
import train_llamagen_cca
from cca.training.memory import peak_rate
from cca.training.setup import Training
from cca.training.trainer import Trainer
from models.utils.errors import UserError, one_line

GPU = torch.device("cuda", 0)


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
def test_peak_rate_of_gpus(name, rate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_rate(GPU) == rate and peak_rate(torch.device("cpu")) is None


@pytest.mark.parametrize("loss, passes", [("cca", 4), ("sft", 3)])
def test_mfu(loss, passes, disk, monkeypatch):
    monkeypatch.setattr(loop, "peak_rate", lambda device: 1e12)
    shown, own = [], loop.show
    monkeypatch.setattr(loop, "show", lambda *args: (shown.append(args[1]), own(*args)))
    train("--loss", loss, "--output", "run", *(["--lr", "1e-3"] if loss == "sft" else []))
    dim, length, linear_weights = 32, 16, 2 * (4 * 32 * 32 + 3 * 32 * 256) + 32 * 16
    forward = 2 * length * linear_weights + 2 * 4 * length**2 * dim
    for line in metrics(disk / "run"):
        seconds = 8 / line["images_per_second"]
        # With dropout, all entries run under their negative class too, also in the reference.
        sequences = 16 if loss == "cca" else 8
        assert line["mfu"] * seconds * 1e12 == pytest.approx(passes * sequences * forward)
    assert all("mfu" in line for line in shown)


@pytest.mark.parametrize(
    "place, option, remedy",
    [
        ("__init__", "--model", "--parallel fsdp"),
        ("optimizer_step", "--micro-batch-size", "--checkpointing"),
    ],
)
def test_out_of_memory_is_one_line_error(place, option, remedy, disk, monkeypatch):
    monkeypatch.setattr(Trainer, place, memory_full)
    with pytest.raises(UserError) as caught:
        train("--output", "run")
    message = one_line(caught.value)
    assert message.startswith(f"{option}: ") and remedy in message and "allocate 20.00 GiB" in message


def simulate_memory(monkeypatch, each: float, total: float):
    """Simulate a GPU of ``total`` bytes where each image of a micro-batch takes ``each`` bytes.

    Return a list to which every forward pass adds its number of images.
    """
    sizes = []
    micro_loss = Trainer.micro_loss

    def record_size(trainer, batch):
        sizes.append(len(batch))
        if each * len(batch) > total:
            memory_full()
        return micro_loss(trainer, batch)

    monkeypatch.setattr(Trainer, "micro_loss", record_size)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: int(each * sizes[-1]))
    properties = SimpleNamespace(total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return sizes


@pytest.mark.parametrize("each, chosen, tried", [(15e6, 4, [2, 2, 4]), (60e6, 1, [2])])
def test_default_micro_batch_fits_memory(each, chosen, tried, disk, monkeypatch):
    """The size is measured before the first step, and the measurement does not change the weights."""
    sizes = simulate_memory(monkeypatch, each, 100e6)
    work = Training.work

    def measured_work(job, content):
        job.micro_batch_size = None
        return work(job, content)

    monkeypatch.setattr(Training, "work", measured_work)
    arguments = ["--codes=codes", "--max-steps", "2", "--batch-size", "8", "--output", "measured"]
    train_llamagen_cca.main([*weights("llamagen"), *arguments])
    assert sizes == [*tried, *[chosen] * (2 * 8 // chosen)]
    assert not any("mfu" in line for line in metrics(disk / "measured"))  # the peak rate of a CPU is unknown
    if chosen == 4:  # bit-identical to a run with --micro-batch-size 4
        train("--output", "given")
        explicit, measured = (
            torch.load(f"{name}/model.pt", weights_only=True) for name in ("given", "measured")
        )
        assert all(torch.equal(explicit["model"][key], measured["model"][key]) for key in explicit["model"])
