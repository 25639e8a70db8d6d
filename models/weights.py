"""The weights of a module: whether they fit, are finite, and how they are loaded, written and hashed."""

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checkpoints import read_state_dict
from models.errors import UserError
from models.files import atomic_write, write_binary

# Constant buffers and statistics: a file may hold them or not, and in other shapes.
CONSTANTS = (
    "lvl_1L",
    "attn_bias_for_masking",
    "zero_k_bias",
    "ema_vocab_hit_SV",
    "codebook_used",
    "freqs_cis",
)


def is_constant(key: str) -> bool:
    """Whether a key names a constant buffer or a usage statistic."""
    return key.split(".")[-1] in CONSTANTS


def mismatch(module: nn.Module, state: dict[str, Tensor]) -> str | None:
    """The first few missing, unexpected, wrongly shaped and wrongly typed tensors; None if all fit."""
    own = {k: v for k, v in module.state_dict().items() if not is_constant(k)}
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own and not is_constant(k)]
    both = {k: (state[k], own[k]) for k in own if k in state}
    shapes = [
        f"{k} {list(a.shape)} instead of {list(b.shape)}" for k, (a, b) in both.items() if a.shape != b.shape
    ]
    types = [f"{k} {a.dtype}" for k, (a, b) in both.items() if a.is_floating_point() != b.is_floating_point()]
    kinds = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("wrongly shaped", shapes),
        ("wrongly typed", types),
    )
    return (
        "; ".join(
            f"{len(n)} {kind} ({', '.join(n[:3])}{', …' if len(n) > 3 else ''})" for kind, n in kinds if n
        )
        or None
    )


def approximate_size(module: nn.Module) -> int:
    """Bytes of a file of the module's weights, which needs none itself: float32, as published files are.

    What such a file holds besides, or in half precision, is not known before it is there.
    """
    return sum(value.nbytes for value in module.state_dict().values())


def not_finite(state: dict[str, Tensor]) -> str | None:
    """The first few tensors that hold NaN or infinity; None if there are none. Reads all, copies nothing."""
    wrong = [k for k, v in state.items() if not is_constant(k) and not _is_finite(v)]
    return ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "") or None


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(end) for end in tensor.detach().aminmax())  # NaN where there is one


Guess = Callable[[dict[str, Tensor]], str | None]


def fit_weights(
    module: nn.Module,
    state: dict[str, Tensor],
    source: str | Path,
    what: str,
    guess: Guess = lambda state: None,
) -> None:
    """Make the tensors of a state dict the module's own, every tensor accounted for and every number finite.

    ``source`` is named in errors, ``what`` names the module there; ``guess`` may name the model that
    wrong weights belong to. Raises UserError.
    """
    problem = mismatch(module, state)
    if problem:
        other = guess(state)
        raise UserError(
            f"{source}: does not fit {what}: tensors {problem}"
            + (f"; it looks like {other}" if other else "")
        )
    wanted = {k: v.float() if v.is_floating_point() else v for k, v in state.items() if not is_constant(k)}
    if wrong := not_finite(wanted):
        raise UserError(f"{source}: holds weights that are not finite (NaN or infinite): {wrong}")
    module.load_state_dict(wanted, strict=False, assign=True)  # without a copy where they are float32


def load_weights(module: nn.Module, path: str | Path, what: str, guess: Guess = lambda state: None) -> None:
    """Load a file into ``module``; arguments and errors as in ``fit_weights``."""
    fit_weights(module, read_state_dict(path), path, what, guess)


def save_published(state: dict[str, Tensor], path: Path, key: str = "") -> None:
    """Write a state dict as the official code loads it: under ``key``, or bare."""
    state = {k: v.detach().cpu().clone() for k, v in state.items()}
    # Given a path, PyTorch would put its name into the file.
    write_binary(path, lambda file: torch.save({key: state} if key else state, file))


def save_safetensors(state: dict[str, Tensor], path: Path, key: str = "") -> None:
    """Write a state dict as .safetensors, which remembers under which key it is published."""
    metadata = {"format": "pt", "wrapper": key}
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()}

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # the library makes files that their owner alone may read

    atomic_write(path, write)


def tensors_sha256(module: nn.Module) -> str:
    """Hash of a module's numbers and their names: the same for every file that holds the same weights."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        if not is_constant(key):
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
