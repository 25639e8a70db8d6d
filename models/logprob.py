"""Sequence log-likelihoods: plain from logits, and straight from hidden states without ever holding them all.

The logits of a batch are by far the largest tensor of a training step: 64 pairs of LlamaGen at
384 pixels make 128 x 576 x 16,384 float32 values, 4.8 GB, several times over in log_softmax and
its backward. Here they exist for a chunk of tokens at a time, in the forward and again in the
backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.devices import LIKELIHOOD_LOGITS, row_chunks


def sequence_logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum over tokens of log softmax(logits)[token]: [B, L, V], [B, L] -> [B], in float32."""
    return (
        -F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
        .view(tokens.shape)
        .sum(1)
    )


def linear_sequence_logprob(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    """``sequence_logprob(F.linear(hidden, weight, bias), tokens)``, chunked over tokens.

    hidden [B, L, D], weight [V, D], bias [V] or None, all of one dtype, in which the products are
    computed; tokens [B, L] int64 -> [B] float32.
    """
    flat = _LinearLogprob.apply(hidden.flatten(0, 1), weight, bias, tokens.flatten())
    return flat.view(tokens.shape).sum(1)


class _LinearLogprob(torch.autograd.Function):
    """log softmax(h W^T + b)[token] of each row; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
        logprob = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(logprob)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in row_chunks(hidden, len(weight), LIKELIHOOD_LOGITS):
                logits = F.linear(hidden[part], weight, bias).float()
                # Fused on CPU as on GPU, unlike logsumexp.
                logprob[part] = -F.cross_entropy(logits, tokens[part], reduction="none")
                normaliser[part] = logits.gather(-1, tokens[part, None])[:, 0] - logprob[part]
        ctx.save_for_backward(hidden, weight, bias, tokens, normaliser)
        return logprob

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, normaliser = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in row_chunks(hidden, len(weight), LIKELIHOOD_LOGITS):
                logits = F.linear(hidden[part], weight, bias).float()
                # d logprob / d logits = onehot(token) - softmax(logits); its factor per row, the incoming
                # gradient, goes to the narrow side of the products.
                grad_logits = logits.sub_(normaliser[part, None]).exp_().neg_()
                grad_logits.scatter_add_(-1, tokens[part, None], torch.ones_like(grad[part, None]))
                factor = grad[part, None]
                if grad_bias is not None:
                    grad_bias.addmv_(grad_logits.T, factor[:, 0])
                grad_logits = grad_logits.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (grad_logits @ weight).mul_(factor)
                if grad_weight is not None:
                    scaled = (hidden[part] * factor).to(hidden.dtype)
                    grad_weight.addmm_(
                        grad_logits.T, scaled
                    ) if hidden.dtype == torch.float32 else grad_weight.add_(grad_logits.T @ scaled)
        return grad_hidden, _cast(grad_weight, weight), _cast(grad_bias, bias), None


def _cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if grad is None or like is None else grad.to(like.dtype)
