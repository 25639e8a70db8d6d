"""Dry run of the project's code on a simulated GPU (``fake_gpu``), which sees every operator.

The tests fail on exceptions (such as a mix of devices) and if the host waits for the GPU while tokens are
sampled. They also limit the waits of an optimizer step and the kernels of compiled code. The last test plants
faults in the code and checks that they are detected.
"""

import pytest
import torch
from fake_gpu import GPU, Recorder, Writer, fake_gpu, fake_model

from benchmarks.workloads import random_batch, recipe_config
from cca.distributed import Ranks
from cca.sampling.cuda_graphs import ROUNDED_AS_EAGER, CompiledGenerate, compiled_decoding
from cca.sampling.sampler import prepare
from cca.training.trainer import Trainer
from models import SamplingOptions, autocast
from models.autoencoder import GroupNorm
from models.base import ARTransformer
from models.sampling import generate_tokens

pytestmark = pytest.mark.skipif(not torch.version.cuda, reason="the dry run needs a CUDA build of PyTorch")

# How often the host may wait for the GPU.
WAITS_IN_GENERATE = 0
WAITS_PER_OPTIMIZER_STEP = 1  # no micro-batch waits
# Compiled decoding: (limit on the kernels of the last step, sampling included; limit on the compiled graphs;
# model; batch size; precision; options).
COMPILED_STEPS = {
    "llamagen-b, one token": (148, 3, "llamagen-b", 64, "bfloat16", SamplingOptions()),
    "llamagen-3b, heads of 100": (358, 3, "llamagen-3b", 8, "bfloat16", SamplingOptions(1.65)),
    "var-d16, the last level": (220, 7, "var-d16", 64, "float16",
        SamplingOptions(1.0, "linear", top_k=900, top_p=0.96)),
}  # fmt: skip
# (Model, batch size, precision, options). Two blocks of each model run: more would run the same operators.
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
TRAINING = {  # (model, precision, loss, whether blocks are recomputed in the backward pass)
    "LlamaGen": ("llamagen-b", "bfloat16", "cca", False),
    "LlamaGen in float32": ("llamagen-l", "float32", "unlearning", False),
    "LlamaGen, heads of 100": ("llamagen-3b", "float16", "sft", True),
    "VAR": ("var-d16", "float16", "cca", False),
    "VAR, stochastic depth": ("var-d20", "bfloat16", "dpo", True),
    "VAR at 512, shared AdaLN": ("var-d36", "float32", "cca", False),
}


def parametrize_cases(table: dict, slow: str = "") -> pytest.MarkDecorator:
    """Return the decorator that runs a test on each row of a table. ``slow``: the row to mark as slow."""
    marks = {slow: pytest.mark.slow}
    rows = [pytest.param(case, id=name, marks=marks.get(name, ())) for name, case in table.items()]
    return pytest.mark.parametrize("case", rows)


def check_sampling(name: str, images: int, dtype: str, options: SamplingOptions) -> None:
    """Run up to ten eager decoding steps of a model of two blocks, and assert that the host does not wait."""
    with fake_gpu():
        model = fake_model(name, layers=2)
        prepare(model, dtype, GPU)
        model.step_sizes = model.step_sizes[:10]
        labels = torch.zeros(images, dtype=torch.int64, device=GPU)
        uniforms = torch.zeros(images, model.sequence_length, dtype=torch.float64, device=GPU)
        with Recorder() as recorder, autocast(GPU, dtype):
            tokens = generate_tokens(model, labels, uniforms, options)
        assert tokens.shape == (images, model.sequence_length) and tokens.device == GPU
    assert len(recorder.waits) <= WAITS_IN_GENERATE, recorder.waits


@parametrize_cases(SAMPLING)
def test_sampling_does_not_wait(case):
    check_sampling(*case)


