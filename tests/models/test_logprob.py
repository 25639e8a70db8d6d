"""The chunked log-likelihood against the plain one."""

import pytest
import torch

import models.devices
from models.logprob import linear_sequence_logprob, sequence_logprob


def test_sequence_logprob_sums_tokens():
    logits, tokens = torch.randn(3, 5, 11), torch.randint(0, 11, (3, 5))
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))
    torch.testing.assert_close(sequence_logprob(logits, tokens), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_chunked_logprob_equals_the_plain_one(monkeypatch, bias):
    # 7 rows at a time: chunks cut through sequences.
    monkeypatch.setitem(models.devices.LIKELIHOOD_LOGITS, "cpu", 101 * 7)
    hidden, weight, offset = torch.randn(3, 13, 16), torch.randn(101, 16), torch.randn(101)
    tokens, outer = torch.randint(0, 101, (3, 13)), torch.randn(3)
    results = []
    for function in (
        linear_sequence_logprob,
        lambda h, w, b, t: sequence_logprob(torch.nn.functional.linear(h, w, b), t),
    ):
        inputs = [t.clone().requires_grad_() for t in (hidden, weight, offset)]
        value = function(inputs[0], inputs[1], inputs[2] if bias else None, tokens)
        (value * outer).sum().backward()
        results.append((value, *(t.grad for t in inputs if t.grad is not None)))
    for chunked, plain in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)
