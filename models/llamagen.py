"""LlamaGen (Sun et al., 2024, arXiv 2406.06525): raster-order next-token prediction.

State-dict keys are those of the published checkpoints. So the published files load here, and files
saved here load in the official code with ``strict=True``.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder import AutoencoderConfig, Decoder, Encoder, nearest_code
from models.base import ARImageModel, ARTransformer, ImageTokenizer
from models.kv_cache import KVCache, LayerCache, StaticCache, StaticLayer
from models.sampling import DecodingState
from models.transforms import OneOfTenCrops
from models.utils.precision import autocast_dtype


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; ``grid`` is the resolution of the token map.

    dropout: rate during training, as in the paper.
    """

    dim: int
    layers: int
    heads: int
    grid: int
    vocab_size: int = 16384
    num_classes: int = 1000
    dropout: float = 0.1

    @property
    def hidden(self) -> int:
        return 256 * math.ceil(int(8 * self.dim / 3) / 256)


@dataclass(frozen=True)
class TokenizerConfig:
    autoencoder: AutoencoderConfig
    vocab_size: int = 16384
    code_dim: int = 8


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-5).type_as(x) * self.weight


def rotary_table(grid: int, head_dim: int) -> Tensor:
    """Return cos and sin of the 2-D rotary embedding: [1 + grid * grid, head_dim / 2, 2] float32.

    The first half of the pairs rotates with the image row, the second half with the column, base 10000.
    Position 0, the class token, has cos = sin = 0, so its query and key vanish. The published weights were
    trained that way.
    """
    half = head_dim // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2).float() / half)
    angle = torch.arange(grid).float()[:, None] * frequency
    rows, columns = angle[:, None].expand(grid, grid, -1), angle[None].expand(grid, grid, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table[:1]), table])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [B, heads, n, head_dim] by table [n, head_dim / 2, 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


Cached = LayerCache | StaticLayer | None


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, table: Tensor, cache: Cached) -> Tensor:
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, table), rotate(k, table)
        if cache is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = cache.attend(q, k, v)
        return self.dropout(self.wo(out.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    w13: Tensor | None = None  # w1 and w3 joined (see ``join_matrices``)

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def join_matrices(self) -> None:
        """Store w1 and w3 as the two halves of one weight, so that one matmul computes both."""
        self.w13 = torch.cat([self.w1.weight, self.w3.weight])
        self.w1.weight.data, self.w3.weight.data = self.w13.chunk(2)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = (self.w1(x), self.w3(x)) if self.w13 is None else F.linear(x, self.w13).chunk(2, -1)
        return self.dropout(self.w2(F.silu(gate) * value))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)

    def forward(self, x: Tensor, table: Tensor, cache: Cached) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class LlamaGenTransformer(ARTransformer):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        classes = nn.Embedding(config.num_classes + 1, config.dim)
        self.cls_embedding = nn.Sequential(
            OrderedDict(embedding_table=classes, one_token=nn.Unflatten(1, (1, -1)))
        )
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.token_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        with torch.device("cpu"):  # constants need values even if the parameters are on the meta device
            table = rotary_table(config.grid, config.dim // config.heads)
        self.rotary = nn.Buffer(table, persistent=False)

    def init_weights(self) -> None:
        """Initialise for pretraining: normal with standard deviation 0.02, output layer zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def join_matrices(self) -> None:
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.join_matrices()

    def transformer_blocks(self) -> nn.ModuleList:
        return self.layers

    def output_layer(self) -> nn.Linear:
        return self.output

    def hidden(self, labels: Tensor, inputs: Tensor) -> Tensor:
        x = torch.cat([self.cls_embedding(labels), self.tok_embeddings(inputs[:, :-1])], dim=1)
        table = self.rotary[: x.shape[1]]
        return self.norm(self.run_blocks(self.token_dropout(x), [(table, None)] * len(self.layers)))


class Codebook(nn.Module):
    """An L2-normalised codebook; ``codebook_used`` is a training statistic in the published files."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.code_dim)
        self.codebook_used = nn.Buffer(torch.zeros(65536, device="cpu"))

    def vectors(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1)


class LlamaGenTokenizer(ImageTokenizer):
    """A VQGAN with normalised codes: images [B, 3, H, W] <-> tokens [B, (H/f) * (W/f)]."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        z = config.autoencoder.z_channels
        self.encoder = Encoder(config.autoencoder)
        self.decoder = Decoder(config.autoencoder)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(z, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, z, 1)

    def latents(self, images: Tensor) -> Tensor:
        """Return the encoder output after quant_conv [B, code_dim, H/f, W/f]."""
        return self.quant_conv(self.encoder(images))

    def quantise(self, latents: Tensor) -> Tensor:
        """Return the tokens [B, h * w] of latents [B, code_dim, h, w]."""
        flat = F.normalize(latents.permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
        return nearest_code(flat, self.quantize.vectors()).view(len(latents), -1)

    def encode(self, images: Tensor) -> Tensor:
        return self.quantise(self.latents(images))

    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the images [B, 3, H, W], not clamped, of tokens [B, h * h]."""
        grid = math.isqrt(tokens.shape[1])
        codes = F.embedding(tokens, self.quantize.vectors())
        return self.decode_latents(codes.transpose(1, 2).unflatten(2, (grid, grid)))


@dataclass
class LlamaGenState(DecodingState):
    labels: Tensor
    cache: KVCache | StaticCache

    def keep_rows(self, rows: int) -> None:
        self.labels = self.labels[:rows]
        self.cache.keep_rows(rows)

    def reach(self, steps: int) -> None:
        assert isinstance(self.cache, StaticCache)
        self.cache.reach = steps


class LlamaGen(ARImageModel[LlamaGenState]):
    transformer: LlamaGenTransformer
    tokenizer: LlamaGenTokenizer

    family = "llamagen"
    default_cfg_schedule = "constant"
    checkpoint_name, checkpoint_key = "model.pt", "model"
    decodes_in_half_precision = False
    training_command = "train_llamagen_cca"
    trains_on_codes = True
    lr_scales_with_batch = False
    steps_alike = True

    def __init__(self, transformer: TransformerConfig, tokenizer: TokenizerConfig):
        super().__init__()
        self.transformer = LlamaGenTransformer(transformer)
        self.tokenizer = LlamaGenTokenizer(tokenizer)
        self.num_classes, self.vocab_size = transformer.num_classes, transformer.vocab_size
        self.step_sizes = (1,) * transformer.grid**2
        self.cached_length = self.sequence_length
        self.image_size = transformer.grid * tokenizer.autoencoder.downsampling

    @classmethod
    def build(cls, transformer: TransformerConfig, tokenizer: TokenizerConfig, image_size: int) -> "LlamaGen":
        return cls(replace(transformer, grid=image_size // tokenizer.autoencoder.downsampling), tokenizer)

    def training_transform(self) -> OneOfTenCrops:
        return OneOfTenCrops(self.image_size)

    def inputs(self, tokens: Tensor) -> Tensor:
        return tokens

    def begin(self, labels: Tensor, static: bool = False) -> LlamaGenState:
        config, weight = self.transformer.config, self.transformer.tok_embeddings.weight
        like = weight.new_empty(0, dtype=autocast_dtype(weight.device, weight.dtype))
        cache = (StaticCache if static else KVCache)(
            config.layers, len(labels), config.heads, self.cached_length, config.dim // config.heads, like
        )
        return LlamaGenState(labels, cache)

    def step_inputs(self, state: LlamaGenState, decoding_step: int | Tensor, tokens: Tensor) -> Tensor:
        net = self.transformer
        if isinstance(decoding_step, Tensor):
            x = torch.where(decoding_step == 0, net.cls_embedding(state.labels), net.tok_embeddings(tokens))
        elif decoding_step == 0:
            x = net.cls_embedding(state.labels)
        else:
            x = net.tok_embeddings(tokens[:, -1:])
        return net.token_dropout(x)

    def block_arguments(self, state: LlamaGenState, decoding_step: int | Tensor) -> Sequence[tuple]:
        table = self.transformer.rotary[decoding_step]
        return [(table, layer) for layer in state.cache.at(decoding_step)]

    def step_logits(self, state: LlamaGenState, x: Tensor) -> Tensor:
        return self.transformer.to_logits(self.transformer.norm(x))

    def to_uint8(self, images: Tensor) -> Tensor:
        return (127.5 * images + 128.0).clamp(0, 255).to(torch.uint8)
