"""Sequence log-likelihoods: plain from logits, and straight from hidden states without ever holding them all.

The logits of a batch are by far the largest tensor of a training step: 64 pairs of LlamaGen at
384 pixels make 128 x 576 x 16,384 float32 values, 4.8 GB, several times over in log_softmax and
its backward. Here they exist for a chunk of tokens at a time, in the forward and again in the
backward pass.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.utils.precision import LIKELIHOOD_LOGITS, row_chunks

Layer = tuple[Tensor, Tensor | None]  # weight [V, D], bias [V] or None


def check_tokens(tokens: Tensor, shape: Sequence[int], vocab_size: int) -> None:
    """Raise ValueError for tokens that are not [B, L] of that shape, or that are outside 0 … vocab_size - 1.

    Only on the CPU are their values looked at: a GPU would have to be waited for.
    """
    if tokens.ndim != 2 or list(tokens.shape) != list(shape):
        raise ValueError(f"tokens are {list(tokens.shape)}; expected {list(shape)}")
    if tokens.device.type == "cpu" and not ((tokens >= 0) & (tokens < vocab_size)).all():
        raise ValueError(
            f"tokens are {int(tokens.min())} … {int(tokens.max())}; expected 0 … {vocab_size - 1}"
        )


def sequence_logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum over tokens of log softmax(logits)[token]: [B, L, V], [B, L] -> [B], in float32.

    Raises ValueError for other tokens (see ``check_tokens``).
    """
    check_tokens(tokens, logits.shape[:-1], logits.shape[-1])
    return (
        -F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
        .view(tokens.shape)
        .sum(1)
    )


def linear_sequence_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, compiled: bool = False
) -> Tensor:
    """``sequence_logprob(F.linear(hidden, weight, bias), tokens)``, chunked over tokens.

    hidden [B, L, D], weight [V, D], bias [V] or None, all of one dtype, in which the products are
    computed; tokens [B, L] int64 -> [B] float32. ``compiled``: by compiled functions of a chunk, which
    serve chunks of any size. Raises ValueError for other tokens (see ``check_tokens``).
    """
    check_tokens(tokens, hidden.shape[:-1], len(weight))
    logprob = _LinearLogprob.apply(hidden.flatten(0, 1), weight, bias, tokens.flatten(), compiled)
    return logprob.view(tokens.shape).sum(1)


class _LinearLogprob(torch.autograd.Function):
    """log softmax(h W^T + b)[token] of each row; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, compiled: bool
    ) -> Tensor:
        logprob = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(logprob)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in row_chunks(hidden, len(weight), LIKELIHOOD_LOGITS):
                rows = (logprob[part], normaliser[part], hidden[part], tokens[part])
                _of_chunk(chunk_logprob, compiled, rows, (weight, bias))
        ctx.save_for_backward(hidden, weight, bias, tokens, normaliser)
        ctx.compiled = compiled
        return logprob

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, normaliser = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        # d logprob / d logits = onehot(token) - softmax(logits), of which a chunk gives the negative; its
        # factor per row, the incoming gradient, goes to the narrow side of the products.
        factor = -grad[:, None]
        with torch.autocast(hidden.device.type, enabled=False):
            for part in row_chunks(hidden, len(weight), LIKELIHOOD_LOGITS):
                rows = (normaliser[part], factor[part], hidden[part], tokens[part])
                error, scaled = _of_chunk(chunk_error, ctx.compiled, rows, (weight, bias), grad_bias)
                torch.mm(error, weight, out=grad_hidden[part])
                grad_weight.addmm_(error.T, scaled) if error.dtype == torch.float32 else grad_weight.add_(
                    error.T @ scaled
                )
        return grad_hidden.mul_(factor), grad_weight, grad_bias, None, None  # autograd casts them


def chunk_logprob(logprob: Tensor, normaliser: Tensor, hidden: Tensor, tokens: Tensor, layer: Layer) -> None:
    """Fill in log softmax(logits)[token] and log sum exp(logits), both [n] float32, of n tokens.

    hidden [n, D], tokens [n].
    """
    logits = F.linear(hidden, *layer).float()
    # Fused on CPU as on GPU, unlike logsumexp.
    logprob.copy_(-F.cross_entropy(logits, tokens, reduction="none"))
    normaliser.copy_(logits.gather(-1, tokens[:, None])[:, 0] - logprob)


def chunk_error(
    normaliser: Tensor,
    factor: Tensor,
    hidden: Tensor,
    tokens: Tensor,
    layer: Layer,
    grad_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softmax(logits) - onehot(token) [n, V], and hidden * factor [n, D], both in hidden's dtype.

    Arguments as those of ``chunk_logprob``, whose normaliser it takes; factor [n, 1] float32. The gradient
    of the bias, [V] float32, is added to ``grad_bias``.
    """
    logits = F.linear(hidden, *layer).float()
    if torch.compiler.is_compiling():  # one pass over the logits, which a scatter would make three
        hit = torch.arange(logits.shape[-1], device=tokens.device) == tokens[:, None]
        error = (logits - normaliser[:, None]).exp() - hit.float()
    else:
        error = logits.sub_(normaliser[:, None]).exp_()
        error.scatter_add_(-1, tokens[:, None], error.new_full((len(tokens), 1), -1.0))
    if grad_bias is not None:
        grad_bias.addmv_(error.T, factor[:, 0])
    return error.to(hidden.dtype), (hidden * factor).to(hidden.dtype)


@cache
def compiled_function(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True)


def _of_chunk(function: Callable, compiled: bool, rows: tuple[Tensor, ...], *others: Layer | Tensor | None):
    """The function of the rows of a chunk and of what all chunks share."""
    if not compiled:
        return function(*rows, *others)
    for tensor in rows:  # one graph serves the last chunk too, and micro-batches of any size
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return compiled_function(function)(*rows, *others)
