"""Defaults of sampling on a GPU, and errors when GPU memory runs out; no GPU is needed."""

import os

import pytest
import torch
from limits import memory_full

import sample
from cca.config import SampleRequest
from cca.sampling import sampler
from cca.sampling.batch_size import (
    COMPILED_FROM,
    CPU_BATCH,
    bytes_per_image,
    compiles_by_default,
    default_batch_size,
)
from models import SamplingOptions, UserError
from models.base import ARTransformer
from models.utils.errors import one_line
from models.zoo.loading import build_model

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MODELS = {name: build_model(name) for name in ("llamagen-3b", "llamagen-b", "var-d16")}


def request(dtype="bfloat16", cfg_scale=1.0, images=50_000):
    return SampleRequest(images, (0,), "balanced", 0, None, dtype, SamplingOptions(cfg_scale))


def set_free_memory(monkeypatch, free: float) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 2**40))


def test_default_batch_size(monkeypatch):
    """llamagen-3b in 24 GB, in bfloat16: 6 GB of weights, and 0.2 GB of cache per image without guidance."""
    model = MODELS["llamagen-3b"]
    cache = 2 * 577 * 24 * 3200 * 2  # keys and values of 577 positions (the class, 576 tokens) and 24 blocks
    assert bytes_per_image(model, request()) == pytest.approx(cache, rel=0.02)
    set_free_memory(monkeypatch, 24e9)
    sizes = [default_batch_size(model, request(dtype, scale), GPU)
             for dtype in ("bfloat16", "float32") for scale in (1, 2)]  # fmt: skip
    assert sizes == [32, 16, 16, 8]
    set_free_memory(monkeypatch, 1e9)  # less than the weights
    assert default_batch_size(model, request(), GPU) == 1
    set_free_memory(monkeypatch, 1e12)
    assert default_batch_size(model, request(), GPU) == 256
    assert default_batch_size(model, request(), CPU) == CPU_BATCH == 64


@pytest.mark.parametrize("name", MODELS)
def test_default_of_compilation(name):
    """By default, a run is compiled on a GPU if each rank samples enough images; on a CPU, no run is."""
    model = MODELS[name]
    least = COMPILED_FROM[model.steps_alike]
    assert least == (10_000 if name.startswith("var") else 1_000)
    for images, device, world_size, compiled in (
        (least, GPU, 1, True),
        (least - 1, GPU, 1, False),
        (8 * least, GPU, 8, True),
        (8 * least - 1, GPU, 8, False),
        (10**6, CPU, 1, False),
    ):
        assert compiles_by_default(model, request(images=images), device, world_size) == compiled


@pytest.mark.parametrize(
    "place, options, message",
    [
        ("store_matrices", (), "--model: the model does not fit in"),
        ("generate_tokens", (), "--batch-size: 8 images at once do not fit in"),
        ("to_pixels", (), "--model: decoding does not fit in"),
        ("to_pixels", ("--compile",), "--batch-size: 8 images at once do not fit in"),
        ("CompiledGenerate", ("--compile",), "--batch-size: 8 images at once do not fit in"),
    ],
)
def test_out_of_memory_is_one_line(place, options, message, tmp_path, monkeypatch):
    """The message names the option to change, and the command leaves nothing on disk."""
    if place == "to_pixels":  # this test does not need compiled code
        eager = lambda model, *_: sampler.eager_generate(model, request("float32"))  # noqa: E731
        monkeypatch.setattr(sampler, "CompiledGenerate", eager)
    owner = ARTransformer if place == "store_matrices" else sampler
    monkeypatch.setattr(owner, place, memory_full)
    fixed = ["--model", "llamagen-mini", "--num-samples", "24", "--batch-size", "8"]
    with pytest.raises(UserError) as caught:
        sample.main([*fixed, "--output", str(tmp_path / "s.npz"), *options])
    text = one_line(caught.value)
    assert text.startswith(message) and "(CUDA out of memory. Tried to allocate 20.00 GiB); " in text
    assert not os.listdir(tmp_path)
