"""Keys and values of the positions decoded so far, and attention over them.

``KVCache`` is read up to the last position written. ``StaticCache`` has the same shapes at every
position, and the position is a tensor, so that one compiled graph serves all positions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Fused GPU kernels need a head dimension that is a multiple of WIDTH and at least LEAST_WIDTH.
WIDTH, LEAST_WIDTH = 8, 16
# Positions per block, where attention reads only the blocks of a static cache that are filled.
BLOCK = 64


def attends_to_part(keys: Tensor) -> bool:
    """Return whether attention reads only the filled blocks of a static cache.

    Compiled flex_attention can do this, with a kernel for a single query. Other kernels compute 64 or 128
    queries at a time.
    """
    in_half_precision = keys.dtype in (torch.float16, torch.bfloat16)
    return keys.is_cuda and in_half_precision and torch.cuda.get_device_capability(keys.device) >= (8, 0)


class LayerCache(NamedTuple):
    """One layer's keys and values [rows, heads, length, head_dim], of which ``filled`` positions are set."""

    keys: Tensor
    values: Tensor
    filled: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Store k and v of the next n positions; return their attention to all positions so far.

        The n positions attend to themselves as well. All tensors are [rows, heads, n, head_dim]. Positions
        beyond the end of the cache are not stored, since no later position reads them.
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
        """Allocate the cache; ``like`` is a tensor with the device and dtype of keys and values."""
        shape = (rows, heads, length, head_dim)
        self.layers = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(layers)]

    def at(self, place: int | Tensor) -> list[LayerCache]:
        """Return the layers at position ``place``, where ``place`` positions are filled."""
        return [LayerCache(keys, values, int(place)) for keys, values in self.layers]

    def keep_rows(self, rows: int) -> None:
        self.layers = [(k[:rows], v[:rows]) for k, v in self.layers]


class Masked(NamedTuple):
    """Position ``place`` [1] int64 of a static cache, with its attention mask bool [1, 1, 1, n]."""

    place: Tensor
    mask: Tensor


class Counted(NamedTuple):
    """Position ``place`` [1] int64 of a static cache, with the number of cache blocks that it attends to.

    blocks: that number, [1, 1, 1] int32; in these blocks it attends to all positions up to itself.
    order: indices of all blocks, [1, 1, 1, n] int32.
    """

    place: Tensor
    blocks: Tensor
    order: Tensor

    def mask(self, length: int) -> BlockMask:
        """Return the block mask of one query over ``length`` positions."""
        place = self.place.squeeze(0)

        def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= place

        return BlockMask.from_kv_blocks(
            self.blocks, self.order, BLOCK_SIZE=BLOCK, mask_mod=is_visible, seq_lengths=(1, length),
            compute_q_blocks=False,
        )  # fmt: skip


class StaticLayer(NamedTuple):
    """One layer's keys and values [rows, length, heads, width] of a static cache.

    Elements beyond head_dim in the last dimension are zero.
    """

    keys: Tensor
    values: Tensor
    position: Masked | Counted

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Do the same as ``LayerCache.attend``, for a single position."""
        position, head_dim = self.position, q.shape[-1]
        scale = head_dim**-0.5 if scale is None else scale
        if padding := self.keys.shape[-1] - head_dim:
            q, k, v = (F.pad(tensor, (0, padding)) for tensor in (q, k, v))
        self.keys.index_copy_(1, position.place, k.transpose(1, 2))
        self.values.index_copy_(1, position.place, v.transpose(1, 2))
        keys, values = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        if isinstance(position, Masked):
            length = position.mask.shape[-1]
            keys, values = keys[:, :, :length], values[:, :, :length]
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=position.mask, scale=scale)
        else:
            out = flex_attention(q, keys, values, block_mask=position.mask(keys.shape[2]), scale=scale)
        return out[..., :head_dim]


class StaticCache:
    """Keys and values of all layers, whose shapes are the same at every position.

    reach: number of positions that attention may read, by default the whole length.
    """

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor):
        """Allocate the cache; ``like`` is a tensor with the device and dtype of keys and values."""
        shape = (rows, length, heads, max(LEAST_WIDTH, head_dim + -head_dim % WIDTH))
        # Positions not yet written must be zero: the mask gives them weight 0, but 0 times NaN is NaN.
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(layers)]
        self.reach = length
        # Stored here, because compiled code would compute them from the position again in each layer.
        positions = torch.arange(length, dtype=torch.int32, device=like.device)
        self.blocks = positions.div(BLOCK, rounding_mode="floor") + 1  # number that each position attends to
        self.order = self.blocks[::BLOCK][None, None, None] - 1

    def at(self, place: int | Tensor) -> list[StaticLayer]:
        """Return the layers at position ``place``, a tensor [1] int64."""
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
