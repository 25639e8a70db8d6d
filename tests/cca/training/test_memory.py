"""What is told of a GPU, on a machine that has none."""

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
def test_rates_of_gpus(name, rate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_rate(GPU) == rate and peak_rate(torch.device("cpu")) is None


@pytest.mark.parametrize("loss, passes", [("cca", 4), ("sft", 3)])
def test_share_of_the_rate(loss, passes, disk, monkeypatch):
    monkeypatch.setattr(loop, "peak_rate", lambda device: 1e12)
    shown, own = [], loop.show
    monkeypatch.setattr(loop, "show", lambda *given: (shown.append(given[1]), own(*given)))
    train("--loss", loss, "--output", "run", *(["--lr", "1e-3"] if loss == "sft" else []))
    dim, length, matrices = 32, 16, 2 * (4 * 32 * 32 + 3 * 32 * 256) + 32 * 16
    forward = 2 * length * matrices + 2 * 4 * length**2 * dim
    for line in metrics(disk / "run"):
        seconds = 8 / line["images_per_second"]
        # With dropout all pairs are run, the reference's as well.
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
def test_memory_that_runs_out_is_one_line(place, option, remedy, disk, monkeypatch):
    monkeypatch.setattr(Trainer, place, memory_full)
    with pytest.raises(UserError) as caught:
        train("--output", "run")
    message = one_line(caught.value)
    assert message.startswith(f"{option}: ") and remedy in message and "allocate 20.00 GiB" in message


def pretend_memory(monkeypatch, each: float, total: float):
    """A GPU that a micro-batch takes so many bytes of for each image."""
    run = []
    micro_loss = Trainer.micro_loss

    def noted(trainer, batch):
        run.append(len(batch))
        if each * len(batch) > total:
            memory_full()
        return micro_loss(trainer, batch)

    monkeypatch.setattr(Trainer, "micro_loss", noted)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: int(each * run[-1]))
    properties = SimpleNamespace(total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return run


@pytest.mark.parametrize("each, chosen, tried", [(15e6, 4, [2, 2, 4]), (60e6, 1, [2])])
def test_the_chosen_micro_batch(each, chosen, tried, disk, monkeypatch):
    """It is measured before the first step, which it leaves as it was."""
    run = pretend_memory(monkeypatch, each, 100e6)
    work = Training.work

    def measured_work(job, content):
        job.micro_batch_size = None
        return work(job, content)

    monkeypatch.setattr(Training, "work", measured_work)
    arguments = ["--codes=codes", "--max-steps", "2", "--batch-size", "8", "--output", "measured"]
    train_llamagen_cca.main([*weights("llamagen"), *arguments])
    assert run == [*tried, *[chosen] * (2 * 8 // chosen)]
    assert not any("mfu" in line for line in metrics(disk / "measured"))  # nothing is known of a CPU
    if chosen == 4:  # as given: the same numbers to the last bit
        train("--output", "given")
        given, measured = (
            torch.load(f"{name}/model.pt", weights_only=True) for name in ("given", "measured")
        )
        assert all(torch.equal(given["model"][key], measured["model"][key]) for key in given["model"])
