"""How tokens are drawn: options, filters, noise, one decoding step, and the loop over the steps."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.utils.errors import UserError
from models.utils.limits import Limited, Limits
from models.utils.precision import DRAWN_LOGITS, row_chunks

# Below it every draw is the likeliest token already, and the division would overflow.
LOWEST_TEMPERATURE = 1e-6
NOT_FINITE = -1  # the "token" where a model's logits were not finite


@dataclass(frozen=True)
class SamplingOptions(Limited):
    """How tokens are drawn. Raises UserError for values outside ``limits``.

    cfg_scale s >= 0: logits = uncond + s * (cond - uncond); 1 is guidance-free and runs no
        unconditional pass (Ho & Salimans, 2022, arXiv 2207.12598, in LlamaGen's notation).
    cfg_schedule: "constant", or "linear": s - 1 grows from 0 at the first decoding step to its
        full value at the last (VAR's schedule; its own cfg is s - 1).
    cfg_interval: guide only the first this many decoding steps (LlamaGen: tokens, VAR: levels), >= 1;
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

    limits = {
        "cfg_scale": Limits(0),
        "cfg_schedule": ("constant", "linear"),
        "cfg_interval": Limits(1, kind=int),
        "top_k": Limits(0, kind=int),
        "top_p": Limits(0, 1, above=True),
        "temperature": Limits(LOWEST_TEMPERATURE),
    }

    def scale_at(self, decoding_step: int, decoding_steps: int) -> float:
        """Guidance scale of decoding step ``decoding_step`` (from 0) out of ``decoding_steps``."""
        if self.cfg_interval is not None and decoding_step >= self.cfg_interval:
            return 1.0
        progress = 1.0 if self.cfg_schedule == "constant" else decoding_step / max(decoding_steps - 1, 1)
        return 1.0 + (self.cfg_scale - 1.0) * progress


class DecodingState(ABC):
    """What a model keeps of a batch while it decodes.

    ``ARImageModel.begin`` makes it, ``next_logits`` changes it. What it holds (caches, sums, vectors
    of the class) is the model's own affair; one row of all of it belongs to each label that
    ``begin`` was given.
    """

    @abstractmethod
    def keep_rows(self, rows: int) -> None:
        """Drop all rows but the first ``rows``: where guidance ends, the unconditional half is not needed."""

    def reach(self, steps: int) -> None:  # noqa: B027, most states have nothing to do
        """Of a static state: until this is called again no steps but the first ``steps`` are run."""


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Temperature, then top-k, then top-p on what is left; removed tokens get -inf.

    logits [..., V] -> [..., V] float32. At least one token is kept.
    """
    logits = logits.float() / options.temperature
    vocab = logits.shape[-1]
    kept = None
    if 0 < options.top_k < vocab:
        ordered, order = logits.topk(options.top_k, dim=-1)
        kept = logits >= ordered[..., -1:]
    elif options.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
    if options.top_p < 1.0:
        whole = logits if kept is None else logits.masked_fill(~kept, -torch.inf)
        probs = (ordered - whole.logsumexp(-1, keepdim=True)).exp()
        enough = probs.cumsum(-1) - probs > options.top_p  # mass before this token already suffices
        enough[..., 0] = False
        # What equals the last of the top k and is not among them goes with it.
        others = enough[..., -1:] if kept is None else ~kept | enough[..., -1:]
        kept = ~others.expand_as(logits).scatter(-1, order, enough)
    return logits if kept is None else logits.masked_fill(~kept, -torch.inf)


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


def sample_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from softmax(logits): logits [..., V], uniforms [...] in [0, 1) -> token indices [...] int64.

    One uniform number decides one token, so a sample depends on its own random stream alone,
    never on what else is in the batch. The tokens race, each with an exponential clock of its
    probability as rate (the Gumbel-max trick): rounding of the logits, which differs from one
    batch size to another, then changes a token only where the first two come in within it, far
    more rarely than with the inverse of the cumulative distribution.
    """
    vocab = logits.shape[-1]
    flat, numbers = logits.float().reshape(-1, vocab), uniforms.reshape(-1)
    # Compiled, noise and race are one kernel, which holds nothing.
    parts = [slice(None)] if torch.compiler.is_compiling() else row_chunks(flat, vocab, DRAWN_LOGITS)
    return torch.cat(
        [(flat[part] - exponential_noise(numbers[part], vocab).log_()).argmax(-1) for part in parts]
    ).view(uniforms.shape)


def guided_steps(options: SamplingOptions, steps: int) -> int:
    """How many steps need the unconditional rows: up to the last guided one, to have their cache filled."""
    scales = (options.scale_at(decoding_step, steps) for decoding_step in range(steps))
    return max((i + 1 for i, scale in enumerate(scales) if scale != 1.0), default=0)


def draw_step(
    logits: Tensor, uniforms: Tensor, scale: float | Tensor | None, options: SamplingOptions
) -> tuple[Tensor, Tensor]:
    """The rest of a decoding step: guidance, filters, draw.

    Args:
        logits: [B, m, V]; under guidance [2 B, m, V], the unconditional ones last.
        uniforms: of the tokens that this step produces [B, m].
        scale: guidance scale, a number or [1]; None: without guidance.

    Returns:
        the tokens [B, m] int64, and whether all logits of a row were finite, bool [B].
    """
    if scale is not None:
        cond, uncond = logits.float().chunk(2)
        logits = uncond + scale * (cond - uncond)
    low, high = logits.flatten(1).aminmax(dim=1)  # NaN where there is one
    finite = (torch.maximum(high, -low).float() / options.temperature).isfinite()
    return sample_tokens(filter_logits(logits, options), uniforms), finite


@torch.inference_mode()
def generate_tokens(model: Any, labels: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    """Tokens [B, L] of classes [B], from uniforms [B, L] and an ``ARImageModel``; see its ``generate``.

    Where the logits of a decoding step were not finite, all tokens of that row are NOT_FINITE:
    ``require_finite`` tells the user, once per batch, so that no step waits for the device.
    """
    rows, steps = labels.shape[0], len(model.step_sizes)
    guided = guided_steps(options, steps)
    state = model.begin(with_unconditional(labels, model.null_class) if guided else labels)
    tokens, finite = labels.new_empty(rows, 0), torch.ones_like(labels, dtype=torch.bool)
    with attention_kernels():
        for decoding_step, size in enumerate(model.step_sizes):
            if 0 < decoding_step == guided:
                state.keep_rows(rows)
            scale = options.scale_at(decoding_step, steps) if decoding_step < guided else None
            noise = uniforms[:, tokens.shape[1] : tokens.shape[1] + size]
            logits = model.next_logits(state, decoding_step, tokens if scale is None else tokens.repeat(2, 1))
            drawn, good = draw_step(logits, noise, scale, options)
            tokens, finite = torch.cat([tokens, drawn], dim=1), finite & good
    return tokens.masked_fill(~finite[:, None], NOT_FINITE)


def with_unconditional(labels: Tensor, null_class: int) -> Tensor:
    """Labels [B] and as many times the null class: [2 B]."""
    return torch.cat([labels, torch.full_like(labels, null_class)])


def attention_kernels() -> AbstractContextManager:
    """Attention without cuDNN, which builds a plan for every length of the cache."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


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
