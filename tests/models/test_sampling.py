"""Filters and noise of sampling; frequencies of sampled sequences against their exact probabilities."""

import itertools
import math
import struct

import numpy as np
import pytest
import torch
from golden_models import golden
from scipy.stats import chi2

from cca.config import SampleRequest
from cca.sampling.sampler import Sampler
from models import llamagen, var
from models.autoencoder import LLAMAGEN_KEYS, VAR_KEYS, AutoencoderConfig
from models.sampling import (
    LOWEST_TEMPERATURE,
    NOT_FINITE,
    SamplingOptions,
    exponential_noise,
    filter_logits,
    generate_tokens,
    require_finite,
)
from models.utils.errors import UserError

SAMPLES = 60_000
CPU = torch.device("cpu")
OPTIONS = {
    "plain": SamplingOptions(),
    "filtered": SamplingOptions(top_k=3, top_p=0.9, temperature=0.8),
    "guided": SamplingOptions(cfg_scale=2.0, cfg_schedule="linear"),
    "guided in part": SamplingOptions(cfg_scale=3.0, cfg_interval=1, top_k=3),
}


def tiny_model(backbone):
    torch.manual_seed(0)
    if backbone == "var":
        model = var.VAR(
            var.TransformerConfig(dim=32, depth=2, heads=2, vocab_size=4, num_classes=2),
            var.TokenizerConfig(AutoencoderConfig(32, (1,), 4, VAR_KEYS, blocks=1), (1, 2), vocab_size=4),
        )
    else:
        model = llamagen.LlamaGen(
            llamagen.TransformerConfig(
                dim=32, layers=2, heads=2, grid=2, vocab_size=4, num_classes=2, dropout=0.0
            ),
            llamagen.TokenizerConfig(AutoencoderConfig(32, (1,), 32, LLAMAGEN_KEYS, blocks=1), vocab_size=4),
        )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def sequence_probabilities(model, label, options):
    """Return the probability of every sequence, from teacher-forced logits with and without the class."""
    sequences = torch.tensor(list(itertools.product(range(4), repeat=model.sequence_length)))
    labels = torch.full((len(sequences),), label)
    cond = model.logits(labels, sequences)
    uncond = model.logits(torch.full_like(labels, model.null_class), sequences)
    steps = len(model.step_sizes)
    scales = torch.cat(
        [torch.full((size,), options.scale_at(step, steps)) for step, size in enumerate(model.step_sizes)]
    )
    logits = uncond + scales[:, None] * (cond - uncond)
    chosen = filter_logits(logits, options).log_softmax(-1).gather(-1, sequences[..., None])
    return chosen.double().sum((1, 2)).exp()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backbone", ["var", "llamagen"])
def test_frequencies_of_sequences(backbone, name):
    model, options = tiny_model(backbone), OPTIONS[name]
    expected = SAMPLES * sequence_probabilities(model, 1, options)
    assert expected.sum() == pytest.approx(SAMPLES, rel=1e-5) and expected.max() < 0.5 * SAMPLES
    request = SampleRequest(SAMPLES, (1,), "balanced", 7, None, "float32", options)
    counts = torch.zeros(len(expected), dtype=torch.float64)
    place = 4 ** torch.arange(model.sequence_length - 1, -1, -1)
    for start in range(0, SAMPLES, 20_000):
        tokens = Sampler(model, request, 20_000, CPU).tokens(range(start, start + 20_000))
        counts += torch.bincount((tokens * place).sum(1), minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    rare = expected < 5  # the chi-square test needs at least 5, so these are added up
    observed, predicted = (torch.cat([t[~rare], t[rare].sum()[None]]) for t in (counts, expected))
    observed, predicted = observed[predicted > 0], predicted[predicted > 0]
    statistic = ((observed - predicted) ** 2 / predicted).sum().item()
    assert statistic < chi2.ppf(0.999, len(predicted) - 1)


def test_filters_match_published_code():
    figures = golden("sampling_filters")
    for name, expected in figures.items():
        if name != "logits":
            _, k, p, t = name.split("_")
            options = SamplingOptions(top_k=int(k[1:]), top_p=float(p[1:]), temperature=float(t[1:]))
            torch.testing.assert_close(
                filter_logits(figures["logits"], options).softmax(-1), expected, rtol=0, atol=1e-6
            )


def keyed_triple_32(counter, uniform):
    """Return the hash triple32 of a counter, computed in Python's unbounded integers."""
    mask = 2**32 - 1
    (key,) = struct.unpack("<Q", struct.pack("<d", uniform))
    z = (counter * 0x9E3779B9 + key) & mask
    z = ((z ^ (z >> 17)) * 0xED5AD4BB ^ (key >> 20)) & mask
    z = (z ^ (z >> 11)) * 0xAC4C1B51 & mask
    z = (z ^ (z >> 15)) * 0x31848BAB & mask
    return z ^ (z >> 14)


def test_noise_matches_the_hash():
    for uniform in (0.0, 0.3, 1 - 2**-53):
        expected = [((keyed_triple_32(i, uniform) >> 1) + 0.5) * 2**-31 for i in range(1000)]
        noise = exponential_noise(torch.tensor(uniform, dtype=torch.float64), 1000)
        assert [-math.expm1(-n) for n in noise.tolist()] == pytest.approx(expected, rel=1e-6)


def test_noise_is_independent():
    uniforms = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = exponential_noise(uniforms, 16).double()
    assert (noise.mean(0) - 1).abs().max() < 4.5 / 100_000**0.5  # Exp(1) has a standard deviation of 1
    pairs = torch.cat([noise, noise.roll(1, 0)], 1)  # of a row, and of the row before it
    correlation = torch.corrcoef(pairs.T)
    assert (correlation - torch.eye(32)).abs().max() < 5.5 / 100_000**0.5


@pytest.mark.parametrize("backbone", ["var", "llamagen"])
@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(cfg_scale=2.0, top_k=2, top_p=0.5)])
def test_nonfinite_logits_mark_their_image(backbone, options):
    """One class gives NaN: its image is marked, other images do not change, and ``generate`` raises."""
    model, labels = tiny_model(backbone), torch.tensor([0, 1, 0])
    uniforms = torch.rand(3, model.sequence_length, dtype=torch.float64)
    unchanged = generate_tokens(model, labels, uniforms, options)
    embedding = next(m for m in model.transformer.modules() if isinstance(m, torch.nn.Embedding))
    assert embedding.num_embeddings == 3  # two classes and the null class
    with torch.no_grad():
        embedding.weight[1, 0] = torch.nan
    tokens = generate_tokens(model, labels, uniforms, options)
    assert (tokens[1] == NOT_FINITE).all() and torch.equal(tokens[[0, 2]], unchanged[[0, 2]])
    with pytest.raises(UserError, match="1 of 3 images are not finite; in float32"):
        model.generate(labels, uniforms, options)
    with pytest.raises(UserError, match="float16 overflow is the likely cause"):
        require_finite(tokens, torch.float16)


