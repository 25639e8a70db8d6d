"""Condition Contrastive Alignment and the losses it is compared with (arXiv 2410.09347).

All losses act on sequence log-likelihoods log p(x|c), summed over the tokens of an image. The
implicit reward is r(x, c) = log p_theta(x|c) - log p_ref(x|c) with the frozen pretrained model
as reference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from models.devices import upload


@dataclass(frozen=True)
class Batch:
    """n images; a tensor that a loss needs of every image is one more field here.

    tokens: [n, L] int64. labels: classes [n] int64 after the null-class draw. negatives: the
    classes [n] that they are contrasted with, likewise. uncond: bool [n], rows of the null class.
    The trainer takes all but the tokens on the CPU, where what depends on them is counted.
    """

    tokens: Tensor
    labels: Tensor
    negatives: Tensor
    uncond: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def same_label(self) -> Tensor:
        """bool [n]: rows whose negative is no other class (the null class included)."""
        return self.labels == self.negatives

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(**{field.name: function(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: upload(tensor, device))

    def micro_batches(self, size: int) -> Iterator["Batch"]:
        """Consecutive parts of at most ``size`` images."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self.map(lambda tensor: tensor[part])  # noqa: B023, called at once


def cca_loss(
    reward: Tensor, negative_reward: Tensor, same_label: Tensor, beta: float, lambda_: float
) -> Tensor:
    """The paper's practical CCA objective.

    L = (-mean log s(beta r+) - mean w log s(+-beta r-)) / max(lambda_, 1), s the logistic function.

    Args:
        reward: r(x_i, c_i) of the true classes [B], in nats.
        negative_reward: r(x_i, c_i-) of the other classes [B].
        same_label: bool [B], where c_i- equals c_i (the null class included). Such a pair counts
            as positive: sign + and weight 1 instead of sign - and weight lambda_.
        beta: inverse temperature of the reward, > 0.
        lambda_: weight of the negatives, >= 0.

    Returns:
        scalar loss.
    """
    sign, weight = _negative_terms(same_label, negative_reward, lambda_)
    positive = -F.logsigmoid(beta * reward).mean()
    negative = -(weight * F.logsigmoid(sign * beta * negative_reward)).mean()
    return (positive + negative) / max(lambda_, 1.0)


def dpo_loss(
    reward: Tensor, negative_reward: Tensor, same_label: Tensor, beta: float, lambda_: float
) -> Tensor:
    """Direct Preference Optimization (arXiv 2305.18290, eq. 7) with the true class preferred.

    Arguments as in ``cca_loss``; ``same_label`` and ``lambda_`` play no part.
    """
    return -F.logsigmoid(beta * (reward - negative_reward)).mean()


def unlearning_loss(
    reward: Tensor, negative_reward: Tensor, same_label: Tensor, beta: float, lambda_: float
) -> Tensor:
    """The paper's unlearning baseline: likelihood up for true classes, down for the others.

    Arguments as in ``cca_loss``; ``beta`` plays no part.
    """
    sign, weight = _negative_terms(same_label, negative_reward, lambda_)
    return (-reward.mean() - (weight * sign * negative_reward).mean()) / max(lambda_, 1.0)


def _negative_terms(same_label: Tensor, like: Tensor, lambda_: float) -> tuple[Tensor, Tensor]:
    one = torch.ones_like(like)
    return torch.where(same_label, one, -one), torch.where(same_label, one, lambda_ * one)


def next_label(labels: Tensor) -> Tensor:
    """Each image's negative class is the label of the next one in the data order: [B] -> [B]."""
    return labels.roll(-1)


@dataclass(frozen=True)
class Loss:
    """One way of training.

    objective: the loss [] of (reward [B], negative reward [B], same_label [B], beta, lambda_), as in
        ``cca_loss``; None is plain maximum likelihood, which needs no reference model.
    negatives: labels [B] of a global batch, in the data order -> the classes [B] to contrast with.
    hyperparameters: those of beta and lambda_ that the objective depends on.
    """

    objective: Callable[[Tensor, Tensor, Tensor, float, float], Tensor] | None
    negatives: Callable[[Tensor], Tensor] = next_label
    hyperparameters: tuple[str, ...] = ("beta", "lambda_")

    @property
    def absent(self) -> tuple[str, ...]:
        """Those of beta and lambda_ that it does not depend on."""
        return tuple(name for name in ("beta", "lambda_") if name not in self.hyperparameters)

    def reward_scale(self, beta: float) -> float:
        """What a reward is multiplied by where it is reported: ``beta``, or 1 if the loss has none."""
        return beta if "beta" in self.hyperparameters else 1.0


LOSSES: dict[str, Loss] = {
    "cca": Loss(cca_loss),
    "dpo": Loss(dpo_loss, hyperparameters=("beta",)),
    "unlearning": Loss(unlearning_loss, hyperparameters=("lambda_",)),
    "sft": Loss(None, hyperparameters=()),
}


def missing_negatives(loss: str, batch_size: int, same_class: Callable[[], bool]) -> str | None:
    """Why no image can be contrasted with another class, if so; ``same_class`` tells it of the data."""
    if LOSSES[loss].objective is None or LOSSES[loss].negatives is not next_label:
        return None
    if batch_size == 1:
        return (
            f"--batch-size 1 leaves {loss} without negatives: they are the classes of a batch's other images"
        )
    if same_class():
        return f"all images are of one class, which leaves {loss} without negatives: it needs two or more"
    return None


def pair_labels(
    labels: Tensor, uncond: Tensor, null_class: int, negatives: Callable[[Tensor], Tensor] = next_label
) -> tuple[Tensor, Tensor]:
    """Positive and negative class of each image of a global batch: labels [B], uncond bool [B] -> [B], [B].

    Rows of ``uncond`` get the null class on both sides, which keeps the unconditional model alive.
    """
    null = torch.full_like(labels, null_class)
    return torch.where(uncond, null, labels), torch.where(uncond, null, negatives(labels))


Sums = dict[str, tuple[Tensor, int]]


def summed(values: dict[str, Tensor], scale: float = 1.0) -> Sums:
    """By name the sum of a tensor [n], times ``scale``, and n, so that parts of a batch add up.

    The sum is float64 [] on the tensor's device, which nothing waits for.
    """
    return {name: (scale * part.sum().double(), len(part)) for name, part in values.items()}


def diagnostics(
    logps: tuple[Tensor, Tensor], rewards: tuple[Tensor, Tensor], null_rows: Tensor, scale: float
) -> Sums:
    """What a step reports of its pairs, under the names that TRL gave them.

    Args:
        logps: log p(x_i|c_i) and log p(x_i|c_i-) of a micro-batch, each [B], in nats.
        rewards: r(x_i, c_i), the chosen one, and r(x_i, c_i-), the rejected one, likewise.
        null_rows: indices [n] int64 of the rows of the null class.
        scale: what rewards are multiplied by; see ``Loss.reward_scale``.
    """
    (logp, negative_logp), (reward, negative_reward) = logps, rewards
    scaled = {
        "rewards/chosen": reward,
        "rewards/rejected": negative_reward,
        "rewards/margins": reward - negative_reward,
        "rewards/null": reward[null_rows],
    }
    plain = {
        "rewards/accuracies": reward > negative_reward,
        "logps/chosen": logp,
        "logps/rejected": negative_logp,
    }
    return summed(scaled, scale) | summed(plain)
