"""What every backbone offers to the loss, the trainer, the sampler and the evaluator."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cca.logprob import linear_sequence_logprob, row_chunks


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
        of the remaining probability, in (0, 1]. temperature: divides the logits first, > 0.
    """

    cfg_scale: float = 1.0
    cfg_schedule: str = "constant"
    cfg_interval: int | None = None
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0

    def scale_at(self, step: int, steps: int) -> float:
        """Guidance scale of decoding step ``step`` out of ``steps``."""
        if self.cfg_interval is not None and step >= self.cfg_interval:
            return 1.0
        progress = 1.0 if self.cfg_schedule == "constant" else step / max(steps - 1, 1)
        return 1.0 + (self.cfg_scale - 1.0) * progress


class LayerCache(NamedTuple):
    """One layer's keys and values [rows, heads, final length, head_dim]; ``length`` positions are filled."""

    keys: Tensor
    values: Tensor
    length: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store those of the next n positions, [rows, heads, n, head_dim]; returns everything stored so far."""
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


# Logits that a draw works on at a time; on a CPU all of it stays in the cache.
DRAWN_LOGITS = {"cuda": 2**24, "cpu": 2**18}


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


class ARTransformer(nn.Module, ABC):
    """The trained part of a model. Its forward pass is the log-likelihood, so that data-parallel
    wrappers see all of it, and the logits of a batch never exist at once."""

    checkpointing = False  # recompute each block in the backward pass instead of keeping its activations
    float32_parts: tuple[
        str, ...
    ] = ()  # children that stay in float32 under autocast, the output layer among them

    @property
    @abstractmethod
    def stack(self) -> nn.ModuleList:
        """The transformer blocks."""

    @abstractmethod
    def hidden(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """What the output layer takes, [B, L, dim], in teacher forcing (see ``ARImageModel.inputs``)."""

    @abstractmethod
    def output_layer(self) -> nn.Linear:
        """The layer that makes the logits."""

    @abstractmethod
    def init_weights(self) -> None:
        """Random start for pretraining."""

    def store_matrices(self, dtype: torch.dtype) -> None:
        """Keep the weights of the linear layers in the precision that autocast gives them.

        The numbers are the same to the last bit. Without gradients autocast casts every weight
        anew in each forward pass: at one token per pass that takes longer than the pass itself.
        """
        for name, child in self.named_children():
            for module in child.modules() if name not in self.float32_parts else ():
                if isinstance(module, nn.Linear):
                    module.to(dtype)

    def logits(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Teacher-forced float32 logits [B, L, V]."""
        return self.to_logits(self.hidden(labels, inputs))

    def to_logits(self, hidden: Tensor) -> Tensor:
        """The output layer: [B, n, dim] -> float32 [B, n, V]."""
        device = hidden.device.type
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not self.float32_parts):
            return self.output_layer()(hidden).float()

    def forward(self, labels: Tensor, inputs: Tensor, tokens: Tensor) -> Tensor:
        """log p(tokens | label) [B] float32 of tokens [B, L] under labels [B]."""
        hidden, layer = self.hidden(labels, inputs), self.output_layer()
        # The precision that the layer would compute in: autocast's, where it is on, else its own.
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device) and not self.float32_parts
            else layer.weight.dtype
        )
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return linear_sequence_logprob(hidden.to(dtype), layer.weight.to(dtype), bias, tokens)

    def run_block(self, block: nn.Module, *arguments) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)


