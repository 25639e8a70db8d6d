"""Keys and values of the positions decoded so far, and attention over them.

``KVCache`` is read up to the last position written. ``StaticCache`` has the same shapes at every
position, which is a tensor: one compiled graph serves all of them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Fused kernels of GPUs take heads of a multiple of so many numbers, and of no fewer than that.
WIDTH, LEAST_WIDTH = 8, 16
# Positions that attention reads at once where it is told how much of a static cache counts.
BLOCK = 64


def attends_to_part(keys: Tensor) -> bool:
    """Whether attention is told how much of a static cache counts, and reads no more than that.

    By flex_attention, compiled, which has a kernel for one query; others work for 64 or 128.
    """
    in_half_precision = keys.dtype in (torch.float16, torch.bfloat16)
    return keys.is_cuda and in_half_precision and torch.cuda.get_device_capability(keys.device) >= (8, 0)


class LayerCache(NamedTuple):
    """One layer's keys and values [rows, heads, length, head_dim]; ``filled`` positions of it are."""

    keys: Tensor
    values: Tensor
    filled: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Attention of the next n positions to all so far, themselves included; stores their k and v.

        All [rows, heads, n, head_dim]. What goes beyond the cache is not stored: nothing comes after it.
        """
        end = self.filled + k.shape[2]
        if end > self.keys.shape[2]:
            k = torch.cat([self.keys[:, :, : self.filled], k], dim=2)
            v = torch.cat([self.values[:, :, : self.filled], v], dim=2)
        else:
            self.keys[:, :, self.filled : end] = k
            self.values[:, :, self.filled : end] = v
            k, v = self.keys[:, :, :end], self.values[:, :, :end]
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


class KVCache:
    """Keys and values of all layers, allocated once."""

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor):
        """``like``: a tensor of the device and precision of keys and values."""
        shape = (rows, heads, length, head_dim)
        self.layers = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(layers)]

    def at(self, place: int | Tensor) -> list[LayerCache]:
        """The layers at position ``place``: that many are filled."""
        return [LayerCache(keys, values, int(place)) for keys, values in self.layers]

    def keep_rows(self, rows: int) -> None:
        self.layers = [(k[:rows], v[:rows]) for k, v in self.layers]


class Masked(NamedTuple):
    """Position ``place`` [1] int64 of a static cache, and which positions it sees: bool [1, 1, 1, n]."""

    place: Tensor
    mask: Tensor


class Counted(NamedTuple):
    """The same by number: position ``place`` [1] int64 sees all up to itself in the first ``blocks``
    [1, 1, 1] int32 blocks of the cache; ``order`` [1, 1, 1, n] int32 names all blocks."""

    place: Tensor
    blocks: Tensor
    order: Tensor

    def mask(self, length: int) -> BlockMask:
        """Of one query, over ``length`` positions."""
        place = self.place.squeeze(0)

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= place

        return BlockMask.from_kv_blocks(
            self.blocks, self.order, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(1, length),
            compute_q_blocks=False,
        )  # fmt: skip


class StaticLayer(NamedTuple):
    """One layer's keys and values [rows, length, heads, width] of a static cache; what is beyond head_dim
    of ``width`` is zeros."""

    keys: Tensor
    values: Tensor
    position: Masked | Counted

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """As ``LayerCache.attend``, of one position."""
        position, head_dim = self.position, q.shape[-1]
        scale = head_dim**-0.5 if scale is None else scale
        if beyond := self.keys.shape[-1] - head_dim:
            q, k, v = (F.pad(tensor, (0, beyond)) for tensor in (q, k, v))
        self.keys.index_copy_(1, position.place, k.transpose(1, 2))
        self.values.index_copy_(1, position.place, v.transpose(1, 2))
        keys, values = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        if isinstance(position, Masked):
            seen = position.mask.shape[-1]
            keys, values = keys[:, :, :seen], values[:, :, :seen]
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=position.mask, scale=scale)
        else:
            out = flex_attention(q, keys, values, block_mask=position.mask(keys.shape[2]), scale=scale)
        return out[..., :head_dim]


class StaticCache:
    """Keys and values of all layers, whose shapes are the same at every position.

    ``reach``: positions that attention may read, the whole length unless it is told otherwise.
    """

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor):
        """As ``KVCache``."""
        shape = (rows, length, heads, max(LEAST_WIDTH, head_dim + -head_dim % WIDTH))
        # Zeros: a mask takes weight from what has not been written, but 0 times NaN is NaN.
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(layers)]
        self.reach = length
        # Kept, and not made of the position: a compiler would make them anew for each layer.
        positions = torch.arange(length, dtype=torch.int32, device=like.device)
        self.blocks = positions.div(BLOCK, rounding_mode="floor") + 1  # that each position sees
        self.order = self.blocks[::BLOCK][None, None, None] - 1

    def at(self, place: int | Tensor) -> list[StaticLayer]:
        """The layers at position ``place``, a tensor [1] int64."""
        assert isinstance(place, Tensor)
        position: Masked | Counted
        if attends_to_part(self.layers[0][0]):
            position = Counted(place, self.blocks.index_select(0, place)[None, None], self.order)
        else:
            mask = torch.arange(self.reach, device=place.device) <= place
            position = Masked(place, mask[None, None, None])
        return [StaticLayer(keys, values, position) for keys, values in self.layers]

    def keep_rows(self, rows: int) -> None:
        self.layers = [(k[:rows], v[:rows]) for k, v in self.layers]
