"""Condition Contrastive Alignment and the losses it is compared with (arXiv 2410.09347).

All losses act on sequence log-likelihoods log p(x|c), summed over the tokens of an image. The
implicit reward is r(x, c) = log p_theta(x|c) - log p_ref(x|c) with the frozen pretrained model
as reference.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum over tokens of log softmax(logits)[token]: [B, L, V], [B, L] -> [B], in float32."""
    return -F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape).sum(1)
