"""Sampling of tokens: options, filters, noise, one decoding step, and the loop over the steps."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.utils.errors import UserError
from models.utils.limits import Limited, Limits
from models.utils.precision import SAMPLED_LOGITS, row_chunks

# At this temperature sampling already picks the most likely token, and below it the division would overflow.
LOWEST_TEMPERATURE = 1e-6
NOT_FINITE = -1  # stands for a token whose logits were not finite


@dataclass(frozen=True)
class SamplingOptions(Limited):
    """Options of sampling. Raises UserError for values outside ``limits``.

    cfg_scale: guidance scale s >= 0 in logits = uncond + s * (cond - uncond). At 1 there is no guidance
        and no unconditional pass (Ho & Salimans, 2022, arXiv 2207.12598, in LlamaGen's notation).
    cfg_schedule: "constant", or "linear": s - 1 grows from 0 at the first decoding step to its
        full value at the last (VAR's schedule; its own cfg is s - 1).
    cfg_interval: number of decoding steps at the start that are guided (LlamaGen: tokens, VAR: levels),
        >= 1; None guides all.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: after top_k, keep the smallest set with this share of the remaining probability, in (0, 1].
    temperature: divides the logits before the filters, >= 1e-6.
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
        """Return the guidance scale of decoding step ``decoding_step`` (from 0) out of ``decoding_steps``."""
        if self.cfg_interval is not None and decoding_step >= self.cfg_interval:
            return 1.0
        progress = 1.0 if self.cfg_schedule == "constant" else decoding_step / max(decoding_steps - 1, 1)
        return 1.0 + (self.cfg_scale - 1.0) * progress


class DecodingState(ABC):
    """The state of a batch during decoding, such as caches, sums and vectors of the class.

    ``ARImageModel.begin`` creates it and ``next_logits`` changes it. Every tensor has one batch entry for
    each label that ``begin`` got.
    """

    @abstractmethod
    def keep_rows(self, rows: int) -> None:
        """Drop all batch entries except the first ``rows``.

        When guidance ends, the unconditional half is no longer needed.
        """

    def reach(self, steps: int) -> None:  # noqa: B027, most states have nothing to do
        """Tell a static state that only the first ``steps`` steps are run until the next call."""


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Apply temperature, then top-k, then top-p on the tokens left; removed tokens get -inf.

    logits [..., V] -> [..., V] float32. At least one token is kept.
    """
    logits = logits.float() / options.temperature
    vocab = logits.shape[-1]
    keep = None
    if 0 < options.top_k < vocab:
        ordered, order = logits.topk(options.top_k, dim=-1)
        keep = logits >= ordered[..., -1:]
    elif options.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
    if options.top_p < 1.0:
        top_k_logits = logits if keep is None else logits.masked_fill(~keep, -torch.inf)
        probs = (ordered - top_k_logits.logsumexp(-1, keepdim=True)).exp()
        remove = probs.cumsum(-1) - probs > options.top_p  # the tokens before this one suffice
        remove[..., 0] = False
        # Tokens outside ``order`` that equal its last logit are kept or removed together with it.
        others = remove[..., -1:] if keep is None else ~keep | remove[..., -1:]
        keep = ~others.expand_as(logits).scatter(-1, order, remove)
    return logits if keep is None else logits.masked_fill(~keep, -torch.inf)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """Compute x ^= x >> bits in place, treating int32 as unsigned."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def exponential_noise(uniforms: Tensor, count: int) -> Tensor:
    """Return independent Exp(1) numbers [..., count] float32 from uniform numbers [...] in [0, 1).

    The hash triple32 (C. Wellons, hash-prospector) is applied to a counter, with the bits of the uniform
    number as key. This is integer arithmetic, so the result is the same on every device and at every batch
    size. It needs only 32 bits, of which CPUs compute eight or more values at a time.
    """
    key = uniforms.double().view(torch.int64)
    low, high = key.int().unsqueeze(-1), (key >> 20).int().unsqueeze(-1)
    x = torch.arange(count, dtype=torch.int32, device=uniforms.device) * (0x9E3779B9 - 2**32) + low
    x = _xor_shift(x, 17).mul_(0xED5AD4BB - 2**32).bitwise_xor_(high)
    x = _xor_shift(x, 11).mul_(0xAC4C1B51 - 2**32)
    x = _xor_shift(_xor_shift(x, 15).mul_(0x31848BAB), 14)
    fraction = ((x >> 1) & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return fraction.neg_().log1p_().neg_()  # log1p is accurate near 0, and the smallest numbers decide


def sample_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample from softmax(logits): logits [..., V], uniforms [...] in [0, 1) -> token indices [...] int64.

    One uniform number decides one token. So a sample depends only on its own random stream, never on the
    other images of the batch. The token is argmax(logits - log(Exp(1) noise)), the Gumbel-max trick. The
    logits are rounded differently at different batch sizes. That changes a token only if the two largest
    values are closer than the rounding error, which is far rarer than with the inverse of the cumulative
    distribution.
    """
    vocab = logits.shape[-1]
    flat, flat_uniforms = logits.float().reshape(-1, vocab), uniforms.reshape(-1)
    # Compiled, noise and argmax are one kernel that stores no intermediate tensor: no chunks are needed.
    parts = [slice(None)] if torch.compiler.is_compiling() else row_chunks(flat, vocab, SAMPLED_LOGITS)
    return torch.cat(
        [(flat[part] - exponential_noise(flat_uniforms[part], vocab).log_()).argmax(-1) for part in parts]
    ).view(uniforms.shape)


def guided_steps(options: SamplingOptions, steps: int) -> int:
    """Return how many steps run the unconditional half of the batch.

    It runs in all steps up to the last guided one, since that step reads its cache.
    """
    scales = (options.scale_at(decoding_step, steps) for decoding_step in range(steps))
    return max((i + 1 for i, scale in enumerate(scales) if scale != 1.0), default=0)


def draw_step(
    logits: Tensor, uniforms: Tensor, scale: float | Tensor | None, options: SamplingOptions
) -> tuple[Tensor, Tensor]:
    """Sample the tokens of one decoding step from its logits, with guidance and filters.

    Args:
        logits: [B, m, V]; with guidance [2 B, m, V], the unconditional ones last.
        uniforms: one number for each token that this step produces [B, m].
        scale: guidance scale, a number or [1]; None: without guidance.

    Returns:
        the tokens [B, m] int64, and whether all logits of a batch entry were finite, bool [B].
    """
    if scale is not None:
        cond, uncond = logits.float().chunk(2)
        logits = uncond + scale * (cond - uncond)
    low, high = logits.flatten(1).aminmax(dim=1)  # both are NaN if a logit is
    finite = (torch.maximum(high, -low).float() / options.temperature).isfinite()
    return sample_tokens(filter_logits(logits, options), uniforms), finite


@torch.inference_mode()
def generate_tokens(model: Any, labels: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    """Return tokens [B, L] of classes [B], sampled from an ``ARImageModel`` with uniforms [B, L].

    ``ARImageModel.generate`` describes the arguments. If any logits of an image are not finite, all its
    tokens are NOT_FINITE. ``require_finite`` turns them into an error once per batch, so that no decoding
    step waits for the device.
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
            step_tokens, step_finite = draw_step(logits, noise, scale, options)
            tokens, finite = torch.cat([tokens, step_tokens], dim=1), finite & step_finite
    return tokens.masked_fill(~finite[:, None], NOT_FINITE)


def with_unconditional(labels: Tensor, null_class: int) -> Tensor:
    """Return the labels [B] followed by B times the null class: [2 B]."""
    return torch.cat([labels, torch.full_like(labels, null_class)])


def attention_kernels() -> AbstractContextManager:
    """Context manager that excludes cuDNN's attention, which builds a plan for every length of the cache."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def require_finite(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tokens of ``generate_tokens`` unchanged. Waits for the device.

    dtype: the precision in which the transformer ran; it is only named in the error.

    Raises:
        UserError: some tokens were sampled from logits that were not finite.
    """
    bad = int((tokens == NOT_FINITE).any(1).sum())
    if bad:
        cause = (
            "float16 overflow is the likely cause; use --dtype bfloat16 or float32"
            if dtype == torch.float16
            else f"in {str(dtype).removeprefix('torch.')} the weights or --cfg-scale are too large"
        )
        raise UserError(f"--dtype: the logits of {bad} of {len(tokens)} images are not finite; {cause}")
    return tokens
