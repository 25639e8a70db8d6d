"""FID, inception score, precision and recall of features, in double precision.

The formulas are those of guided-diffusion's evaluator (Dhariwal & Nichol, 2021, arXiv 2105.05233).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of a set of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray

    @staticmethod
    def of(features: np.ndarray) -> "Gaussian":
        """Return the Gaussian fitted to features [N, D], N >= 2; the covariance divides by N - 1."""
        running = RunningGaussian()
        for start in range(0, len(features), 5000):
            running.add(features[start : start + 5000])
        return running.fit()


class RunningGaussian:
    """Running sums that fit a Gaussian to features in blocks, in float64 and bounded memory."""

    def __init__(self):
        self.count, self.origin, self.sum, self.outer_sum = 0, np.zeros(()), np.zeros(()), np.zeros(())

    def add(self, block: np.ndarray) -> None:
        """Add features [n, D]."""
        block = block.astype(np.float64)
        if self.count == 0:
            self.origin = block.mean(0)  # sums relative to a point near the mean avoid cancellation
        shifted = block - self.origin
        self.count += len(block)
        self.sum = self.sum + shifted.sum(0)
        self.outer_sum = self.outer_sum + shifted.T @ shifted

    def fit(self) -> Gaussian:
        offset = self.sum / self.count
        sigma = (self.outer_sum - self.count * np.outer(offset, offset)) / (self.count - 1)
        return Gaussian(self.origin + offset, sigma)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return the FID (Heusel et al., 2017, arXiv 1706.08500, eq. 6).

    The trace of sqrt(A B) is the sum of the square roots of the eigenvalues of A^1/2 B A^1/2. That matrix is
    symmetric and positive semi-definite, so singular covariances need no special treatment.
    """
    values, vectors = np.linalg.eigh(a.sigma)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = root @ b.sigma @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
    return float(np.square(a.mu - b.mu).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross)


def inception_score(probabilities: np.ndarray, split: int = 5000) -> float:
    """Return the inception score: exp(mean KL(p(y|x) || p(y))), averaged over splits in file order.

    Salimans et al., 2016, arXiv 1606.03498. ``probabilities`` is [N, classes] and sums to 1 for each image;
    ``split`` is the number of images per split.
    """
    scores = []
    for start in range(0, len(probabilities), split):
        part = probabilities[start : start + split].astype(np.float64)
        marginal = part.mean(0, keepdims=True)
        ratio = np.log(np.where(part > 0, part, 1)) - np.log(np.where(marginal > 0, marginal, 1))
        scores.append(np.exp((part * ratio).sum(1).mean()))
    return float(np.mean(scores))


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distances [n, m] >= 0 between features [n, D] and [m, D]."""
    partial_sums = torch.addmm(b.square().sum(1)[None], a, b.T, alpha=-2)
    return partial_sums.add_(a.square().sum(1)[:, None]).clamp_(min=0)


def ball_radii(features: Tensor, k: int = 3, block: int = 1000) -> Tensor:
    """Return the squared distance [N] of each feature [N, D] to its k-th nearest neighbour."""
    return torch.cat(
        [
            # k + 1, because each feature is its own nearest neighbour
            squared_distances(part, features).topk(k + 1, largest=False).values[:, -1]
            for part in features.split(block)
        ]
    )


def precision_recall(
    samples: np.ndarray,
    reference: np.ndarray,
    k: int = 3,
    block: int = 1000,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Return (precision, recall).

    Precision is the share of samples inside a ball around a reference feature, recall the share of references
    inside a ball around a sample feature. The radius of a ball is the distance to the k-th nearest neighbour.

    Kynkäänniemi et al., 2019, arXiv 1904.06991, eqs. 1 and 2.
    """
    own, real = (torch.from_numpy(x).to(device).double() for x in (samples, reference))
    own_radii, real_radii = ball_radii(own, k, block), ball_radii(real, k, block)
    covered, inside = torch.zeros(len(real), dtype=torch.bool, device=device), []
    for part, radii in zip(own.split(block), own_radii.split(block)):
        distance = squared_distances(part, real)
        inside.append((distance <= real_radii).any(1))
        covered |= (distance <= radii[:, None]).any(0)
    return torch.cat(inside).double().mean().item(), covered.double().mean().item()
