"""The least that batches take, against what the code does, operator by operator."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.workloads import (
    random_batch,
    random_model,
    recipe_config,
    sampling_work,
    tokenizer_work,
    training_work,
)
from cca.distributed import Processes
from cca.training.trainer import Trainer
from models import SamplingOptions
from models.loading import build_model

CPU = torch.device("cpu")
NAMES = ("llamagen-mini", "var-mini")
aten = torch.ops.aten


def counter() -> FlopCounterMode:
    """With attention of CPUs, which PyTorch does not count."""
    forward = flop_registry[aten._scaled_dot_product_flash_attention]
    backward = flop_registry[aten._scaled_dot_product_flash_attention_backward]
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_sampling(name, scale):
    """All but VAR's small matmuls outside the blocks."""
    model, options = random_model(name, CPU), SamplingOptions(scale)
    labels, uniforms = torch.arange(4), torch.rand(4, model.sequence_length)
    with counter() as done:
        model.generate(labels, uniforms, options)
    assert 0.95 < sampling_work(model, 4, options).flops / done.get_total_flops() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_training(name):
    """The trainer makes the logits twice, and attention of LlamaGen is counted with what it masks."""
    model = random_model(name, CPU)
    trainer = Trainer(model, recipe_config(name, 4, "float32"), 2, Processes())
    with counter() as done:
        trainer.optimizer_step(0, random_batch(model, torch.zeros(4, dtype=torch.bool)))
    assert 0.85 < training_work(model, 4, 2, torch.float32).flops / done.get_total_flops() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers(name):
    """All but the codebook's matmuls, which the limits of decoding do not have."""
    model = random_model(name, CPU)
    pixels = torch.zeros(2, 3, model.image_size, model.image_size)
    tokens = torch.zeros(2, model.sequence_length, dtype=torch.int64)
    for encode, run, given in ((True, model.encode, pixels), (False, model.decode, tokens)):
        with torch.no_grad(), counter() as done:
            run(given)
        expected = tokenizer_work(name, None, encode, 2, torch.float32).flops
        assert 0.95 < expected / done.get_total_flops() <= 1


def test_bytes():
    """Each token of LlamaGen reads all weights, keys and values; guidance only the latter once more."""
    model = build_model("llamagen-mini")
    weights = sum(p.numel() for p in model.transformer.layers.parameters() if p.ndim == 2) + 512 * 64
    cache = sum(2 * 2 * 64 * seen * 2 for seen in range(1, 65))  # 2 layers of 64, 2 bytes
    one = sampling_work(model, 1, SamplingOptions())
    assert one.bytes == 64 * 4 * weights + cache
    assert sampling_work(model, 1, SamplingOptions(2.0)).bytes == one.bytes + cache
