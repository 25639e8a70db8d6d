"""How tokens are drawn: options, key/value cache, filters, noise, and the loop over the decoding steps."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.devices import DRAWN_LOGITS, row_chunks
from models.errors import UserError

if TYPE_CHECKING:
    from models.base import ARImageModel

# Below it every draw is the likeliest token already, and the division would overflow.
LOWEST_TEMPERATURE = 1e-6
NOT_FINITE = -1  # the "token" where a model's logits were not finite


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn.

    cfg_scale s: logits = uncond + s * (cond - uncond); 1 is guidance-free and runs no
        unconditional pass (Ho & Salimans, 2022, arXiv 2207.12598, in LlamaGen's notation).
    cfg_schedule: "constant", or "linear": s - 1 grows from 0 at the first decoding step to its
        full value at the last (VAR's schedule; its own cfg is s - 1).
    cfg_interval: guide only the first this many decoding steps (LlamaGen: tokens, VAR: levels);
        None guides all.
    top_k: keep the k likeliest tokens, 0 keeps all. top_p: then the smallest set with this much
        of the remaining probability, in (0, 1]. temperature: divides the logits first, >= 1e-6.
    """

    cfg_scale: float = 1.0
    cfg_schedule: str = "constant"
    cfg_interval: int | None = None
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0

    def scale_at(self, decoding_step: int, decoding_steps: int) -> float:
        """Guidance scale of decoding step ``decoding_step`` (from 0) out of ``decoding_steps``."""
        if self.cfg_interval is not None and decoding_step >= self.cfg_interval:
            return 1.0
        progress = 1.0 if self.cfg_schedule == "constant" else decoding_step / max(decoding_steps - 1, 1)
        return 1.0 + (self.cfg_scale - 1.0) * progress


