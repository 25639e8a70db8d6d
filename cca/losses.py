"""Condition Contrastive Alignment and the losses it is compared with (arXiv 2410.09347).

Notation: x is the tokens of an image, c its class, c- another class, B the batch size. All losses are
functions of sequence log-likelihoods log p(x|c), summed over the tokens of an image, through the implicit
reward

    r(x, c) = log p_theta(x|c) - log p_ref(x|c)

of the trained model (theta) relative to the frozen pretrained model (ref). s is the logistic function.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def cca_loss(
    reward: Tensor, negative_reward: Tensor, same_label: Tensor, beta: float, lambda_: float
) -> Tensor:
    """Return the CCA loss: noise-contrastive alignment (NCA, arXiv 2402.05369) with classes as prompts.

    L = [-mean_i log s(beta r(x_i, c_i)) - mean_i w_i log s(sign_i beta r(x_i, c_i-))] / max(lambda_, 1)

    where sign_i = -1 and w_i = lambda_. If c_i- equals c_i, the pair is a positive one: sign_i = +1, w_i = 1.

    Args:
        reward: r(x_i, c_i) of the true classes [B], in nats.
        negative_reward: r(x_i, c_i-) of the other classes [B].
        same_label: bool [B], True where c_i- equals c_i (also if both are the null class).
        beta: inverse temperature of the reward, > 0.
        lambda_: weight of the negatives, >= 0.

    Returns:
        scalar loss.

    Raises:
        ValueError: a shape or a hyperparameter is not as above.
    """
    _check(reward, negative_reward, same_label, beta, lambda_)
    sign, weight = _negative_terms(same_label, negative_reward, lambda_)
    positive = -F.logsigmoid(beta * reward).mean()
    negative = -(weight * F.logsigmoid(sign * beta * negative_reward)).mean()
    return (positive + negative) / max(lambda_, 1.0)


def dpo_loss(
    reward: Tensor, negative_reward: Tensor, same_label: Tensor, beta: float, lambda_: float
) -> Tensor:
    """Return the DPO loss (arXiv 2305.18290, eq. 7), with the true class as the preferred one.

    L = -mean_i log s(beta (r(x_i, c_i) - r(x_i, c_i-)))

    Arguments and errors are those of ``cca_loss``; ``same_label`` and ``lambda_`` are not used.
    """
    _check(reward, negative_reward, same_label, beta=beta)
    return -F.logsigmoid(beta * (reward - negative_reward)).mean()


def unlearning_loss(
    reward: Tensor, negative_reward: Tensor, same_label: Tensor, beta: float, lambda_: float
) -> Tensor:
    """Return the paper's unlearning loss: it raises the likelihood of true classes and lowers the others'.

    L = [-mean_i r(x_i, c_i) - mean_i w_i sign_i r(x_i, c_i-)] / max(lambda_, 1)

    Arguments, errors, signs and weights are those of ``cca_loss``; ``beta`` is not used.
    """
    _check(reward, negative_reward, same_label, lambda_=lambda_)
    sign, weight = _negative_terms(same_label, negative_reward, lambda_)
    return (-reward.mean() - (weight * sign * negative_reward).mean()) / max(lambda_, 1.0)


def _check(
    reward: Tensor, negative_reward: Tensor, same_label: Tensor, beta: float = 1.0, lambda_: float = 0.0
) -> None:
    """Raise ValueError unless all tensors are [B], beta > 0 and lambda_ >= 0."""
    shapes = [list(tensor.shape) for tensor in (reward, negative_reward, same_label)]
    if shapes != [[reward.numel()]] * 3:
        raise ValueError(
            f"rewards and same_label have shapes {', '.join(map(str, shapes))}; expected [B] each"
        )
    if not (0 < beta < float("inf") and 0 <= lambda_ < float("inf")):
        raise ValueError(f"beta {beta} must be above 0 and lambda_ {lambda_} at least 0; both must be finite")


def _negative_terms(same_label: Tensor, like: Tensor, lambda_: float) -> tuple[Tensor, Tensor]:
    """Return sign_i and w_i of ``cca_loss``, each [B], with the dtype and device of ``like``."""
    one = torch.ones_like(like)
    return torch.where(same_label, one, -one), torch.where(same_label, one, lambda_ * one)


def next_label(labels: Tensor) -> Tensor:
    """Return c- [B] for labels [B]: the label of the next image in the data order."""
    return labels.roll(-1)


@dataclass(frozen=True)
class Loss:
    """A training objective with its choice of negatives.

    objective: function with the arguments of ``cca_loss`` that returns the scalar loss; None is plain maximum
        likelihood, which needs no reference model.
    negatives: maps the labels [B] of a global batch, in data order, to the classes [B] to contrast with.
    hyperparameters: which of beta and lambda_ the objective depends on.
    """

    objective: Callable[[Tensor, Tensor, Tensor, float, float], Tensor] | None
    negatives: Callable[[Tensor], Tensor] = next_label
    hyperparameters: tuple[str, ...] = ("beta", "lambda_")

    def reward_scale(self, beta: float) -> float:
        """Return the factor of reported rewards: ``beta``, or 1 if the loss does not use it."""
        return beta if "beta" in self.hyperparameters else 1.0


LOSSES: dict[str, Loss] = {
    "cca": Loss(cca_loss),
    "dpo": Loss(dpo_loss, hyperparameters=("beta",)),
    "unlearning": Loss(unlearning_loss, hyperparameters=("lambda_",)),
    "sft": Loss(None, hyperparameters=()),
}


def pair_labels(
    labels: Tensor, uncond: Tensor, null_class: int, negatives: Callable[[Tensor], Tensor] = next_label
) -> tuple[Tensor, Tensor]:
    """Return c [B] and c- [B] for the labels [B] of a global batch.

    Where ``uncond`` (bool [B]) is True, both are the null class: this keeps training the unconditional model.
    Raises ValueError for other shapes.
    """
    if labels.ndim != 1 or uncond.shape != labels.shape:
        raise ValueError(
            f"labels and uncond have shapes {list(labels.shape)}, {list(uncond.shape)}; expected [B] each"
        )
    null = torch.full_like(labels, null_class)
    return torch.where(uncond, null, labels), torch.where(uncond, null, negatives(labels))


def missing_negatives(loss: str, batch_size: int, classes: list[int] | None) -> str | None:
    """Return a message if no image has another class to contrast with, else None.

    ``classes`` are those of the data; None if they are not known.
    """
    takes_next = LOSSES[loss].objective is not None and LOSSES[loss].negatives is next_label
    if takes_next and (batch_size == 1 or classes is not None and len(classes) == 1):
        return (
            f"all images of a batch of {batch_size} have one class, which leaves {loss} without negatives: "
            "the negatives are the classes of the other images of the batch"
        )
    return None
