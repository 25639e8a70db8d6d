"""The dry run: the project's real code on a GPU that is not there (``fake_gpu``), every operator seen.

A fault is an exception (a mix of devices among them), the host waiting while tokens are drawn, more waits of
an optimizer step than the budget, or more graphs of what is compiled. At the end faults are planted.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from fake_gpu import GPU, Recorder, fake_gpu, fake_model
from torch import Tensor

from benchmarks.workloads import random_batch, recipe_config
from cca.distributed import Processes
from cca.sampling.cuda_graphs import CompiledGenerate, compiled_decoding
from cca.training.trainer import Trainer
from models import DTYPES, SamplingOptions, autocast
from models.base import ARTransformer
from models.sampling import generate_tokens

pytestmark = pytest.mark.skipif(not torch.version.cuda, reason="the dry run needs a CUDA build of PyTorch")

# How often the host may wait for the GPU.
WAITS_IN_GENERATE = 0
WAITS_PER_OPTIMIZER_STEP = 1  # none of them of a micro-batch
# Of compiled decoding: graphs that are compiled.
COMPILED_STEPS = {
    "llamagen-b, one token": (3, "llamagen-b", 64, "bfloat16", SamplingOptions()),
    "llamagen-3b, heads of 100": (3, "llamagen-3b", 8, "bfloat16", SamplingOptions(1.65)),
    "var-d16, the last level": (7, "var-d16", 64, "float16",
        SamplingOptions(1.0, "linear", top_k=900, top_p=0.96)),
}  # fmt: skip
# Few layers where the others would be the same.
SAMPLING = {
    "LlamaGen, no guidance": ("llamagen-b", 64, "bfloat16", SamplingOptions()),
    "LlamaGen in float32": ("llamagen-xl", 8, "float32", SamplingOptions(1.75)),
    "LlamaGen, heads of 100": ("llamagen-3b", 8, "bfloat16",
        SamplingOptions(2.0, cfg_interval=2, top_p=0.9, temperature=0.9)),
    "VAR, guided, top-k and top-p": ("var-d16", 50, "float16",
        SamplingOptions(2.5, "linear", top_k=900, top_p=0.96)),
    "VAR in float32, guided for four levels": ("var-d30", 8, "float32", SamplingOptions(2.5, cfg_interval=4)),
    "VAR at 512, shared AdaLN": ("var-d36", 4, "bfloat16", SamplingOptions()),
}  # fmt: skip
TRAINING = {
    "LlamaGen": ("llamagen-b", "bfloat16", "cca", {}),
    "LlamaGen in float32": ("llamagen-l", "float32", "unlearning", {}),
    "LlamaGen, heads of 100": ("llamagen-3b", "float16", "sft", {"checkpointing": True}),
    "VAR": ("var-d16", "float16", "cca", {}),
    "VAR, stochastic depth": ("var-d20", "bfloat16", "dpo", {"checkpointing": True}),
    "VAR at 512, shared AdaLN": ("var-d36", "float32", "cca", {}),
}


def cases(table: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


def waits_of_sampling(name: str, images: int, dtype: str, options: SamplingOptions) -> list[str]:
    """Of the first steps of a batch, eager, in a model of two blocks."""
    with fake_gpu():
        model = fake_model(name, layers=2)
        model.transformer.store_matrices(DTYPES[dtype])
        model.step_sizes = model.step_sizes[:10]
        labels = torch.zeros(images, dtype=torch.int64, device=GPU)
        uniforms = torch.zeros(images, model.sequence_length, dtype=torch.float64, device=GPU)
        with Recorder() as recorder, autocast(GPU, dtype):
            tokens = generate_tokens(model, labels, uniforms, options)
        assert tokens.shape == (images, model.sequence_length) and tokens.device == GPU
    return recorder.waits


def waits_of_training(name: str, dtype: str, loss: str, **options) -> list[str]:
    """Of a second optimizer step, on two micro-batches of two images; ``options`` of Trainer."""
    processes = Processes()
    processes.device = GPU
    with fake_gpu():
        config = recipe_config(name, 4, dtype, loss=loss, ema=0.99)
        trainer = Trainer(fake_model(name, layers=2), config, 2, processes, **options)
        batch = random_batch(trainer.model, torch.zeros(4, dtype=torch.bool))
        for step in range(2):
            with Recorder() as recorder:
                metrics = trainer.optimizer_step(step, batch)
        assert "loss" in metrics and trainer.skipped == 0
        assert all(parameter.device == GPU for parameter in trainer.net.parameters())
    return recorder.waits


@cases(SAMPLING)
def test_sampling(case):
    waits = waits_of_sampling(*case)
    assert len(waits) <= WAITS_IN_GENERATE, waits


@cases(TRAINING)
def test_training(case):
    *which, options = case
    waits = waits_of_training(*which, **options)
    assert len(waits) <= WAITS_PER_OPTIMIZER_STEP, waits


@cases(COMPILED_STEPS)
def test_compiled_steps(case):
    """Traced without a break, in as many graphs; of all steps one is called in each stage."""
    most, name, images, dtype, options = case
    graphs = []

    def backend(module, inputs, options=None):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    with fake_gpu():
        model = fake_model(name).requires_grad_(False)
        model.transformer.store_matrices(DTYPES[dtype])
        with compiled_decoding():
            for stage, _ in CompiledGenerate(model, options, dtype, images, GPU, backend).stages():
                stage()
    assert 0 < len(graphs) <= most


# Faults, planted where logits are made. The check must see each.
PLANTED = {
    "item": (lambda logits: logits.sum().item(), "_local_scalar_dense"),
    "nonzero": (lambda logits: (logits > 0).nonzero(), "nonzero"),
    "copy to the host": (lambda logits: logits.cpu(), "of CPU and GPU"),
    "upload": (lambda logits: torch.tensor([1.0], device=logits.device), "of CPU and GPU"),
    "index on the CPU": (lambda logits: logits[torch.zeros(1, dtype=torch.int64)], "of CPU and GPU"),
}


def plant(fault: Callable[[Tensor], object]) -> AbstractContextManager:
    own = ARTransformer.to_logits

    def to_logits(self, hidden: Tensor) -> Tensor:
        logits = own(self, hidden)
        fault(logits)
        return logits

    return mock.patch.object(ARTransformer, "to_logits", to_logits)


@pytest.mark.parametrize("name", ["llamagen-mini", "var-mini"])
@cases(PLANTED)
def test_a_wait_in_sampling_is_seen(case, name):
    fault, message = case
    with plant(fault):
        waits = waits_of_sampling(name, 4, "bfloat16", SamplingOptions())
    assert waits and all(message in wait and "models/" in wait for wait in waits)


def test_a_mix_in_sampling_raises():
    wrong = pytest.raises(RuntimeError, match="found at least two devices|found two different")
    with plant(lambda logits: logits + torch.ones(1)), wrong:
        waits_of_sampling("llamagen-mini", 4, "bfloat16", SamplingOptions())
