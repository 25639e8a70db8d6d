"""The dry run: the project's real code on a pretended GPU (benchmarks/pretended), every operator seen.

A fault is an exception, a mix of devices, a product of two precisions, the host waiting or a product in
float64 while tokens are drawn, or more waits of training than the budget. At the end faults are planted.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.pretended import runs
from benchmarks.pretended.gpu import DEVICE, pretended_gpu
from benchmarks.pretended.inductor import binaries, compiled_kernels
from benchmarks.pretended.recorder import KERNELS, Recorder
from cca.training.losses import LOSSES, Loss, cca_loss
from models.base import ARTransformer

MADE_FOR = (2, 14)
pytestmark = [
    pytest.mark.skipif(not torch.version.cuda, reason="the dry run needs a CUDA build of PyTorch"),
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < MADE_FOR,
        reason="the dry run answers for the GPU what PyTorch 2.14 asks",
    ),
]

# How often the host may wait for the GPU.
WAITS_IN_GENERATE = 0
WAITS_PER_MICRO_BATCH = {"cca": 0, "dpo": 0, "unlearning": 0, "sft": 0}
WAITS_PER_OPTIMIZER_STEP = 1  # besides those of its micro-batches
# Of compiled decoding of 64 images: kernels of the last step, drawing included, and graphs that are compiled.
COMPILED_STEPS = {
    "llamagen-b, one token": (160, 3, ("llamagen-b", 64, "bfloat16", {})),
    "llamagen-3b, heads of 100": (410, 3, ("llamagen-3b", 8, "bfloat16", {"cfg_scale": 1.65})),
    "var-d16, the last level": (220, 7, ("var-d16", 64, "float16", {"top_k": 900, "top_p": 0.96})),
}
DECODER_KERNELS = 175  # of LlamaGen's tokenizer, compiled, for a batch of the decoder's
# Of the likelihood of a chunk of tokens and of its gradient, compiled with the blocks of a training step.
LIKELIHOOD_KERNELS = {
    "LlamaGen": (5, "llamagen-b", "bfloat16"),
    "LlamaGen in float32": (5, "llamagen-b", "float32"),
    "VAR, whose head has a bias": (7, "var-d16", "float16"),
}

# Few layers where the others would be the same.
SAMPLING = {
    "LlamaGen, no guidance": ("llamagen-b", 64, "bfloat16", {"steps": 3}),
    "LlamaGen at 256, guided, top-k": ("llamagen-l", 16, "bfloat16",
        {"image_size": 256, "layers": 2, "steps": 3, "cfg_scale": 2.0, "top_k": 2000, "temperature": 0.9}),
    "LlamaGen at 512, guided for two tokens, top-p": ("llamagen-1b", 8, "float16",
        {"image_size": 512, "layers": 2, "steps": 4, "cfg_scale": 2.0, "cfg_interval": 2, "top_p": 0.9}),
    "LlamaGen in float32": ("llamagen-xl", 8, "float32", {"layers": 2, "steps": 3, "cfg_scale": 1.75}),
    "LlamaGen, heads of 100": ("llamagen-3b", 8, "bfloat16", {"layers": 2, "steps": 3, "cfg_scale": 1.65}),
    "LlamaGen, heads of 100 in float32": ("llamagen-3b", 8, "float32", {"layers": 2, "steps": 3}),
    "VAR, no guidance": ("var-d16", 64, "bfloat16", {"layers": 2}),
    "VAR, guided, top-k and top-p": ("var-d16", 50, "float16",
        {"layers": 2, "cfg_scale": 2.5, "top_k": 900, "top_p": 0.96}),
    "VAR in float32, guided for four levels": ("var-d30", 8, "float32",
        {"layers": 2, "cfg_scale": 2.5, "cfg_interval": 4}),
    "VAR at 512, shared AdaLN": ("var-d36", 4, "float16",
        {"layers": 2, "cfg_scale": 2.5, "top_k": 900, "top_p": 0.96}),
    "mini VAR": ("var-mini", 4, "float32", {"cfg_scale": 2.0}),
    "mini LlamaGen": ("llamagen-mini", 4, "bfloat16", {"cfg_scale": 2.0, "steps": 3}),
}  # fmt: skip
DECODING = {
    "VAR": ("var-d16", 40, "float16", None, None),
    "VAR at 512": ("var-d36", 9, "bfloat16", None, None),
    "LlamaGen to 256": ("llamagen-b", 20, "bfloat16", 256, None),
    "LlamaGen, finer tokenizer": ("llamagen-b", 20, "float32", None, "vq_ds8_c2i"),
}
TRAINING = {
    "LlamaGen": ("llamagen-b", 2, "bfloat16", "cca", {}),
    "LlamaGen at 256 in float32": ("llamagen-l", 2, "float32", "unlearning", {"image_size": 256}),
    "LlamaGen, heads of 100": ("llamagen-3b", 2, "bfloat16", "dpo", {}),
    "LlamaGen at 512": ("llamagen-1b", 2, "float16", "sft", {"image_size": 512, "checkpointing": True}),
    "VAR": ("var-d16", 4, "float16", "cca", {"ema": 0.99}),
    "VAR, stochastic depth": ("var-d20", 4, "float16", "unlearning", {"checkpointing": True}),
    "VAR in bfloat16": ("var-d24", 2, "bfloat16", "dpo", {}),
    "VAR at 512, shared AdaLN": ("var-d36", 2, "bfloat16", "cca", {"checkpointing": True}),
    "VAR in float32": ("var-d30", 2, "float32", "sft", {"ema": 0.99}),
}
TOKENIZERS = {
    "VAR": ("var-d16", None),
    "VAR at 512": ("var-d36", None),
    "LlamaGen": ("llamagen-b", None),
    "LlamaGen, finer": ("llamagen-b", "vq_ds8_c2i"),
}


def faults_of_sampling(recorder: Recorder) -> list[str]:
    """What a captured or compiled decoding step could not hold, by place."""
    generated = [event for event in recorder.events if event.phase == "generate"]
    waits = [f"{event.place}: {event.wait}" for event in generated if event.wait]
    double = [e for e in generated if e.flops and e.dtype == torch.float64]
    return [
        *(waits if len(waits) > WAITS_IN_GENERATE else []),
        *(f"{event.place}: {event.operator} in float64" for event in double),
    ]


def faults_of_training(recorder: Recorder, loss: str) -> list[str]:
    per_micro_batch, per_step = runs.waits_of_training(recorder)
    places = sorted({f"{event.place}: {event.wait}" for event in recorder.waits("step 1")})
    found = []
    if per_micro_batch > WAITS_PER_MICRO_BATCH[loss]:
        found = [f"the host waits {per_micro_batch} times in a micro-batch", *places]
    if per_step > WAITS_PER_OPTIMIZER_STEP:
        found += [f"the host waits {per_step} times in an optimizer step", *places]
    return found


def cases(table: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


@cases(SAMPLING)
def test_sampling(case):
    name, images, dtype, options = case
    recorder = runs.sampled(name, images, dtype, **options)
    assert any(event.flops for event in recorder.events if event.phase == "generate")
    assert faults_of_sampling(recorder) == []


@cases(DECODING)
def test_decoding(case):
    batches = len(runs.decoded(*case).waits("decode"))
    assert batches == 2  # each is copied to the host, and nothing else waits


@cases(TRAINING)
def test_training(case):
    name, micro_batch, dtype, loss, options = case
    recorder = runs.trained(name, micro_batch, dtype, loss, layers=2, **options)
    assert faults_of_training(recorder, loss) == []


@cases(TOKENIZERS)
def test_encoding(case):
    name, tokenizer = case
    assert runs.encoded(name, 20, tokenizer).waits("encode") == []


def test_extraction():
    recorder = runs.extracted("llamagen-b", images=4, crops=10, batch=16)
    assert len(recorder.waits("encode")) == 2  # the tokens of two images each time


def test_evaluation():
    recorder = runs.evaluated(images=16, size=256)
    assert len(recorder.waits("features")) == 1 + 3  # images up; features, spatial ones, probabilities down


@cases(COMPILED_STEPS)
def test_compiled_steps(case):
    kernels, graphs, (*which, options) = case
    found, writer = runs.compiled_steps(*which, **options)
    assert found <= kernels
    assert len(writer.graphs) <= graphs


def test_compiled_decoder():
    """Two parts, each compiled once for all batches."""
    writer = runs.compiled_decoder("llamagen-b", 60, "bfloat16")
    assert writer.calls == [0, 1] * (len(writer.calls) // 2)
    assert len(writer.graphs) == 2
    assert sum(graph.total() for graph in writer.graphs) <= DECODER_KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("of", [*COMPILED_STEPS, "the decoder"])
def test_kernels_become_programs(of, tmp_path, monkeypatch):
    """By Triton and NVIDIA's assembler, which need no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if of in COMPILED_STEPS:
        *_, (*which, options) = COMPILED_STEPS[of]
        _, writer = runs.compiled_steps(*which, **options)
    else:
        writer = runs.compiled_decoder("var-d16", 64, "float16")
    assert binaries(writer.sources) >= len(writer.sources) > 0
    assert list(tmp_path.rglob("*.cubin"))


