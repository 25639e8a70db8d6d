"""Code that the tokenizers use only on a GPU or compiled, compared on a CPU with the code it replaces."""

import pytest
import torch
import torch.nn.functional as F
from golden_models import VAR_CASES, build, golden, logits_error

from models.autoencoder import GroupNorm, PixelConv
from models.var_tokenizer import MultiScaleQuantizer, bicubic_taps, resize_lines
from models.zoo.registry import TOKENIZERS

GRID_SIZES = [
    (size, entry.config.patch_nums[-1])
    for name, entry in TOKENIZERS.items()
    if entry.backbone.family == "var"
    for size in entry.config.patch_nums[:-1]
]


@pytest.mark.parametrize("source, target", GRID_SIZES)
def test_resize_lines(source, target):
    """The result for each level is that of ``F.interpolate``."""
    x = torch.randn(2, 3, source, source, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x.double(), (target, target), mode="bicubic")
    line = bicubic_taps(source, target)
    result = resize_lines(resize_lines(x, *line).mT, *line).mT
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", VAR_CASES)
def test_enlarge_by_taps_matches_published_code(name, monkeypatch):
    """The tolerances are those of test_base.py: tokens are equal, and other values agree to 1e-4."""
    monkeypatch.setattr(MultiScaleQuantizer, "enlarge", MultiScaleQuantizer.enlarge_by_taps)
    assert logits_error(name, torch.device("cpu")) < 1e-4
    model, expected = build(name), golden(name)
    with torch.no_grad():
        for result, key in (
            (model.decode(expected["tokens"]), "reconstruction"),
            (model.tokenizer.teacher_forcing_input(expected["tokens"]), "teacher_forcing_input"),
        ):
            torch.testing.assert_close(result, expected[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_group_norm_by_channel(mean):
    """``by_channel``, which compiled decoders use, agrees with PyTorch's group normalisation."""
    generator = torch.Generator().manual_seed(0)
    norm, x = GroupNorm(96), torch.randn(2, 96, 9, 7, generator=generator)
    x = x * torch.linspace(0.5, 2, 96)[:, None, None] + mean * torch.linspace(-1, 1, 96)[:, None, None]
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    with torch.no_grad():
        expected = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
        assert (norm.by_channel(x) - expected).abs().max() < 2e-5
        assert (norm(x) - expected).abs().max() < 2e-5


def test_convolution_with_eight_channels():
    torch.manual_seed(0)
    layer, x = PixelConv(16, 3, 3, padding=1), torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(layer.with_eight_channels(x), layer(x), rtol=0, atol=1e-6)
