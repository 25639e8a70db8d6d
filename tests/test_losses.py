"""Losses and their gradients against the figures of the published code, in float64."""

import pytest
import torch
from golden_models import golden

import cca.logprob
from cca.logprob import linear_sequence_logprob, sequence_logprob
from cca.losses import CONTRASTIVE_LOSSES, diagnostics, pair_labels

FIGURES = golden("losses")
SETTINGS = [(0.02, 50.0), (0.02, 1000.0), (0.1, 0.5)]


@pytest.mark.parametrize("beta, lam", SETTINGS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", CONTRASTIVE_LOSSES)
def test_loss_and_gradient(name, masked, beta, lam):
    mask = FIGURES["uncond_mask"] & masked
    labels, negatives = pair_labels(FIGURES["labels"], mask, int(FIGURES["num_classes"]))
    positive, negative = (FIGURES[k].clone().requires_grad_() for k in ("positive_logp", "negative_logp"))
    rewards = positive - FIGURES["ref_positive_logp"], negative - FIGURES["ref_negative_logp"]
    loss = CONTRASTIVE_LOSSES[name](*rewards, labels == negatives, beta, lam)
    loss.backward()
    key = f"{name}_{'masked' if masked else 'nomask'}_beta{beta}_lambda{lam}"
    for actual, part in ((loss, "loss"), (positive.grad, "grad_positive"), (negative.grad, "grad_negative")):
        torch.testing.assert_close(actual, FIGURES[f"{key}_{part}"], rtol=0, atol=1e-9)


def test_pair_labels():
    null = int(FIGURES["num_classes"])
    labels, negatives = pair_labels(FIGURES["labels"], FIGURES["uncond_mask"], null)
    assert torch.equal(labels, FIGURES["labels_masked"])
    assert torch.equal(negatives, FIGURES["negative_labels_masked"])
    nobody = torch.zeros_like(FIGURES["uncond_mask"])
    assert torch.equal(pair_labels(FIGURES["labels"], nobody, null)[1], FIGURES["negative_labels"])


def test_diagnostics():
    reward = FIGURES["positive_logp"] - FIGURES["ref_positive_logp"]
    negative = FIGURES["negative_logp"] - FIGURES["ref_negative_logp"]
    found = diagnostics(reward, negative, FIGURES["uncond_mask"])
    for name in ("accuracy", "margin", "chosen_reward", "rejected_reward"):
        total, count = found[name]
        assert total / count == pytest.approx(float(FIGURES[f"metric_{name}"]), abs=1e-9)
    assert found["null_reward"][1] == int(FIGURES["uncond_mask"].sum())


def test_sequence_logprob_sums_tokens():
    logits, tokens = torch.randn(3, 5, 11), torch.randint(0, 11, (3, 5))
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))
    torch.testing.assert_close(sequence_logprob(logits, tokens), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_chunked_logprob_equals_the_plain_one(monkeypatch, bias):
    monkeypatch.setitem(
        cca.logprob.CHUNK_LOGITS, "cpu", 101 * 7
    )  # 7 rows at a time: chunks cut through sequences
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
