"""Pictures that a run draws on its way."""

import weakref

import torch
from specimens import weights

import cca.training.loop as command
import train_llamagen_cca
from cca.sampling.sampler import Sampler


def test_memory_that_runs_out_costs_a_picture_and_not_the_run(disk, monkeypatch, capsys):
    held, alive, tokens = [], [], Sampler.tokens

    def full(*arguments):
        if len(held) == 1:
            return tokens(*arguments)
        cache = torch.zeros(1)
        held.append(weakref.ref(cache))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    log = command.RunFolder.log

    def noted(*arguments):
        alive.extend(cache() for cache in held)
        log(*arguments)

    monkeypatch.setattr(Sampler, "tokens", full)
    monkeypatch.setattr(command.RunFolder, "log", noted)
    options = ["--max-steps", "3", "--batch-size", "8", "--sample-every", "1"]
    train_llamagen_cca.main([*weights("llamagen"), "--codes", "codes", *options, "--output", "run"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "no sample grid" in line]
    assert "step-000001.png: --sample-every: 16 images" in line and "--micro-batch-size" in line
    assert alive == [None, None]  # in the steps that followed
    pictures = sorted(path.name for path in (disk / "run" / "samples").iterdir())
    assert pictures == ["step-000002.png", "step-000003.png"]