class LayerCache(NamedTuple):
    """One layer's keys and values [rows, heads, final length, head_dim]; ``length`` positions are filled."""

    keys: Tensor
    values: Tensor
    length: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store those of the next n positions, [rows, heads, n, head_dim]; returns all stored so far."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Keys and values of all layers, allocated once at their final size.

    Each layer appends through ``at``; ``advance`` moves the write position after the last one.
    """

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor):
        self.layers = [
            (like.new_empty(rows, heads, length, head_dim), like.new_empty(rows, heads, length, head_dim))
            for _ in range(layers)
        ]
        self.length = 0

    def at(self, layer: int) -> LayerCache:
        return LayerCache(*self.layers[layer], self.length)

    def advance(self, n: int) -> None:
        self.length += n

    def keep_rows(self, rows: int) -> None:
        self.layers = [(k[:rows], v[:rows]) for k, v in self.layers]


class DecodingState(ABC):
    """What a model keeps of a batch while it decodes.

    ``ARImageModel.begin`` makes it, ``next_logits`` changes it. What it holds (caches, sums, vectors
    of the class) is the model's own affair; one row of all of it belongs to each label that
    ``begin`` was given.
    """

    @abstractmethod
    def keep_rows(self, rows: int) -> None:
        """Drop all rows but the first ``rows``: where guidance ends, the unconditional half is not needed."""


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Temperature, then top-k, then top-p on what is left; removed tokens get -inf.

    logits [..., V] -> [..., V] float32. At least one token is kept.
    """
    logits = logits.float() / options.temperature
    vocab = logits.shape[-1]
    if 0 < options.top_k < vocab:
        threshold = logits.topk(options.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if options.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        remove = probs.cumsum(-1) - probs > options.top_p  # mass before this token already suffices
        remove[..., 0] = False
        logits = logits.masked_fill(remove.scatter(-1, order, remove), -torch.inf)
    return logits


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """x ^= x >> bits, of int32 taken as unsigned."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def exponential_noise(uniforms: Tensor, count: int) -> Tensor:
    """Independent Exp(1) numbers [..., count] float32 from one uniform number each, [...] in [0, 1).

    A counter is hashed by triple32 (C. Wellons, hash-prospector), keyed with the bits of the
    uniform number: integer arithmetic, so every device and batch size gives the same, in 32 bits,
    which CPUs do eight or more at a time.
    """
    key = uniforms.double().view(torch.int64)
    low, high = key.int().unsqueeze(-1), (key >> 20).int().unsqueeze(-1)
    x = torch.arange(count, dtype=torch.int32, device=uniforms.device) * (0x9E3779B9 - 2**32) + low
    x = _xor_shift(x, 17).mul_(0xED5AD4BB - 2**32).bitwise_xor_(high)
    x = _xor_shift(x, 11).mul_(0xAC4C1B51 - 2**32)
    x = _xor_shift(_xor_shift(x, 15).mul_(0x31848BAB), 14)
    share = ((x >> 1) & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return share.neg_().log1p_().neg_()  # fine near 0, where races are won


def draw_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from softmax(logits): logits [..., V], uniforms [...] in [0, 1) -> token indices [...] int64.

    One uniform number decides one token, so a sample depends on its own random stream alone,
    never on what else is in the batch. The tokens race, each with an exponential clock of its
    probability as rate (the Gumbel-max trick): rounding of the logits, which differs from one
    batch size to another, then changes a token only where the first two come in within it, far
    more rarely than with the inverse of the cumulative distribution.
    """
    vocab = logits.shape[-1]
    flat, numbers = logits.float().reshape(-1, vocab), uniforms.reshape(-1)
    parts = row_chunks(flat, vocab, DRAWN_LOGITS)
    return torch.cat(
        [(flat[part] - exponential_noise(numbers[part], vocab).log_()).argmax(-1) for part in parts]
    ).view(uniforms.shape)


@torch.inference_mode()
def generate_tokens(
    model: "ARImageModel", labels: Tensor, uniforms: Tensor, options: SamplingOptions
) -> Tensor:
    """Tokens [B, L] of classes [B], from uniforms [B, L]; see ``ARImageModel.generate``.

    Where the logits of a decoding step were not finite, all tokens of that row are NOT_FINITE:
    ``require_finite`` tells the user, once per batch, so that no step waits for the device.
    """
    rows, steps = labels.shape[0], len(model.step_sizes)
    scales = [options.scale_at(decoding_step, steps) for decoding_step in range(steps)]
    # The unconditional rows must run up to the last guided step, to have their cache filled.
    guided_steps = max((i + 1 for i, scale in enumerate(scales) if scale != 1.0), default=0)
    if guided_steps:
        state = model.begin(torch.cat([labels, torch.full_like(labels, model.null_class)]))
    else:
        state = model.begin(labels)
    tokens, finite = labels.new_empty(rows, 0), torch.ones_like(labels, dtype=torch.bool)
    for decoding_step, size in enumerate(model.step_sizes):
        if decoding_step < guided_steps:
            cond, uncond = model.next_logits(state, decoding_step, tokens.repeat(2, 1)).float().chunk(2)
            logits = uncond + scales[decoding_step] * (cond - uncond)
        else:
            if 0 < decoding_step == guided_steps:
                state.keep_rows(rows)
            logits = model.next_logits(state, decoding_step, tokens)
        low, high = logits.flatten(1).aminmax(dim=1)  # NaN where there is one
        finite &= (torch.maximum(high, -low).float() / options.temperature).isfinite()
        noise = uniforms[:, tokens.shape[1] : tokens.shape[1] + size]
        tokens = torch.cat([tokens, draw_tokens(filter_logits(logits, options), noise)], dim=1)
    return tokens.masked_fill(~finite[:, None], NOT_FINITE)


def require_finite(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The tokens of ``generate_tokens`` as they are; waits for the device.

    dtype: the precision that the transformer ran in.

    Raises:
        UserError: some of them were drawn from logits that were not finite.
    """
    bad = int((tokens == NOT_FINITE).any(1).sum())
    if bad:
        cause = (
            "float16 overflow is the likely cause: --dtype bfloat16 or float32 has the range"
            if dtype == torch.float16
            else f"in {str(dtype).removeprefix('torch.')} the weights or --cfg-scale are too large"
        )
        raise UserError(f"--dtype: the logits of {bad} of {len(tokens)} images are not finite; {cause}")
    return tokens
