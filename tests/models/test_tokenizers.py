"""What the tokenizers do otherwise on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from golden_models import VAR_CASES, build, golden

from models.autoencoder import PixelConv
from models.decoding import SamplingOptions
from models.var_tokenizer import MultiScaleQuantizer, bicubic_taps, resize_lines
from models.zoo import TOKENIZERS

SIDES = [
    (side, entry.config.patch_nums[-1])
    for name, entry in TOKENIZERS.items()
    if entry.backbone.family == "var"
    for side in entry.config.patch_nums[:-1]
]


@pytest.mark.parametrize("source, target", SIDES)
def test_resizing_by_taps(source, target):
    """As ``F.interpolate`` resizes, of all levels."""
    x = torch.randn(2, 3, source, source, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x.double(), (target, target), mode="bicubic")
    line = bicubic_taps(source, target)
    found = resize_lines(resize_lines(x, *line).mT, *line).mT
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", VAR_CASES)
def test_figures_of_the_published_code(name, monkeypatch):
    """As without it, in test_base.py: tokens are equal, numbers to 1e-4."""
    monkeypatch.setattr(MultiScaleQuantizer, "enlarge", MultiScaleQuantizer.enlarge_by_taps)
    model, expected = build(name), golden(name)
    tokens, tokenizer = expected["tokens"], model.tokenizer
    with torch.no_grad():
        assert torch.equal(model.encode(expected["image"]), tokens)
        for found, key in (
            (model.logits(expected["labels"], tokens), "logits"),
            (model.decode(tokens), "reconstruction"),
            (tokenizer.teacher_forcing_input(tokens), "teacher_forcing_input"),
        ):
            torch.testing.assert_close(found, expected[key], rtol=0, atol=1e-4)
    for key in (key for key in expected if key.startswith("greedy_tokens_cfg")):
        options = SamplingOptions(1 + float(key.removeprefix("greedy_tokens_cfg")), "linear", top_k=1)
        drawn = model.generate(torch.arange(4), torch.rand(4, model.sequence_length), options)
        assert torch.equal(drawn, expected[key].long())


def test_more_channels_than_pixels_have():
    torch.manual_seed(0)
    layer, x = PixelConv(16, 3, 3, padding=1), torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(layer.by_eight(x), layer(x), rtol=0, atol=1e-6)
