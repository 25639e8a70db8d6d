"""Sequence log-likelihoods, computed from logits or, in chunks, from the input of the output layer.

The logits of a batch are by far the largest tensor of a training step. 64 pairs of LlamaGen at
384 pixels have 128 x 576 x 16,384 float32 logits, 4.8 GB, and log_softmax and its backward pass hold
several copies. Here the logits exist only for one chunk of tokens at a time. The backward pass computes
them again.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.utils.precision import LIKELIHOOD_LOGITS, row_chunks

Layer = tuple[Tensor, Tensor | None]  # weight [V, D], bias [V] or None


def check_tokens(tokens: Tensor, shape: Sequence[int], vocab_size: int) -> None:
    """Raise ValueError unless tokens have this shape [B, L] and values in 0 … vocab_size - 1.

    The values are checked only on the CPU, because on a GPU the check would make the host wait.
    """
    if tokens.ndim != 2 or list(tokens.shape) != list(shape):
        raise ValueError(f"tokens are {list(tokens.shape)}; expected {list(shape)}")
    if tokens.device.type == "cpu" and not ((tokens >= 0) & (tokens < vocab_size)).all():
        raise ValueError(
            f"tokens are {int(tokens.min())} … {int(tokens.max())}; expected 0 … {vocab_size - 1}"
        )


def sequence_logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the sum over tokens of log softmax(logits)[token]: [B, L, V], [B, L] -> [B] float32.

    Raises ValueError for invalid tokens (see ``check_tokens``).
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
    """Return ``sequence_logprob(F.linear(hidden, weight, bias), tokens)``, computed in chunks of tokens.

    Args:
        hidden: [B, L, D]; weight: [V, D]; bias: [V] or None. All have one dtype, that of the matmuls.
        tokens: [B, L] int64.
        compiled: compile the computation of a chunk, for chunks of any size.

    Returns:
        [B] float32.

    Raises:
        ValueError: the tokens are invalid (see ``check_tokens``).
    """
    check_tokens(tokens, hidden.shape[:-1], len(weight))
    logprob = _LinearLogprob.apply(hidden.flatten(0, 1), weight, bias, tokens.flatten(), compiled)
    return logprob.view(tokens.shape).sum(1)


class _LinearLogprob(torch.autograd.Function):
    """log softmax(h W^T + b)[token] of each token; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, compiled: bool
    ) -> Tensor:
        logprob = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(logprob)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in row_chunks(hidden, len(weight), LIKELIHOOD_LOGITS):
                chunk = (logprob[part], normaliser[part], hidden[part], tokens[part])
                _run_on_chunk(chunk_logprob, compiled, chunk, (weight, bias))
        ctx.save_for_backward(hidden, weight, bias, tokens, normaliser)
        ctx.compiled = compiled
        return logprob

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, normaliser = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        # d logprob / d logits = onehot(token) - softmax(logits). ``chunk_error`` returns its negative, so the
        # incoming gradient changes sign. It multiplies the factors of width D, which is cheaper than width V.
        factor = -grad[:, None]
        with torch.autocast(hidden.device.type, enabled=False):
            for part in row_chunks(hidden, len(weight), LIKELIHOOD_LOGITS):
                chunk = (normaliser[part], factor[part], hidden[part], tokens[part])
                error, scaled_hidden = _run_on_chunk(
                    chunk_error, ctx.compiled, chunk, (weight, bias), grad_bias
                )
                torch.mm(error, weight, out=grad_hidden[part])
                if error.dtype == torch.float32:
                    grad_weight.addmm_(error.T, scaled_hidden)
                else:
                    grad_weight.add_(error.T @ scaled_hidden)
        # Autograd casts the gradients to the dtypes of the inputs.
        return grad_hidden.mul_(factor), grad_weight, grad_bias, None, None


def chunk_logprob(logprob: Tensor, normaliser: Tensor, hidden: Tensor, tokens: Tensor, layer: Layer) -> None:
    """Write log softmax(logits)[token] and log sum exp(logits) of n tokens to ``logprob`` and ``normaliser``.

    Both are [n] float32; hidden is [n, D], tokens [n].
    """
    logits = F.linear(hidden, *layer).float()
    # Unlike logsumexp, cross_entropy is fused on CPUs and GPUs.
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
    """Return softmax(logits) - onehot(token) [n, V], and hidden * factor [n, D], both in hidden's dtype.

    ``normaliser`` comes from ``chunk_logprob``, whose other arguments are the same; factor is [n, 1] float32.
    The gradient of the bias, [V] float32, is added to ``grad_bias``.
    """
    logits = F.linear(hidden, *layer).float()
    if torch.compiler.is_compiling():  # one pass over the logits; a scatter would need three
        one_hot = torch.arange(logits.shape[-1], device=tokens.device) == tokens[:, None]
        error = (logits - normaliser[:, None]).exp() - one_hot.float()
    else:
        error = logits.sub_(normaliser[:, None]).exp_()
        error.scatter_add_(-1, tokens[:, None], error.new_full((len(tokens), 1), -1.0))
    if grad_bias is not None:
        grad_bias.addmv_(error.T, factor[:, 0])
    return error.to(hidden.dtype), (hidden * factor).to(hidden.dtype)


@cache
def compiled_function(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True)


def _run_on_chunk(
    function: Callable, compiled: bool, chunk: tuple[Tensor, ...], *shared: Layer | Tensor | None
):
    """Call the function with the tensors of one chunk and with those that all chunks share."""
    if not compiled:
        return function(*chunk, *shared)
    for tensor in chunk:  # so that one graph also serves the last chunk, and micro-batches of any size
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return compiled_function(function)(*chunk, *shared)
