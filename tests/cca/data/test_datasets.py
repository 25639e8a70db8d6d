"""Pixels become tokens in parts, whatever the batch."""

import pytest
import torch
from commands import TRAIN

from cca.data.datasets import ImageArray
from cca.training.encoding import to_model_input, to_tokens
from models import load_model
from models.utils.precision import ENCODED_PIXELS


@pytest.mark.parametrize("name", ["var-mini", "llamagen-mini"])
@pytest.mark.parametrize("pixels", [1, 5 * 32 * 32, 2**18])
def test_encoding_in_parts_makes_the_same_tokens(name, pixels, monkeypatch):
    model = load_model(name)
    data, sizes, encode = ImageArray(TRAIN, model), [], model.encode
    batch = torch.stack([data.item(0, index) for index in range(12)])
    with torch.no_grad():
        expected = encode(to_model_input(batch))
    monkeypatch.setattr(model, "encode", lambda images: (sizes.append(len(images)), encode(images))[1])
    monkeypatch.setitem(ENCODED_PIXELS, "cpu", pixels)
    tokens = to_tokens(model, batch, torch.device("cpu"))
    assert torch.equal(tokens, expected)
    assert sizes == {1: [1] * 12, 5 * 32 * 32: [5, 5, 2], 2**18: [12]}[pixels]
    # Training takes them as they are: a layer's inputs are kept for its gradient.
    model.sequence_logprob(torch.zeros(12, dtype=torch.int64), tokens).sum().backward()