@parametrize_cases(TRAINING)
def test_waits_of_optimizer_step(case):
    """Check the second of two optimizer steps, on two micro-batches of two images."""
    name, dtype, loss, checkpointing = case
    ranks, config = Ranks(), recipe_config(name, 4, dtype, loss=loss, ema=0.99)
    ranks.device = GPU
    with fake_gpu():
        model = fake_model(name, layers=2)
        model.transformer.checkpointing = checkpointing
        trainer = Trainer(model, config, 2, ranks)
        batch = random_batch(model, torch.zeros(4, dtype=torch.bool))
        for step in range(2):
            with Recorder() as recorder:
                metrics = trainer.optimizer_step(step, batch)
        assert "loss" in metrics and trainer.skipped == 0
    assert len(recorder.waits) <= WAITS_PER_OPTIMIZER_STEP, recorder.waits


@parametrize_cases(COMPILED_STEPS, slow="llamagen-3b, heads of 100")
def test_kernels_of_compiled_step(case, monkeypatch):
    budget, graphs, name, images, dtype, options = case
    writer, recorder = Writer(), Recorder()
    torch._dynamo.reset()
    with fake_gpu():
        model = fake_model(name).requires_grad_(False)
        prepare(model, dtype, GPU, compile=True)
        eager = model.block_arguments

        def block_arguments(*arguments):  # eager code between the compiled parts
            with recorder:
                return eager(*arguments)

        with compiled_decoding():
            *others, (last, _) = CompiledGenerate(model, options, dtype, images, GPU, writer).stages()
            for stage, _ in others:
                stage()
            writer.kernels = 0
            monkeypatch.setattr(model, "block_arguments", block_arguments)
            last()
    assert budget / 2 < writer.kernels + recorder.kernels <= budget
    assert len(writer.graphs) <= graphs


@pytest.mark.slow
@pytest.mark.parametrize("by_channel", [True, False], ids=["as it is", "PyTorch's own normalisation"])
def test_compiled_decoder_keeps_layout(by_channel, monkeypatch):
    """All layers use one memory layout, so no kernel transposes. With PyTorch's GroupNorm some kernels do."""
    if not by_channel:
        monkeypatch.setattr(GroupNorm, "forward", torch.nn.GroupNorm.forward)
    writer = Writer()
    torch._dynamo.reset()
    with fake_gpu():
        model = fake_model("var-d16").requires_grad_(False)
        prepare(model, "float16", GPU, compile=True)
        for child in model.tokenizer.children():
            child.compile(dynamic=False, backend=writer, options=ROUNDED_AS_EAGER)
        tokens = torch.zeros(32, model.sequence_length, dtype=torch.int64, device=GPU)
        with autocast(GPU, "float16"), torch.inference_mode():
            model.decode(tokens)
    assert (writer.transposed == 0) == by_channel


# (A fault to add where logits are computed, the message that the check must give).
PLANTED = {
    "item": (lambda logits: logits.sum().item(), "item in .*models/"),
    "nonzero": (lambda logits: (logits > 0).nonzero(), "nonzero in .*models/"),
    "copy to the host": (lambda logits: logits.cpu(), "to of CPU and GPU in .*models/"),
    "upload": (lambda logits: torch.ones(1).to(logits.device), "to of CPU and GPU in .*models/"),
    "index on the CPU": (lambda logits: logits[torch.zeros(1, dtype=torch.int64)], "index of CPU and GPU"),
    "mix of devices": (
        lambda logits: logits + torch.ones(1),
        "found at least two devices|found two different",
    ),
}


@pytest.mark.parametrize("name", ["llamagen-mini", "var-mini"])
@parametrize_cases(PLANTED)
def test_planted_fault_is_detected(case, name, monkeypatch):
    (fault, message), own = case, ARTransformer.to_logits

    def to_logits(self, hidden):
        logits = own(self, hidden)
        fault(logits)
        return logits

    monkeypatch.setattr(ARTransformer, "to_logits", to_logits)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_sampling(name, 4, "bfloat16", SamplingOptions())