@cases(LIKELIHOOD_KERNELS)
def test_kernels_of_the_compiled_likelihood(case):
    budget, *which = case
    eager, compiled = runs.kernels_of_likelihood(*which)
    assert compiled <= budget < eager


def test_compiled_kernels_are_counted():
    """Pointwise operators are one kernel, products the library's; a sum of all takes two kernels."""

    def function(x: Tensor) -> Tensor:
        y = (x.sin() + 1) @ x
        return (y - y.sum()).cos().topk(5).values

    with pretended_gpu():
        found = compiled_kernels(function, [torch.zeros(512, 512, device=DEVICE)])
    assert found == {"triton": 4, "mm": 1, "topk": KERNELS["topk"]}


# Faults, planted where logits are made. The check must see each.


def of_two_precisions(logits: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        return logits[0].half() @ logits[0].float().T


PLANTED = {
    "item": (lambda logits: logits.sum().item(), "item"),
    "nonzero": (lambda logits: (logits > 0).nonzero(), "nonzero"),
    "mask as index": (lambda logits: logits[logits > 0], "boolean index"),
    "copy to the host": (lambda logits: logits.cpu(), "copy to the host"),
    "upload": (lambda logits: torch.tensor([1.0], device=logits.device), "upload"),
    "float64": (lambda logits: logits[0].double() @ logits[0].double().T, "float64"),
    "index on the CPU": (lambda logits: logits[torch.zeros(1, dtype=torch.int64)], "CPU tensor"),
}
RAISING = {
    "CPU tensor": (lambda logits: logits + torch.ones(1), "found at least two devices|found two different"),
    "two precisions": (of_two_precisions, "same dtype|of torch.float16 and torch.float32"),
}


@pytest.fixture
def plant(monkeypatch):
    def where_logits_are_made(fault) -> None:
        own = ARTransformer.to_logits

        def to_logits(self, hidden):
            logits = own(self, hidden)
            fault(logits)
            return logits

        monkeypatch.setattr(ARTransformer, "to_logits", to_logits)

    return where_logits_are_made


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("model", ["llamagen-mini", "var-mini"])
def test_a_fault_in_sampling_is_seen(name, model, plant):
    fault, message = PLANTED[name]
    plant(fault)
    found = faults_of_sampling(runs.sampled(model, 4, "bfloat16", steps=2))
    assert found and all(message in line and line.startswith("models/") for line in found)


@pytest.mark.parametrize("name", RAISING)
def test_a_mix_in_sampling_raises(name, plant):
    fault, message = RAISING[name]
    plant(fault)
    with pytest.raises(RuntimeError, match=message):
        runs.sampled("llamagen-mini", 4, "bfloat16", steps=2)


def test_a_wait_in_training_is_seen(monkeypatch):
    def waiting_loss(reward, *others):
        reward.detach().mean().item()
        return cca_loss(reward, *others)

    before = runs.trained("var-mini", 2, "float16", "cca")
    monkeypatch.setitem(LOSSES, "cca", Loss(waiting_loss))
    after = runs.trained("var-mini", 2, "float16", "cca")
    monkeypatch.setitem(WAITS_PER_MICRO_BATCH, "cca", runs.waits_of_training(before)[0])
    assert faults_of_training(before, "cca") == []
    assert "times in a micro-batch" in faults_of_training(after, "cca")[0]
