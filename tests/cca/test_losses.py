"""Losses, their gradients and the reward metrics compared with the published code, in float64."""

import math

import pytest
import torch
from golden_models import golden

from cca.losses import LOSSES, pair_labels
from cca.training.trainer import reward_metrics

FIGURES = golden("losses")
GOLDEN_LOSSES = ["cca", "dpo", "unlearning"]
SETTINGS = [(0.02, 50.0), (0.02, 1000.0), (0.1, 0.5)]


@pytest.mark.parametrize("beta, lam", SETTINGS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", GOLDEN_LOSSES)
def test_losses_equal_published_code(name, masked, beta, lam):
    mask = FIGURES["uncond_mask"] & masked
    labels, negatives = pair_labels(FIGURES["labels"], mask, int(FIGURES["num_classes"]))
    positive, negative = (FIGURES[k].clone().requires_grad_() for k in ("positive_logp", "negative_logp"))
    rewards = positive - FIGURES["ref_positive_logp"], negative - FIGURES["ref_negative_logp"]
    loss = LOSSES[name].objective(*rewards, labels == negatives, beta, lam)
    loss.backward()
    key = f"{name}_{'masked' if masked else 'nomask'}_beta{beta}_lambda{lam}"
    for actual, part in ((loss, "loss"), (positive.grad, "grad_positive"), (negative.grad, "grad_negative")):
        torch.testing.assert_close(actual, FIGURES[f"{key}_{part}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", GOLDEN_LOSSES)
def test_losses_refuse_wrong_shapes_and_hyperparameters(name):
    rows, loss = torch.zeros(4), LOSSES[name].objective
    same = torch.zeros(4, dtype=torch.bool)
    for wrong in (
        (rows, rows, same[:, None]), (rows, rows[:, None], same), (rows[:, None],) * 2 + (same[:, None],),
        (rows[:1], rows, same), (rows, rows[0], same), (rows, rows, same[:1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected \[B\]"):
            loss(*wrong, 0.1, 1.0)
    used = LOSSES[name].hyperparameters
    for beta, lambda_ in ((0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (0.1, -1.0), (0.1, math.inf)):
        if (beta != 0.1 and "beta" in used) or (lambda_ != 1.0 and "lambda_" in used):
            with pytest.raises(ValueError, match="beta .* must be above 0"):
                loss(rows, rows, same, beta, lambda_)
    assert loss(rows, rows, same, 0.1, 0.0).isfinite()


def test_pair_labels_refuse_wrong_shapes():
    labels = torch.arange(4)
    for wrong in ((labels, torch.zeros(1, dtype=torch.bool)), (labels, torch.zeros(4, 1, dtype=torch.bool))):
        with pytest.raises(ValueError, match=r"expected \[B\]"):
            pair_labels(*wrong, 9)


def test_pair_labels_equal_published_code():
    null = int(FIGURES["num_classes"])
    labels, negatives = pair_labels(FIGURES["labels"], FIGURES["uncond_mask"], null)
    assert torch.equal(labels, FIGURES["labels_masked"])
    assert torch.equal(negatives, FIGURES["negative_labels_masked"])
    no_uncond = torch.zeros_like(FIGURES["uncond_mask"])
    assert torch.equal(pair_labels(FIGURES["labels"], no_uncond, null)[1], FIGURES["negative_labels"])


def test_reward_metrics_equal_published_code():
    """Rewards and margins are scaled by beta. Accuracy is the share of entries that prefer the true class."""
    reward = FIGURES["positive_logp"] - FIGURES["ref_positive_logp"]
    negative = FIGURES["negative_logp"] - FIGURES["ref_negative_logp"]
    logps = FIGURES["positive_logp"], FIGURES["negative_logp"]
    null_entries = FIGURES["uncond_mask"].nonzero().flatten()
    metrics = reward_metrics(logps, (reward, negative), FIGURES["uncond_mask"], scale=0.02)
    found = {name: values.double().mean().item() for name, values in metrics.items()}
    found["rewards/null"] /= found.pop("null")
    assert found == pytest.approx(
        {
            "rewards/accuracies": float(FIGURES["metric_accuracy"]),
            "rewards/margins": 0.02 * float(FIGURES["metric_margin"]),
            "rewards/chosen": 0.02 * float(FIGURES["metric_chosen_reward"]),
            "rewards/rejected": 0.02 * float(FIGURES["metric_rejected_reward"]),
            "rewards/null": 0.02 * reward[null_entries].mean().item(),
            "logps/chosen": logps[0].mean().item(),
            "logps/rejected": logps[1].mean().item(),
        },
        abs=1e-9,
    )


def test_reward_scale_is_beta_if_used():
    assert [LOSSES[name].reward_scale(0.02) for name in GOLDEN_LOSSES] == [0.02, 0.02, 1.0]
