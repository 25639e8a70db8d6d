"""VAR (Tian et al., 2024, arXiv 2404.02905): next-scale prediction.

State-dict keys are those of the published checkpoints. So the published files load here, and files
saved here load in the official code with ``strict=True``.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import ARImageModel, ARTransformer
from models.kv_cache import KVCache, LayerCache
from models.sampling import DecodingState
from models.transforms import RandomCrop
from models.utils.precision import autocast_dtype
from models.var_tokenizer import TokenizerConfig, VARTokenizer


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; ``drop_path_rate`` is the stochastic depth of the last block (first: 0)."""

    dim: int
    depth: int
    heads: int
    vocab_size: int = 4096
    num_classes: int = 1000
    shared_adaln: bool = False
    drop_path_rate: float = 0.0


class LinearOfBias(nn.Linear):
    """A linear layer that takes its bias as an argument. As a module call, FSDP's hooks see its use."""

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(input, self.weight, bias)


class Attention(nn.Module):
    """Attention with L2-normalised queries and keys and a learned temperature per head."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.mat_qkv = LinearOfBias(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.zero_k_bias = nn.Buffer(torch.zeros(dim, device="cpu"))
        self.proj = nn.Linear(dim, dim)

    def bias(self) -> Tensor:
        """Return the bias of queries, keys (zero) and values [1, 1, 3 dim], in the dtype of the matmul."""
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        return bias.to(autocast_dtype(bias.device, bias.dtype))[None, None]

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        q, k, v = self.mat_qkv(x, bias.flatten()).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        temperature = self.scale_mul_1H11.clamp_max(math.log(100.0)).exp()
        q, k = (
            (F.normalize(q.float(), dim=-1) * temperature).type_as(v),
            F.normalize(k.float(), dim=-1).type_as(v),
        )
        if cache is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        else:
            out = cache.attend(q, k, v, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


Modulation = tuple[Tensor, ...]


class Block(nn.Module):
    """A pre-norm block whose norms and residual gains depend on the class (adaptive LayerNorm)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim = config.dim
        self.attn = Attention(dim, config.heads)
        self.ffn = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU("tanh"), fc2=nn.Linear(4 * dim, dim))
        )
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, dim))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def modulation(self, condition: Tensor) -> Modulation:
        """Return gamma1, gamma2, scale1, scale2, shift1, shift2, each [B, 1, dim], and attention's bias.

        condition: the class embedding [B, dim]; with shared_adaln the shared vectors [B, 1, 6, dim].
        """
        vectors = (
            self.ada_lin(condition).view(-1, 1, 6, condition.shape[-1])
            if condition.ndim == 2
            else self.ada_gss + condition
        )
        return *vectors.unbind(2), self.attn.bias()

    def forward(
        self,
        x: Tensor,
        condition: Tensor | Modulation,
        mask: Tensor | None,
        cache: LayerCache | None,
        branch_factors: Tensor | None = None,
    ) -> Tensor:
        """Run the block on x [B, n, dim].

        condition: the argument of ``modulation``, or its result, which sampling computes once per image.
        branch_factors: factors of the residual branches [2, B, 1, 1] (see ``VARTransformer.drop_path``).
        """
        modulation = self.modulation(condition) if isinstance(condition, Tensor) else condition
        gamma1, gamma2, scale1, scale2, shift1, shift2, bias = modulation
        attention = self.attn(_norm(x) * (1 + scale1) + shift1, bias, mask, cache)
        x = x + _scale_branch(attention * gamma1, branch_factors, 0)
        return x + _scale_branch(self.ffn(_norm(x) * (1 + scale2) + shift2) * gamma2, branch_factors, 1)


def _scale_branch(branch: Tensor, factors: Tensor | None, index: int) -> Tensor:
    return branch if factors is None else branch * factors[index].type_as(branch)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


@dataclass
class VARState(DecodingState):
    """Tensors that depend only on the class; in sampling also the results of earlier steps."""

    condition: Tensor
    # One for each block: the modulation, or in training the ``condition`` argument to compute it from.
    modulations: Sequence[Tensor | Modulation]
    head_modulation: Modulation
    cache: KVCache = field(init=False)  # only in sampling
    # Sum of the levels decoded so far, stored so that each level is added only once.
    reconstruction: Tensor | None = None

    def keep_rows(self, rows: int) -> None:
        self.condition = self.condition[:rows]
        self.modulations = [tuple(t[:rows] for t in m) for m in self.modulations]
        self.head_modulation = tuple(t[:rows] for t in self.head_modulation)
        self.cache.keep_rows(rows)
        if self.reconstruction is not None:
            self.reconstruction = self.reconstruction[:rows]


