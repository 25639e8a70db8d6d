"""The convolutional encoder and decoder that the VAR and LlamaGen tokenizers share.

Both tokenizers use the VQGAN family (Esser et al., 2021, arXiv 2012.09841): residual blocks
with GroupNorm and SiLU, self-attention at the coarsest resolution and in the middle. The two
published checkpoints differ only in their state-dict keys, which ``KeyNames`` describes.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.utils.precision import autocast_dtype, exact_matmuls


@dataclass(frozen=True)
class KeyNames:
    """The names that a published checkpoint uses for the parts of its autoencoder."""

    encoder_stages: str
    decoder_stages: str
    blocks: str
    mid: tuple[str, str, str]
    fused_qkv: bool
    # VAR numbers the decoder stages from the finest resolution, LlamaGen in the order in which they run.
    decoder_finest_first: bool


VAR_KEYS = KeyNames(
    "down", "up", "block", ("block_1", "attn_1", "block_2"), fused_qkv=True, decoder_finest_first=True
)
LLAMAGEN_KEYS = KeyNames(
    "conv_blocks", "conv_blocks", "res", ("0", "1", "2"), fused_qkv=False, decoder_finest_first=False
)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of encoder and decoder.

    channels: width at full resolution.
    multipliers: factor of the width per resolution level; each further level halves the resolution.
    z_channels: width of the encoder's output.
    blocks: residual blocks per level; the decoder has one more.
    """

    channels: int
    multipliers: tuple[int, ...]
    z_channels: int
    keys: KeyNames
    blocks: int = 2

    @property
    def downsampling(self) -> int:
        """Ratio of image resolution to latent resolution."""
        return 2 ** (len(self.multipliers) - 1)


class GroupNorm(nn.GroupNorm):
    """Group normalisation with 32 groups.

    When compiled, it first computes the statistics of each channel, which reads channels_last tensors in
    memory order. PyTorch's own code would make a transposed copy. The results are equal up to rounding.
    """

    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.by_channel(x) if torch.compiler.is_compiling() else super().forward(x)

    def by_channel(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, H, W]; return float32 [B, C, H, W]."""
        x = x.float()
        variances, means = torch.var_mean(x, dim=(2, 3), correction=0)
        # All channels have the same number of pixels. So the variance of a group is the mean of its
        # channels' variances plus the variance of their means.
        variances, means = (t.unflatten(1, (self.num_groups, -1)) for t in (variances, means))
        variance_of_means, mean = torch.var_mean(means, dim=2, correction=0, keepdim=True)
        inverse_std = (variances.mean(2, keepdim=True) + variance_of_means + self.eps).rsqrt()
        scale = self.weight * inverse_std.expand_as(means).flatten(1)
        shift = self.bias - mean.expand_as(means).flatten(1) * scale
        return x * scale[..., None, None] + shift[..., None, None]


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map."""

    def __init__(self, channels: int, fused_qkv: bool):
        super().__init__()
        self.norm = GroupNorm(channels)
        if fused_qkv:
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        else:
            self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.fused_qkv = fused_qkv
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.qkv(h).chunk(3, dim=1) if self.fused_qkv else (self.q(h), self.k(h), self.v(h))
        q, k, v = (t.flatten(2).transpose(1, 2).contiguous() for t in (q, k, v))
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


def _downsample(channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))
    )


def _upsample(channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(enlarge=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(channels, channels, 3, padding=1))
    )


class Stage(nn.Module):
    """The residual blocks of one resolution, followed by a resampling layer if ``resample`` is given."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        attention: bool,
        resample: str | None,
        keys: KeyNames,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * (blocks - 1)
        residual = nn.ModuleList(ResidualBlock(width, out_channels) for width in widths)
        self.add_module(keys.blocks, residual)
        self.attn = nn.ModuleList(
            SpatialAttention(out_channels, keys.fused_qkv) if attention else nn.Identity() for _ in widths
        )
        if resample:
            change = _downsample if resample == "downsample" else _upsample
            self.add_module(resample, change(out_channels))
        self.blocks_name, self.resample_name = keys.blocks, resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(getattr(self, self.blocks_name), self.attn):
            x = attention(block(x))
        return getattr(self, self.resample_name)(x) if self.resample_name else x


def _middle(channels: int, keys: KeyNames) -> nn.Sequential:
    parts = (
        ResidualBlock(channels, channels),
        SpatialAttention(channels, keys.fused_qkv),
        ResidualBlock(channels, channels),
    )
    return nn.Sequential(OrderedDict(zip(keys.mid, parts)))


class PixelConv(nn.Conv2d):
    """The convolution that outputs the three channels of pixels.

    In half precision, fast GPU kernels need a multiple of 8 output channels. There the weight is padded with
    zeros, and the additional channels are dropped.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and autocast_dtype(x.device, x.dtype) != torch.float32:
            return self.with_eight_channels(x)
        return super().forward(x)

    def with_eight_channels(self, x: Tensor) -> Tensor:
        padding = -self.out_channels % 8
        assert self.bias is not None
        weight, bias = F.pad(self.weight, (0, 0, 0, 0, 0, 0, 0, padding)), F.pad(self.bias, (0, padding))
        return F.conv2d(x, weight, bias, self.stride, self.padding)[:, : self.out_channels]


class Encoder(nn.Module):
    """Map images [B, 3, H, W] in [-1, 1] to latents [B, z_channels, H/f, W/f]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        keys, widths = config.keys, [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        coarsest = len(widths) - 1
        stages = [
            Stage(
                width, out, config.blocks, level == coarsest, "downsample" if level < coarsest else None, keys
            )
            for level, (width, out) in enumerate(zip([config.channels, *widths], widths))
        ]
        self.add_module(keys.encoder_stages, nn.ModuleList(stages))
        self.mid = _middle(widths[-1], keys)
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)
        self.stages_name = keys.encoder_stages

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in getattr(self, self.stages_name):
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Map latents [B, z_channels, H/f, W/f] to images [B, 3, H, W], not clamped."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        keys, widths = config.keys, [config.channels * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], keys)
        finest = len(widths) - 1
        stages = [
            Stage(width, out, config.blocks + 1, level == 0, "upsample" if level < finest else None, keys)
            for level, (width, out) in enumerate(zip([widths[0], *widths], widths))
        ]
        self.finest_first = keys.decoder_finest_first
        self.add_module(keys.decoder_stages, nn.ModuleList(reversed(stages) if self.finest_first else stages))
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = PixelConv(widths[-1], 3, 3, padding=1)
        self.stages_name = keys.decoder_stages

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        stages = getattr(self, self.stages_name)
        for stage in reversed(stages) if self.finest_first else stages:
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest codebook vector (Euclidean distance): [N, C], [V, C] -> [N] int64.

    Distances are always computed in float32, so that tokens do not depend on the caller's precision.
    """
    with exact_matmuls():
        latents, codebook = latents.float(), codebook.float()
        distance = latents.square().sum(1, keepdim=True) + codebook.square().sum(1)
        return torch.addmm(distance, latents, codebook.T, alpha=-2).argmin(1)
