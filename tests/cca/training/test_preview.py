"""Sample grids that a run writes during training (--sample-every)."""

import weakref

import torch
from specimens import weights

import cca.training.loop as command
import train_llamagen_cca
from cca.sampling.sampler import Sampler


def test_out_of_memory_skips_one_sample_grid(disk, monkeypatch, capsys):
    caches, live_caches, tokens = [], [], Sampler.tokens

    def fail_once(*arguments):
        if len(caches) == 1:
            return tokens(*arguments)
        cache = torch.zeros(1)
        caches.append(weakref.ref(cache))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    log = command.RunFolder.log

    def record_live_caches(*arguments):
        live_caches.extend(cache() for cache in caches)
        log(*arguments)

    monkeypatch.setattr(Sampler, "tokens", fail_once)
    monkeypatch.setattr(command.RunFolder, "log", record_live_caches)
    options = ["--max-steps", "3", "--batch-size", "8", "--sample-every", "1"]
    train_llamagen_cca.main([*weights("llamagen"), "--codes", "codes", *options, "--output", "run"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "no sample grid" in line]
    assert "step-000001.png: --sample-every: 16 images" in line and "--micro-batch-size" in line
    assert live_caches == [None, None]  # the later steps do not keep the memory of the failed grid
    pictures = sorted(path.name for path in (disk / "run" / "samples").iterdir())
    assert pictures == ["step-000002.png", "step-000003.png"]
