"""What fits in a GPU's memory, on a machine that has none."""

import os

import cca.sampling.sample_file as sample_file
import pytest
import torch

import sample
from cca.sampling.fitting import (
    COMPILED_FROM,
    CPU_BATCH,
    MEMORY_SHARE,
    batch_too_large,
    compiles_by_default,
    default_batch_size,
    model_too_large,
    row_bytes,
    sampling_memory,
)
from cca.sampling.sampler import SampleRequest
from models import SamplingOptions, UserError
from models.errors import one_line
from models.loading import build_model

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MODELS = {name: build_model(name) for name in ("llamagen-3b", "llamagen-b", "var-d16")}


def request(dtype="bfloat16", cfg_scale=1.0, images=50_000):
    return SampleRequest(images, (0,), "balanced", 0, None, dtype, SamplingOptions(cfg_scale))


def pretend(monkeypatch, free: float) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), 2**40))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "rows, images", [(-1e9, 1), (0, 1), (0.5, 1), (1.01, 1), (63.9, 32), (64.1, 64), (255, 128), (1e6, 256)]
)
def test_the_batch_that_fits_beside_the_weights(name, rows, images, monkeypatch):
    """rows: what is free beside the weights, as so many images that take MEMORY_SHARE of it."""
    model, asked = MODELS[name], request(cfg_scale=2.0)
    weights = sampling_memory(model, asked, 0)
    pretend(monkeypatch, max(weights + rows * row_bytes(model, asked) / MEMORY_SHARE, 0))
    assert default_batch_size(model, asked, GPU) == images


def test_the_weights_and_caches_of_a_known_model(monkeypatch):
    """llamagen-3b in 24 GB: 6 GB of weights in bfloat16, and of a guided image 0.2 GB of keys and values."""
    model = MODELS["llamagen-3b"]
    weights = sampling_memory(model, request(), 0)
    assert 3.0e9 * 2 < weights < 3.3e9 * 2 + 1e9
    cache = 2 * 577 * 24 * 3200 * 2  # keys and values of 577 positions (the class, 576 tokens) and 24 blocks
    assert row_bytes(model, request()) == pytest.approx(cache, rel=0.02)
    pretend(monkeypatch, 24e9)
    sizes = [default_batch_size(model, request(dtype, scale), GPU)
             for dtype in ("bfloat16", "float32") for scale in (1, 2)]  # fmt: skip
    assert sizes == [32, 16, 16, 8]
    assert default_batch_size(model, request(), CPU) == CPU_BATCH == 64


@pytest.mark.parametrize("failed, rows, fits", [(256, 70, 64), (256, 1e6, 128), (9, 1e6, 4), (2, 0, 1)])
def test_the_advice_is_what_fits_and_below_what_failed(failed, rows, fits):
    model, asked = MODELS["llamagen-b"], request()
    free = int(rows * row_bytes(model, asked) / MEMORY_SHARE)
    assert batch_too_large("llamagen-b", model, asked, failed, free) == (
        f"--batch-size: {failed} images at once do not fit in the GPU's memory; {fits} should"
    )


def test_where_even_one_image_does_not_fit():
    model = MODELS["llamagen-3b"]
    assert model_too_large("llamagen-3b", model, request("float32"), 10**10) == (
        "--model: llamagen-3b in float32, ~12.7 GB of weights, does not fit in the GPU's memory, of which "
        "10.0 GB were free; --dtype bfloat16 takes less; or end what else uses that GPU, or choose another "
        "with CUDA_VISIBLE_DEVICES"
    )
    assert batch_too_large("llamagen-3b", model, request(), 1, 10**9) == (
        "--model: one image of llamagen-3b, beside the weights, does not fit in the GPU's memory, of which "
        "1.0 GB were free; end what else uses that GPU, or choose another with CUDA_VISIBLE_DEVICES"
    )


@pytest.mark.parametrize("name", MODELS)
def test_runs_that_are_compiled(name):
    """By the images of the whole run that fall to a process; a CPU's never are."""
    model = MODELS[name]
    least = COMPILED_FROM[model.steps_alike]
    assert least == (10_000 if name.startswith("var") else 1_000)
    assert compiles_by_default(model, request(images=least), GPU, 1)
    assert not compiles_by_default(model, request(images=least - 1), GPU, 1)
    assert compiles_by_default(model, request(images=8 * least), GPU, 8)
    assert not compiles_by_default(model, request(images=8 * least - 1), GPU, 8)
    assert not compiles_by_default(model, request(images=10**6), CPU, 1)


def refused(path, *options):
    fixed = ["--model", "llamagen-mini", "--num-samples", "24", "--batch-size", "8"]
    with pytest.raises(UserError) as caught:
        sample.main([*fixed, "--output", str(path / "s.npz"), *options])
    return one_line(caught.value)


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_a_batch_is_held_against_what_was_free_before_the_first(tmp_path, monkeypatch):
    """The third batch finds the memory taken by what a compiled generator keeps."""
    free, made, original = [4 * 10**9], [], sample_file.sample_tokens
    monkeypatch.setattr(sample_file, "free_memory", lambda device: free[0])

    def pretended(*arguments):
        made.append(len(made))
        free[0] = 0
        return full() if len(made) == 3 else original(*arguments)

    monkeypatch.setattr(sample_file, "sample_tokens", pretended)
    assert refused(tmp_path) == ("--batch-size: 8 images at once do not fit in the GPU's memory; 4 should")
    assert made == [0, 1, 2] and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "place, options, message",
    [
        ("prepare", (), "--model: llamagen-mini in float32, ~4 MB of weights, does not fit"),
        ("decode_tokens", (), "--model: decoding images of llamagen-mini, beside the weights, does not fit"),
        ("decode_tokens", ("--compile",), "--batch-size: 8 images at once do not fit"),
        ("CompiledGenerate", ("--compile",), "--batch-size: 8 images at once do not fit"),
    ],
)
def test_elsewhere_too_it_is_one_line(place, options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_file, place, full)
    if place == "decode_tokens":  # what is compiled is not looked at here
        eager = lambda model, *_: sample_file.eager_generate(model, request("float32"))  # noqa: E731
        monkeypatch.setattr(sample_file, "CompiledGenerate", eager)
    assert refused(tmp_path, *options).startswith(message)
    assert not os.listdir(tmp_path)
