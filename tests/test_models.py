"""Models against the figures of the published code, and what their interface promises."""

import math
import struct

import pytest
import torch
from golden_models import LLAMAGEN_CASES, VAR_CASES, build, golden

from models.base import SamplingOptions, draw_tokens, exponential_noise, filter_logits

ALL = LLAMAGEN_CASES + VAR_CASES


@pytest.fixture(scope="module", params=ALL)
def case(request):
    with torch.no_grad():
        yield build(request.param), golden(request.param)


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_encoder_and_tokens(case):
    model, expected = case
    close(model.tokenizer.latents(expected["image"]), expected["encoder_out"])
    assert torch.equal(model.encode(expected["image"]), expected["tokens"])


def test_reconstruction(case):
    model, expected = case
    # The VAR figure was clamped by the published code, LlamaGen's was not.
    decode = model.decode if model.checkpoint_name == "model.pth" else model.tokenizer.decode
    close(decode(expected["tokens"]), expected["reconstruction"])


def test_logits_and_logprob(case):
    model, expected = case
    logits = model.logits(expected["labels"], expected["tokens"])
    assert logits.dtype == torch.float32
    close(logits, expected["logits"])
    close(model.sequence_logprob(expected["labels"], expected["tokens"]), expected["sequence_logprob"], 1e-3)


@pytest.mark.parametrize("name", VAR_CASES)
def test_teacher_forcing_input(name):
    expected = golden(name)
    with torch.no_grad():
        close(
            build(name).tokenizer.teacher_forcing_input(expected["tokens"]), expected["teacher_forcing_input"]
        )


def greedy(model, scale, interval=None):
    options = SamplingOptions(scale, model.default_cfg_schedule, interval, top_k=1)
    return model.generate(torch.arange(4), torch.rand(4, model.sequence_length), options)


@pytest.mark.parametrize("name", LLAMAGEN_CASES)
def test_llamagen_greedy(name):
    model, expected = build(name), golden(name)
    for scale in (1.0, 2.0, 4.0):
        tokens = greedy(model, scale)
        assert torch.equal(tokens, expected[f"greedy_tokens_cfg{scale}"].long())
        close(model.tokenizer.decode(tokens), expected[f"greedy_image_cfg{scale}"])


@pytest.mark.parametrize("name", LLAMAGEN_CASES)
def test_llamagen_guidance_interval(name):
    # The published interval 5 counts decode steps 0 to 5 after the first token: 7 tokens in all.
    expected = golden(name)["greedy_tokens_cfg4.0_interval5"].long()
    assert torch.equal(greedy(build(name), 4.0, interval=7), expected)


@pytest.mark.parametrize("name", VAR_CASES)
def test_var_greedy(name):
    model, expected = build(name), golden(name)
    for strength in (0.0, 1.5, 4.0):  # VAR's own notation
        tokens = greedy(model, 1.0 + strength)
        assert torch.equal(tokens, expected[f"greedy_tokens_cfg{strength}"])
        close((model.decode(tokens) + 1) / 2, expected[f"greedy_image_cfg{strength}"])


def test_generation_agrees_with_teacher_forcing(case):
    """Cached decoding gives the teacher-forced distribution: the greedy token is its argmax."""
    model, _ = case
    tokens = greedy(model, 1.0)
    assert torch.equal(model.logits(torch.arange(4), tokens).argmax(-1), tokens)


def test_no_unconditional_pass_without_guidance(case, monkeypatch):
    model, _ = case
    rows = []
    begin = type(model).begin
    monkeypatch.setattr(
        type(model), "begin", lambda self, labels: rows.append(len(labels)) or begin(self, labels)
    )
    greedy(model, 1.0)
    greedy(model, 2.0)
    assert rows == [4, 8]


def test_sampling_filters():
    figures = golden("sampling_filters")
    for name, expected in figures.items():
        if name != "logits":
            _, k, p, t = name.split("_")
            options = SamplingOptions(top_k=int(k[1:]), top_p=float(p[1:]), temperature=float(t[1:]))
            close(filter_logits(figures["logits"], options).softmax(-1), expected, 1e-6)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0]]).expand(40_000, -1)
    counts = torch.bincount(draw_tokens(logits, torch.rand(40_000)), minlength=4)
    expected = 40_000 * logits[0].softmax(-1)
    assert counts[1] == 0
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 13.8  # 2 degrees of freedom, p = 0.001


def keyed_triple_32(counter, uniform):
    """The hash in Python's unbounded integers."""
    mask = 2**32 - 1
    (key,) = struct.unpack("<Q", struct.pack("<d", uniform))
    z = (counter * 0x9E3779B9 + key) & mask
    z = ((z ^ (z >> 17)) * 0xED5AD4BB ^ (key >> 20)) & mask
    z = (z ^ (z >> 11)) * 0xAC4C1B51 & mask
    z = (z ^ (z >> 15)) * 0x31848BAB & mask
    return z ^ (z >> 14)


def test_noise_is_the_hash():
    for uniform in (0.0, 0.3, 1 - 2**-53):
        expected = [((keyed_triple_32(i, uniform) >> 1) + 0.5) * 2**-31 for i in range(1000)]
        noise = exponential_noise(torch.tensor(uniform, dtype=torch.float64), 1000)
        assert [-math.expm1(-n) for n in noise.tolist()] == pytest.approx(expected, rel=1e-6)


def test_noise_is_independent():
    uniforms = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = exponential_noise(uniforms, 16).double()
    assert (noise.mean(0) - 1).abs().max() < 4.5 / 100_000**0.5  # of deviation 1
    correlation = torch.corrcoef(
        torch.cat([noise, noise.roll(1, 0)], 1).T
    )  # with each other and the row before
    assert (correlation - torch.eye(32)).abs().max() < 5.5 / 100_000**0.5


def test_rounding_of_the_logits_hardly_ever_changes_a_draw():
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = (
        torch.randn(20_000, 512, generator=generator) * 2,
        torch.rand(20_000, generator=generator, dtype=torch.float64),
    )
    rounded = logits + 1e-6 * torch.randn(20_000, 512, generator=generator)
    assert (draw_tokens(logits, uniforms) != draw_tokens(rounded, uniforms)).sum() <= 1