class VARTransformer(ARTransformer):
    once_per_image = ("ada_lin",)

    def __init__(self, config: TransformerConfig, patch_nums: tuple[int, ...], code_dim: int):
        super().__init__()
        dim, length = config.dim, sum(p * p for p in patch_nums)
        self.config = config
        self.pos_start = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_1LC = nn.Parameter(torch.zeros(1, length, dim))
        with torch.device("cpu"):  # constants need values even if the parameters are on the meta device
            level = torch.arange(len(patch_nums)).repeat_interleave(torch.tensor([p * p for p in patch_nums]))
            causal = torch.where(level[:, None] >= level[None], 0.0, -torch.inf)
        self.lvl_1L, self.attn_bias_for_masking = nn.Buffer(level[None]), nn.Buffer(causal[None, None])
        self.word_embed = nn.Linear(code_dim, dim)
        self.class_emb = nn.Embedding(config.num_classes + 1, dim)
        self.lvl_embed = nn.Embedding(len(patch_nums), dim)
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.drop_path_rates = np.linspace(0, config.drop_path_rate, config.depth).tolist()
        self.drop_path_rate = self.drop_path_rates[-1]
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = nn.Sequential(OrderedDict(ada_lin=nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))))
        self.head = nn.Linear(dim, config.vocab_size)

    def init_weights(self) -> None:
        """Initialise for pretraining; gains start at 0.5 so that all blocks train from the first steps."""
        std = math.sqrt(1 / (3 * self.config.dim))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for parameter in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(parameter, std=std)
        self.head.weight.data.mul_(0.02)
        for block in cast(list[Block], self.blocks):
            block.attn.proj.weight.data.div_(math.sqrt(2 * self.config.depth))
            cast(nn.Linear, block.ffn.fc2).weight.data.div_(math.sqrt(2 * self.config.depth))
            if not self.config.shared_adaln:
                gains = cast(nn.Linear, block.ada_lin[1])
                gains.weight.data.mul_(0.5)
                gains.bias.data[: 2 * self.config.dim] = 0.5

    def condition(self, labels: Tensor, precompute: bool) -> VARState:
        """Return the tensors that depend only on the class, for labels [B].

        precompute: compute each block's vectors here, once per image. Otherwise the blocks compute them,
            since a sharded block has its parameters only while it runs.
        """
        c = self.class_emb(labels)
        block_input = c
        if self.config.shared_adaln:
            block_input = self.shared_ada_lin(c).view(-1, 1, 6, self.config.dim)
        blocks = cast(list[Block], self.blocks)
        modulations = [block.modulation(block_input) if precompute else block_input for block in blocks]
        return VARState(c, modulations, self.head_nm(c)[:, None].chunk(2, dim=-1))

    def drop_path(self, rows: int, device: torch.device) -> Sequence[Tensor | None]:
        """Sample stochastic depth (Huang et al., 2016).

        The factors of all blocks are sampled before the blocks run. So all blocks have the same code and
        share one compiled graph, and compiling changes no random number.

        Returns:
            for each block the factors [2, rows, 1, 1] of its residual branches; None if nothing is dropped.
        """
        rates = self.drop_path_rates
        if not self.training or self.drop_path_rate == 0:
            return [None] * len(rates)
        factors = torch.ones(len(rates), 2, rows, 1, 1, device=device)
        for branches, rate in zip(factors, rates):
            for branch in branches if rate else ():
                branch.bernoulli_(1 - rate).div_(1 - rate)
        return factors.unbind()

    def transformer_blocks(self) -> nn.ModuleList:
        return self.blocks

    def output_layer(self) -> nn.Linear:
        return self.head

    def hidden(self, labels: Tensor, inputs: Tensor) -> Tensor:
        state = self.condition(labels, precompute=False)
        branch_factors = self.drop_path(len(labels), labels.device)
        x = self.embed(inputs, state.condition, start=0)
        # Cast once here, so that autocast does not cast it in each layer.
        mask = self.attn_bias_for_masking.to(autocast_dtype(x.device, x.dtype))
        arguments = [
            (modulation, mask, None, factors)
            for modulation, factors in zip(state.modulations, branch_factors)
        ]
        return self.normalise_features(self.run_blocks(x, arguments), state)

    def embed(self, inputs: Tensor | None, condition: Tensor, start: int) -> Tensor:
        """Return the input of the first block for the n positions from ``start``, [B, n, dim].

        inputs: [B, n, code_dim]. If position 0, the class, is among them, [B, n - 1, code_dim], or None
            for this position alone.
        condition: the class embedding [B, dim].
        """
        parts = [] if start else [condition[:, None] + self.pos_start]
        parts += [] if inputs is None else [self.word_embed(inputs)]
        x = torch.cat(parts, dim=1)
        end = start + x.shape[1]
        return x + self.lvl_embed(self.lvl_1L[:, start:end]) + self.pos_1LC[:, start:end]

    def normalise_features(self, x: Tensor, state: VARState) -> Tensor:
        """Return the input of the head for the output x of the last block: [B, n, dim] float32."""
        scale, shift = state.head_modulation
        return _norm(x.float()) * (1 + scale) + shift


