"""VAR's tokenizer (Tian et al., 2024, arXiv 2404.02905): a residual quantiser over levels, coarse to fine.

State-dict keys are those of the published checkpoint.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder import AutoencoderConfig, Decoder, Encoder, nearest_code
from models.base import ImageTokenizer


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of the tokenizer; ``patch_nums`` are the resolutions of the token maps, coarse to fine."""

    autoencoder: AutoencoderConfig
    patch_nums: tuple[int, ...]
    vocab_size: int = 4096

    @property
    def code_dim(self) -> int:
        return self.autoencoder.z_channels


class ResidualConvs(nn.Module):
    """The convolutions phi after the upsampling of each level; ``count`` of them serve all levels."""

    def __init__(self, dim: int, levels: int, count: int = 4):
        super().__init__()
        self.qresi_ls = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(count))
        ticks = np.linspace(1 / 12, 11 / 12, count)
        self.conv_index = [
            int(np.abs(ticks - level / max(levels - 1, 1)).argmin()) for level in range(levels)
        ]

    def forward(self, h: Tensor, level: int) -> Tensor:
        return 0.5 * h + 0.5 * self.qresi_ls[self.conv_index[level]](h)


def bicubic_taps(source: int, target: int) -> tuple[Tensor, Tensor]:
    """Return indices [target, 4] int64 and weights [target, 4] float32 of a bicubic resize in one dimension.

    ``F.interpolate`` computes each of the ``target`` elements as a weighted sum of four ``source`` elements.
    """
    lines = torch.eye(source, dtype=torch.float64, device="cpu")[None, :, :, None]
    resized = F.interpolate(lines.expand(1, source, source, source), (target, target), mode="bicubic")
    matrix = F.pad(resized[0, :, :, 0].T, (0, 4))  # short lines have fewer than four elements
    taps = matrix.abs().topk(4, dim=1).indices
    return taps.clamp(max=source - 1), matrix.gather(1, taps).float()


def resize_lines(x: Tensor, taps: Tensor, weights: Tensor) -> Tensor:
    """Resize the last dimension, [..., source] -> [..., target], with the result of ``bicubic_taps``."""
    return (x.index_select(-1, taps.flatten()).unflatten(-1, taps.shape) * weights).sum(-1)


class MultiScaleQuantizer(nn.Module):
    """A residual quantiser over levels (VAR, algorithms 1 and 2).

    ``ema_vocab_hit_SV`` is a training statistic in the published files.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.patch_nums, self.levels = config.patch_nums, len(config.patch_nums)
        self.embedding = nn.Embedding(config.vocab_size, config.code_dim)
        self.quant_resi = ResidualConvs(config.code_dim, self.levels)
        self.ema_vocab_hit_SV = nn.Buffer(torch.zeros(self.levels, config.vocab_size, device="cpu"))
        *coarse, finest = config.patch_nums
        taps, weights = zip(*(bicubic_taps(p, finest) for p in coarse))
        self.taps = nn.Buffer(torch.stack(taps), persistent=False)
        self.tap_weights = nn.Buffer(torch.stack(weights), persistent=False)

    def enlarge(self, h: Tensor, level: int) -> Tensor:
        """Resize (bicubic) the latents of one level [B, C, p, p] to the finest resolution [B, C, P, P]."""
        # PyTorch's GPU kernel has one thread per output position, which loops over all images. That is slow.
        if h.is_cuda:
            return self.enlarge_by_taps(h, level)
        return F.interpolate(h, size=self.patch_nums[-1], mode="bicubic")

    def enlarge_by_taps(self, h: Tensor, level: int) -> Tensor:
        line = (self.taps[level], self.tap_weights[level])
        return resize_lines(resize_lines(h, *line).mT, *line).mT

    def expand(self, level: int, tokens: Tensor) -> Tensor:
        """Return what the tokens [B, p * p] of one level add to the latents: [B, code_dim, P, P]."""
        p = self.patch_nums[level]
        h = self.embedding(tokens).transpose(1, 2).unflatten(2, (p, p))
        if p != self.patch_nums[-1]:
            h = self.enlarge(h, level)
        return self.quant_resi(h, level)

    def shrink(self, latents: Tensor, level: int) -> Tensor:
        """Area-interpolate latents [B, C, P, P] to the resolution of a level."""
        p = self.patch_nums[level]
        return latents if p == self.patch_nums[-1] else F.interpolate(latents, size=(p, p), mode="area")

    def quantise(self, latents: Tensor) -> Tensor:
        """Return the tokens of all levels [B, L] of latents [B, C, P, P]."""
        residual, tokens = latents, []
        for level in range(self.levels):
            flat = self.shrink(residual, level).permute(0, 2, 3, 1).flatten(0, 2)
            tokens.append(nearest_code(flat, self.embedding.weight).view(len(latents), -1))
            residual = residual - self.expand(level, tokens[-1])
        return torch.cat(tokens, dim=1)

    def partial_sums(self, tokens: Tensor) -> list[Tensor]:
        """Return the latents after each level [B, C, P, P] for tokens [B, L]."""
        parts = tokens.split([p * p for p in self.patch_nums], dim=1)
        return list(accumulate(self.expand(level, part) for level, part in enumerate(parts)))


class VARTokenizer(ImageTokenizer):
    """A multi-scale VQGAN: images [B, 3, H, W] <-> tokens of all levels [B, L]."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        dim = config.code_dim
        self.encoder = Encoder(config.autoencoder)
        self.decoder = Decoder(config.autoencoder)
        self.quantize = MultiScaleQuantizer(config)
        self.quant_conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(dim, dim, 3, padding=1)

    def latents(self, images: Tensor) -> Tensor:
        """Return the encoder output after quant_conv [B, code_dim, H/f, W/f]."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Tensor:
        return self.quantize.quantise(self.latents(images))

    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the images [B, 3, H, W], not clamped, of tokens [B, L]."""
        return self.decode_latents(self.quantize.partial_sums(tokens)[-1])

    def teacher_forcing_input(self, tokens: Tensor) -> Tensor:
        """Return the transformer's input for levels 1 to K-1, [B, L - 1, code_dim], for tokens [B, L]."""
        sums = self.quantize.partial_sums(tokens)[:-1]
        levels = [self.quantize.shrink(total, level) for level, total in enumerate(sums, start=1)]
        return torch.cat([latents.flatten(2).transpose(1, 2) for latents in levels], dim=1)
