"""Reading and writing weights. A file's layout is told by its content, never by its name."""

import argparse
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.errors import UserError
from models.files import atomic_write
from models.hub import downloaded

# Constant buffers and statistics: a file may hold them or not, and in other shapes.
CONSTANTS = (
    "lvl_1L",
    "attn_bias_for_masking",
    "zero_k_bias",
    "ema_vocab_hit_SV",
    "codebook_used",
    "freqs_cis",
)
# Where the published files and trainers keep the state dict.
WRAPPERS = ("model", "module", "state_dict", "trainer", "var_wo_ddp")
# What DistributedDataParallel and torch.compile put in front of every key.
PREFIXES = ("module.", "_orig_mod.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """State dict of a ``.safetensors`` or PyTorch file, out of whatever wraps it.

    Tensors stay memory-mapped where the file allows it. Nothing in the file is executed: only
    tensors, containers and ``argparse.Namespace`` (which LlamaGen's files hold) are accepted.
    Raises UserError for anything else.
    """
    return read_weights(path)[0]


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], str | None]:
    """State dict of a file as in ``read_state_dict``, and the key under which it stood.

    "" is a bare state dict; None: the file does not say how such weights are published.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:9] == b"{":  # safetensors: eight bytes of length, then a JSON header
            with safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no dict
                return state, (file.metadata() or {}).get("wrapper")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a weights file") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read (permission denied)") from None
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise UserError(f"{path}: refused, it holds executable content besides tensors") from None
        raise _no_weights(path) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, SafetensorError):
        raise _no_weights(path) from None
    wrappers = []
    while isinstance(content, dict) and (
        inner := next((k for k in WRAPPERS if isinstance(content.get(k), dict)), None)
    ):
        content = content[inner]
        wrappers.append(inner)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    if not content or not all(isinstance(k, str) and _is_dense(v) for k, v in content.items()):
        entries = ", ".join(map(str, list(content)[:4])) or "none"
        raise UserError(f"{path}: holds no state dict; its entries are {entries}")
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in content)), None):
        content = {k.removeprefix(prefix): v for k, v in content.items()}
    # Nested, it is a training checkpoint, which nobody publishes.
    return content, None if len(wrappers) > 1 else "".join(wrappers)


def _is_dense(value: object) -> bool:
    """Whether it is a tensor with all its numbers."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _no_weights(path: Path) -> UserError:
    again = f"; delete {path.resolve()} to have it downloaded again" if downloaded(path) else ""
    return UserError(f"{path}: not a weights file (.pt, .pth or .safetensors), or truncated{again}")


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


def assign_weights(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Make the tensors of a state dict that fits the module's own, without a copy where they are float32."""
    wanted = {k: v.float() if v.is_floating_point() else v for k, v in state.items() if not is_constant(k)}
    module.load_state_dict(wanted, strict=False, assign=True)


def load_weights(
    module: nn.Module,
    path: str | Path,
    what: str,
    guess: Callable[[dict[str, Tensor]], str | None] = lambda state: None,
) -> None:
    """Load a file into ``module``, every tensor accounted for.

    ``what`` names the module in errors; ``guess`` may name the model that a wrong file belongs to.
    Raises UserError.
    """
    state = read_state_dict(path)
    problem = mismatch(module, state)
    if problem:
        other = guess(state)
        raise UserError(
            f"{path}: does not fit {what}: tensors {problem}" + (f"; it looks like {other}" if other else "")
        )
    assign_weights(module, state)


def save_published(state: dict[str, Tensor], path: Path, key: str = "") -> None:
    """Write a state dict as the official code loads it: under ``key``, or bare."""
    state = {k: v.detach().cpu().clone() for k, v in state.items()}
    atomic_write(path, lambda temporary: torch.save({key: state} if key else state, temporary))


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
