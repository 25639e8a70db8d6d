"""Reading and writing weights. A file's layout is told by its content, never by its name."""

import argparse
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cca.errors import UserError

# Constant buffers and statistics: a file may hold them or not, and in other shapes.
CONSTANTS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV", "codebook_used", "freqs_cis")
# Where the published files and trainers keep the state dict.
WRAPPERS = ("model", "module", "state_dict", "trainer", "var_wo_ddp")


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then rename: never a half-written file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """State dict of a ``.safetensors`` or PyTorch file, out of whatever wraps it.

    Nothing in the file is executed: only tensors, containers and ``argparse.Namespace`` (which
    LlamaGen's files hold) are accepted. Raises UserError for anything else.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:9] == b"{":  # safetensors: eight bytes of length, then a JSON header
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a weights file") from None
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise UserError(f"{path}: refused, it holds executable content besides tensors") from None
        raise UserError(f"{path}: not a weights file (.pt, .pth or .safetensors), or truncated") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, SafetensorError):
        raise UserError(f"{path}: not a weights file (.pt, .pth or .safetensors), or truncated") from None
    while isinstance(content, dict) and not any(isinstance(v, Tensor) for v in content.values()):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            raise UserError(f"{path}: holds no state dict; its entries are {', '.join(map(str, list(content)[:4])) or 'none'}")
        content = inner
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def load_weights(module: nn.Module, path: str | Path, what: str) -> None:
    """Load a file into ``module``, every tensor accounted for; ``what`` names the module in errors."""
    state = read_state_dict(path)
    own = module.state_dict()
    state = {k: v for k, v in state.items() if k.split(".")[-1] not in CONSTANTS}
    needed = [k for k in own if k.split(".")[-1] not in CONSTANTS]
    missing = [k for k in needed if k not in state]
    unexpected = [k for k in state if k not in own]
    wrong = [f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}" for k in needed if k in state and state[k].shape != own[k].shape]
    problems = [f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong)) if names]
    if problems:
        raise UserError(f"{path}: does not fit {what}: tensors {'; '.join(problems)}")
    module.load_state_dict(state, strict=False)


def save_transformer(model: nn.Module, path: Path) -> None:
    """Write the transformer as the official code loads it: VAR bare, LlamaGen under "model"."""
    state = {k: v.detach().cpu().clone() for k, v in model.transformer.state_dict().items()}
    content = {"model": state} if model.checkpoint_name == "model.pt" else state
    atomic_write(path, lambda temporary: torch.save(content, temporary))


def save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    atomic_write(path, lambda temporary: save_file({k: v.contiguous() for k, v in tensors.items()}, temporary))