class ARImageModel(nn.Module, ABC):
    """A class-conditional autoregressive image model: a transformer and its frozen tokenizer.

    Class labels run from 0 to ``num_classes - 1``; ``null_class`` = ``num_classes`` stands for
    "no condition". Tokens are int64 [B, sequence_length]; images are [B, 3, H, W] in [-1, 1].
    """

    transformer: ARTransformer
    tokenizer: nn.Module
    num_classes: int
    vocab_size: int
    step_sizes: tuple[int, ...]  # tokens produced by each decoding step
    image_size: int
    default_cfg_schedule: str
    checkpoint_name: str  # the file a trainer writes, as the official code names it
    decodes_in_half_precision: bool  # whether published sampling decodes in the transformer's precision
    no_decay: tuple[str, ...] = ()  # parameters of two or more dimensions without weight decay

    @property
    def null_class(self) -> int:
        return self.num_classes

    @property
    def sequence_length(self) -> int:
        return sum(self.step_sizes)

    @property
    def stochastic(self) -> bool:
        """Whether training mode draws random numbers (dropout, stochastic depth)."""
        rates = (getattr(m, "p", 0) or getattr(m, "rate", 0) for m in self.transformer.modules())
        return any(rate > 0 for rate in rates)

    @abstractmethod
    def inputs(self, tokens: Tensor) -> Tensor:
        """What the transformer sees of tokens [B, L] in teacher forcing, one row per image."""

    @abstractmethod
    def begin(self, labels: Tensor) -> object:
        """Decoding state for one row per label [rows]; it has ``cache``, a KVCache."""

    @abstractmethod
    def step(self, state: object, step: int, tokens: Tensor) -> Tensor:
        """Logits [rows, step_sizes[step], V], given all earlier tokens [rows, n]."""

    @abstractmethod
    def to_uint8(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] -> uint8, rounded as the backbone's published sampling script does."""

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> tokens [B, L] int64."""
        return self.tokenizer.encode(images)

    def decode(self, tokens: Tensor, size: int | None = None) -> Tensor:
        """Tokens [B, L] -> images [B, 3, H, W] in [-1, 1], resized (bicubic) to side ``size`` if given."""
        images = self.tokenizer.decode(tokens).float()
        if size and size != images.shape[-1]:
            images = F.interpolate(images, size=(size, size), mode="bicubic")
        return images.clamp(-1, 1)  # after resizing, as the published LlamaGen script does

    def logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Teacher-forced float32 logits [B, L, V] of tokens [B, L] under labels [B]."""
        return self.transformer.logits(labels, self.inputs(tokens))

    def sequence_logprob(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """log p(tokens | label), summed over all tokens of an image: [B], [B, L] -> [B] float32."""
        return self.transformer(labels, self.inputs(tokens), tokens)

    def generate(
        self, labels: Tensor, uniforms: Tensor, options: SamplingOptions = SamplingOptions()
    ) -> Tensor:
        """Sample tokens.

        Args:
            labels: classes [B] int64.
            uniforms: one random number in [0, 1) per token [B, L].
            options: guidance and filters.

        Returns:
            tokens [B, L] int64.
        """
        return self._generate(labels, uniforms, options).clone()  # no inference tensor: it may be trained on

    @torch.inference_mode()
    def _generate(self, labels: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
        rows, steps = labels.shape[0], len(self.step_sizes)
        scales = [options.scale_at(step, steps) for step in range(steps)]
        # The unconditional rows must run up to the last guided step, to have their cache filled.
        guided_steps = max((step + 1 for step, scale in enumerate(scales) if scale != 1.0), default=0)
        if guided_steps:
            state = self.begin(torch.cat([labels, torch.full_like(labels, self.null_class)]))
        else:
            state = self.begin(labels)
        tokens = labels.new_empty(rows, 0)
        for step, size in enumerate(self.step_sizes):
            if step < guided_steps:
                cond, uncond = self.step(state, step, tokens.repeat(2, 1)).float().chunk(2)
                logits = uncond + scales[step] * (cond - uncond)
            else:
                if step and step == guided_steps:
                    state.keep_rows(rows)
                logits = self.step(state, step, tokens)
            noise = uniforms[:, tokens.shape[1] : tokens.shape[1] + size]
            tokens = torch.cat([tokens, draw_tokens(filter_logits(logits, options), noise)], dim=1)
        return tokens
