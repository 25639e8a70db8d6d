"""The limits against what the code does, operator by operator, on a pretended GPU."""

import pytest
import torch
from benchmarks.pretended import runs

from benchmarks import limits
from models import SamplingOptions
from models.zoo.loading import build_model

pytestmark = pytest.mark.skipif(
    not torch.version.cuda or torch.__version__ < "2.14", reason="what the pretended GPU is made for"
)
NAMES = ("llamagen-mini", "var-mini")


def flops_of(recorder, phase):
    return sum(event.flops for event in recorder.events if event.phase == phase)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_sampling(name, scale):
    """All but VAR's small products outside the blocks."""
    model = build_model(name)
    model.step_sizes = model.step_sizes[:6]
    done = flops_of(runs.sampled(name, 4, "bfloat16", steps=6, cfg_scale=scale), "generate")
    assert 0.95 < limits.sampling(model, 4, SamplingOptions(scale)).flops / done <= 1


@pytest.mark.parametrize("name", NAMES)
def test_training(name):
    """The trainer makes the logits twice, and attention of LlamaGen is counted with what it masks."""
    done = flops_of(runs.trained(name, 2, "bfloat16", "cca"), "step 1")
    assert 0.85 < limits.training(build_model(name), 4, micro_batches=2).flops / done <= 1


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers(name):
    """All but attention, which stands in another operator there, and the codebook's."""
    for encode, recorder, images in (
        (False, runs.decoded(name, 64, "float32"), 64),
        (True, runs.encoded(name, 4), 4),
    ):
        done = flops_of(recorder, "encode" if encode else "decode")
        assert 0.95 < limits.tokenizer(name, None, encode, images, 4).flops / done <= 1


def test_bytes():
    """Each token of LlamaGen reads all weights, keys and values; guidance only the latter once more."""
    model = build_model("llamagen-mini")
    weights = sum(p.numel() for p in model.transformer.layers.parameters() if p.ndim == 2) + 512 * 64
    cache = sum(2 * 2 * 64 * seen * 2 for seen in range(1, 65))  # 2 layers of 64, 2 bytes
    one = limits.sampling(model, 1, SamplingOptions())
    assert one.bytes == 64 * 4 * weights + cache
    assert limits.sampling(model, 1, SamplingOptions(2.0)).bytes == one.bytes + cache
    assert limits.Card(1e12, 1e15).shares(limits.Work(5e11, 1e14), seconds=1.0) == (0.5, 0.1)
