"""Condition Contrastive Alignment and the losses it is compared with (arXiv 2410.09347).

All losses act on sequence log-likelihoods log p(x|c), summed over the tokens of an image. The
implicit reward is r(x, c) = log p_theta(x|c) - log p_ref(x|c) with the frozen pretrained model
as reference.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cca_loss(reward: Tensor, negative_reward: Tensor, same_label: Tensor, beta: float, lam: float) -> Tensor:
    """The paper's practical CCA objective.

    L = (-mean log s(beta r+) - mean w log s(+-beta r-)) / max(lam, 1), s the logistic function.

    Args:
        reward: r(x_i, c_i) of the true classes [B], in nats.
        negative_reward: r(x_i, c_i-) of the other classes [B].
        same_label: bool [B], where c_i- equals c_i (the null class included). Such a pair counts
            as positive: sign + and weight 1 instead of sign - and weight lam.
        beta: inverse temperature of the reward, > 0.
        lam: weight of the negatives, >= 0.

    Returns:
        scalar loss.
    """
    sign, weight = _negative_terms(same_label, negative_reward, lam)
    positive = -F.logsigmoid(beta * reward).mean()
    negative = -(weight * F.logsigmoid(sign * beta * negative_reward)).mean()
    return (positive + negative) / max(lam, 1.0)


def dpo_loss(reward: Tensor, negative_reward: Tensor, same_label: Tensor, beta: float, lam: float) -> Tensor:
    """Direct Preference Optimization (arXiv 2305.18290, eq. 7) with the true class preferred.

    Arguments as in ``cca_loss``; ``same_label`` and ``lam`` play no part.
    """
    return -F.logsigmoid(beta * (reward - negative_reward)).mean()


def unlearning_loss(
    reward: Tensor, negative_reward: Tensor, same_label: Tensor, beta: float, lam: float
) -> Tensor:
    """The paper's unlearning baseline: likelihood up for true classes, down for the others.

    Arguments as in ``cca_loss``; ``beta`` plays no part.
    """
    sign, weight = _negative_terms(same_label, negative_reward, lam)
    return (-reward.mean() - (weight * sign * negative_reward).mean()) / max(lam, 1.0)


def _negative_terms(same_label: Tensor, like: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    one = torch.ones_like(like)
    return torch.where(same_label, one, -one), torch.where(same_label, one, lam * one)


CONTRASTIVE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "cca": cca_loss,
    "dpo": dpo_loss,
    "unlearning": unlearning_loss,
}
LOSSES = (*CONTRASTIVE_LOSSES, "sft")


def pair_labels(labels: Tensor, uncond_mask: Tensor, null_class: int) -> tuple[Tensor, Tensor]:
    """Positive and negative class of each image of a global batch: labels [B], mask [B] -> [B], [B].

    The negative is the label of the next image in the data order. Rows of ``uncond_mask`` get the
    null class on both sides, which keeps the unconditional model alive.
    """
    null = torch.full_like(labels, null_class)
    return torch.where(uncond_mask, null, labels), torch.where(uncond_mask, null, labels.roll(-1))


def diagnostics(reward: Tensor, negative_reward: Tensor, uncond_mask: Tensor) -> dict[str, tuple[float, int]]:
    """What a step reports, as sums and counts, so that micro-batches and processes add up."""
    rows, null = len(reward), int(uncond_mask.sum())
    return {
        "accuracy": (float((reward > negative_reward).sum()), rows),
        "margin": (float((reward - negative_reward).sum()), rows),
        "chosen_reward": (float(reward.sum()), rows),
        "rejected_reward": (float(negative_reward.sum()), rows),
        "null_reward": (float(reward[uncond_mask].sum()), null),
    }
