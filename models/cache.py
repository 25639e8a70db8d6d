"""Keys and values of the positions decoded so far, and attention over them.

``KVCache`` is read up to the last position written. ``StaticCache`` has the same shapes at every
position, which is a tensor: one compiled graph serves all of them.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _attention_told_what_counts() -> Callable[..., Any] | None:
    """``varlen_attn``, where this version of PyTorch has it and it takes ``seqused_k``."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "seqused_k" in inspect.signature(varlen_attn).parameters else None


varlen_attn = _attention_told_what_counts()


def reads_a_part(keys: Tensor) -> bool:
    """Whether attention can be told how much of a static cache counts, and reads no more than that."""
    if varlen_attn is None or not keys.is_cuda or keys.dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(keys.device) >= (8, 0)  # what the flash kernel needs


WIDTH = 8  # fused kernels of GPUs take heads of so many numbers, or of a multiple


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
    """Keys and values of all layers, allocated once.

    ``advance`` moves the write position after the last layer.
    """

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor):
        """``like``: a tensor of the device and precision of keys and values."""
        shape = (rows, heads, length, head_dim)
        self.layers = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(layers)]
        self.filled = 0

    def at(self) -> list[LayerCache]:
        """The layers, each to be attended to once."""
        return [LayerCache(keys, values, self.filled) for keys, values in self.layers]

    def advance(self, n: int) -> None:
        self.filled += n

    def keep_rows(self, rows: int) -> None:
        self.layers = [(k[:rows], v[:rows]) for k, v in self.layers]


class Masked(NamedTuple):
    """Position ``place`` [1] int64 of a static cache, and which positions it sees: bool [1, 1, 1, n]."""

    place: Tensor
    mask: Tensor


class Counted(NamedTuple):
    """The same by number: ``used`` [rows] int32 positions count; offsets [rows + 1] int32 say where each
    row begins, of queries and of keys."""

    place: Tensor
    used: Tensor
    query_offsets: Tensor
    key_offsets: Tensor


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
        if isinstance(position, Masked):
            seen = position.mask.shape[-1]
            keys, values = (t[:, :seen].transpose(1, 2) for t in (self.keys, self.values))
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=position.mask, scale=scale)
            return out[..., :head_dim]
        assert varlen_attn is not None
        rows, length = self.keys.shape[:2]
        out = varlen_attn(
            q.transpose(1, 2).flatten(0, 1), self.keys.flatten(0, 1), self.values.flatten(0, 1),
            position.query_offsets, position.key_offsets, 1, length, scale=scale, seqused_k=position.used,
        )  # fmt: skip
        return out.unflatten(0, (rows, 1)).transpose(1, 2)[..., :head_dim]


class StaticCache:
    """Keys and values of all layers, whose shapes are the same at every position.

    ``reach``: positions that attention may read, the whole length unless it is told otherwise.
    ``advance`` goes on to the next position.
    """

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, like: Tensor):
        """As ``KVCache``."""
        shape = (rows, length, heads, head_dim + -head_dim % WIDTH)
        # Zeros: a mask takes weight from what has not been written, but 0 times NaN is NaN.
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(layers)]
        self.reach = length
        # Kept, and not made of the position: a compiler would make them anew for each layer.
        self.used = torch.ones(rows, dtype=torch.int32, device=like.device)
        self.query_offsets = torch.arange(rows + 1, dtype=torch.int32, device=like.device)
        self.key_offsets = self.query_offsets * length

    def at(self, place: Tensor) -> list[StaticLayer]:
        """The layers at position ``place`` [1] int64, which counts as the calls of ``advance`` do."""
        position: Masked | Counted
        if reads_a_part(self.layers[0][0]):
            position = Counted(place, self.used, self.query_offsets, self.key_offsets)
        else:
            mask = torch.arange(self.reach, device=place.device) <= place
            position = Masked(place, mask[None, None, None])
        return [StaticLayer(keys, values, position) for keys, values in self.layers]

    def advance(self, n: int) -> None:
        self.used.add_(n)

    def keep_rows(self, rows: int) -> None:
        self.layers = [(k[:rows], v[:rows]) for k, v in self.layers]
        self.used, self.query_offsets = self.used[:rows], self.query_offsets[: rows + 1]
        self.key_offsets = self.key_offsets[: rows + 1]
