"""The sampler draws from the model's distribution: frequencies against enumerated probabilities."""

import itertools

import pytest
import torch
from scipy.stats import chi2

from cca.sampler import SampleRequest, eager_generate, sample_tokens
from models import llamagen, var
from models.autoencoder import LLAMAGEN_KEYS, VAR_KEYS, AutoencoderConfig
from models.base import SamplingOptions, filter_logits

SAMPLES = 200_000
CPU = torch.device("cpu")
OPTIONS = {
    "plain": SamplingOptions(),
    "filtered": SamplingOptions(top_k=3, top_p=0.9, temperature=0.8),
    "guided": SamplingOptions(cfg_scale=2.0, cfg_schedule="linear"),
    "guided in part": SamplingOptions(cfg_scale=3.0, cfg_interval=1, top_k=3),
}


def tiny(backbone):
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
def probabilities(model, label, options):
    """log p of every sequence, from teacher-forced logits of the conditional and the unconditional model."""
    sequences = torch.tensor(list(itertools.product(range(4), repeat=model.sequence_length)))
    labels = torch.full((len(sequences),), label)
    cond, uncond = (
        model.logits(labels, sequences),
        model.logits(torch.full_like(labels, model.null_class), sequences),
    )
    steps = len(model.step_sizes)
    scales = torch.cat(
        [torch.full((size,), options.scale_at(step, steps)) for step, size in enumerate(model.step_sizes)]
    )
    logits = uncond + scales[:, None] * (cond - uncond)
    chosen = filter_logits(logits, options).log_softmax(-1).gather(-1, sequences[..., None])
    return chosen.double().sum((1, 2)).exp()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backbone", ["var", "llamagen"])
def test_frequencies(backbone, name):
    model, options = tiny(backbone), OPTIONS[name]
    expected = SAMPLES * probabilities(model, 1, options)
    assert expected.sum() == pytest.approx(SAMPLES, rel=1e-5) and expected.max() < 0.5 * SAMPLES
    request = SampleRequest(SAMPLES, (1,), "balanced", 7, None, "float32", options)
    counts = torch.zeros(len(expected), dtype=torch.float64)
    place = 4 ** torch.arange(model.sequence_length - 1, -1, -1)
    for start in range(0, SAMPLES, 20_000):
        tokens = sample_tokens(
            model, range(start, start + 20_000), request, CPU, eager_generate(model, request)
        )
        counts += torch.bincount((tokens * place).sum(1), minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    rare = expected < 5  # too few for the chi-square: taken together
    observed, wanted = (torch.cat([t[~rare], t[rare].sum()[None]]) for t in (counts, expected))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum().item()
    assert statistic < chi2.ppf(0.999, len(wanted) - 1)