class VAR(ARImageModel[VARState]):
    transformer: VARTransformer
    tokenizer: VARTokenizer

    family = "var"
    default_cfg_schedule = "linear"
    checkpoint_name, checkpoint_key = "model.pth", ""
    decodes_in_half_precision = True
    training_command = "train_var_cca"
    trains_on_codes = False
    lr_scales_with_batch = True
    no_decay = ("pos_start", "pos_1LC", "lvl_embed", "scale_mul", "ada_gss")

    def __init__(self, transformer: TransformerConfig, tokenizer: TokenizerConfig):
        super().__init__()
        self.tokenizer = VARTokenizer(tokenizer)
        self.transformer = VARTransformer(transformer, tokenizer.patch_nums, tokenizer.code_dim)
        self.num_classes, self.vocab_size = transformer.num_classes, transformer.vocab_size
        self.step_sizes = tuple(p * p for p in tokenizer.patch_nums)
        self.cached_length = sum(self.step_sizes[:-1])  # no later step attends to the last level
        self.image_size = tokenizer.patch_nums[-1] * tokenizer.autoencoder.downsampling

    @classmethod
    def build(cls, transformer: TransformerConfig, tokenizer: TokenizerConfig, image_size: int) -> "VAR":
        return cls(transformer, tokenizer)  # the tokenizer's levels determine the image size

    def training_transform(self) -> RandomCrop:
        return RandomCrop(self.image_size)

    @torch.no_grad()
    def inputs(self, tokens: Tensor) -> Tensor:
        return self.tokenizer.teacher_forcing_input(tokens)

    def begin(self, labels: Tensor, static: bool = False) -> VARState:
        config = self.transformer.config
        state, weight = self.transformer.condition(labels, precompute=True), self.transformer.pos_start
        like = weight.new_empty(0, dtype=autocast_dtype(weight.device, weight.dtype))
        state.cache = KVCache(
            config.depth, len(labels), config.heads, self.cached_length, config.dim // config.heads, like
        )
        return state

    def step_inputs(self, state: VARState, decoding_step: int | Tensor, tokens: Tensor) -> Tensor:
        assert isinstance(decoding_step, int)
        if decoding_step == 0:
            return self.transformer.embed(None, state.condition, start=0)
        quantizer, last_level = self.tokenizer.quantize, decoding_step - 1
        residual = quantizer.expand(last_level, tokens[:, -self.step_sizes[last_level] :])
        state.reconstruction = residual if state.reconstruction is None else state.reconstruction + residual
        inputs = quantizer.shrink(state.reconstruction, decoding_step).flatten(2).transpose(1, 2)
        return self.transformer.embed(inputs, state.condition, start=tokens.shape[1])

    def block_arguments(self, state: VARState, decoding_step: int | Tensor) -> Sequence[tuple]:
        assert isinstance(decoding_step, int)
        layers = state.cache.at(sum(self.step_sizes[:decoding_step]))
        return [(modulation, None, layer) for modulation, layer in zip(state.modulations, layers)]

    def step_logits(self, state: VARState, x: Tensor) -> Tensor:
        return self.transformer.to_logits(self.transformer.normalise_features(x, state))

    def to_uint8(self, images: Tensor) -> Tensor:
        return ((images + 1) * 0.5 * 255).to(torch.uint8)