def test_overflow_of_guidance_raises():
    model = tiny_model("llamagen")
    with pytest.raises(UserError, match="not finite"):
        model.generate(torch.tensor([0]), torch.rand(1, 4), SamplingOptions(cfg_scale=1e300))


@pytest.mark.parametrize(
    "name, values, limits",
    [
        ("cfg_scale", (-0.5, math.nan, math.inf, "2", None, True), "at least 0|a number"),
        ("cfg_schedule", ("cosine", "", None, ["linear"]), "one of constant, linear"),
        ("cfg_interval", (0, -1, 1.5), "at least 1|an integer"),
        ("top_k", (-1, 2.0, 2**63), "at least 0|an integer"),
        ("top_p", (0, -0.1, 1.01, math.nan), "above 0 and at most 1"),
        ("temperature", (-1, 0, 1e-45, LOWEST_TEMPERATURE / 2), "at least 1e-06"),
    ],
)
def test_options_outside_limits_raise(name, values, limits):
    for value in values:
        with pytest.raises(UserError, match=f"^{name}: .* must be ({limits})"):
            SamplingOptions(**{name: value})


def test_options_at_limits():
    SamplingOptions(0, "linear", 1, 2**63 - 1, 1, LOWEST_TEMPERATURE)
    SamplingOptions(np.float32(2), "constant", None, np.int64(5), np.float64(0.5), 1e30)


@pytest.mark.parametrize("backbone", ["var", "llamagen"])
def test_generate_checks_its_inputs(backbone):
    """Uniform numbers outside [0, 1) raise, and so do uniform numbers or labels of a wrong shape."""
    model, labels = tiny_model(backbone), torch.tensor([0, 1])
    good = torch.full((2, model.sequence_length), 0.5)
    for value in (1.0, -0.1, math.nan, math.inf):
        uniforms = good.clone()
        uniforms[1, 2] = value
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            model.generate(labels, uniforms)
    for shape in (
        (2, 1),
        (1, model.sequence_length),
        (2, model.sequence_length + 1),
        (model.sequence_length,),
    ):
        with pytest.raises(ValueError, match="uniforms .*; expected"):
            model.generate(labels, torch.full(shape, 0.5))
    with pytest.raises(ValueError, match="labels .*; expected"):
        model.generate(labels[:, None], good)


@pytest.mark.parametrize("backbone", ["var", "llamagen"])
def test_lowest_temperature_is_greedy(backbone):
    model, labels = tiny_model(backbone), torch.arange(64) % 2
    uniforms = torch.rand(64, model.sequence_length, dtype=torch.float64)
    coldest = model.generate(labels, uniforms, SamplingOptions(temperature=LOWEST_TEMPERATURE))
    assert torch.equal(coldest, model.generate(labels, uniforms, SamplingOptions(top_k=1)))
