"""Weights files of all layouts: read without executing anything, fitted to a module, written, hashed.

A file's layout is told by its content, never by its name; an index of shards is a ``.json``.
"""

import argparse
import hashlib
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from models.utils.errors import UserError
from models.utils.files import file_sha256, parse_json, require_regular_file, write_binary
from models.zoo.run_folders import INDEX, checkpoint_folder, checkpoint_sha256

# Where the published files and trainers keep the state dict.
WRAPPERS = ("model", "module", "state_dict", "trainer", "var_wo_ddp")
# What torch.compile, FSDP and activation checkpointing put anywhere inside a key.
INSERTED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What may stand beside the tensors: LlamaGen's options, and numpy's numbers as PyTorch's documentation
# allows them (https://docs.pytorch.org/docs/stable/notes/serialization.html).
_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # numpy 1 and 2
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdgFDG"},
]
# A file holds every number once, or a few times where tensors share their storage.
LARGEST_SHARE, SMALL = 8, 2**26


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """State dict of a ``.safetensors`` or PyTorch file, out of whatever wraps it.

    ``path`` may be the index of a ``.safetensors`` in shards, or the folder of such an index, or a checkpoint
    of a training run (``RUN/state/step-N``, ``:ema`` after it for the average).
    Tensors stay memory-mapped where the file allows it. Nothing in the file is executed: only
    tensors, containers, numbers and ``argparse.Namespace`` (which LlamaGen's files hold) are accepted.
    Raises UserError for anything else.
    """
    return read_weights(path)[0]


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], str | None]:
    """State dict of a file as in ``read_state_dict``, and the key under which it stood.

    "" is a bare state dict; None: the file does not say how such weights are published.
    """
    path = Path(path)
    if folder := checkpoint_folder(path):
        from models.zoo.run_checkpoints import read_checkpoint  # slow to import

        return read_checkpoint(folder, path != folder), None
    try:
        files = weights_files(path)
        content, key = _read(files)
        return _tensors(content, path, sum(file.stat().st_size for file in files)), key
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"{path}: may not be read (permission denied)") from None
    except Exception as error:  # a damaged file can raise anything in the readers
        name = re.search(r"(?:GLOBAL |<class ')([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and name:
            raise UserError(
                f"{path}: refused, it holds {name[1]} besides tensors: such objects may be executable "
                "content and are never loaded; if you trust the file, write its tensors alone to another: "
                "torch.save(torch.load(FILE, weights_only=False)['model'], OTHER)"
            ) from None
        is_download = path.is_relative_to(constants.HF_HUB_CACHE)
        again = f"; delete {path.resolve()} to have it downloaded again" if is_download else ""
        raise UserError(
            f"{path}: not a weights file (.pt, .pth or .safetensors), or truncated or damaged{again}"
        ) from None


def weights_files(path: Path) -> list[Path]:
    """The files that weights lie in: one, or the index of several and these.

    Raises UserError for a folder without an index, and for an index that names no files beside it.
    """
    if path.is_dir():
        found = sorted(path.glob(INDEX))
        if len(found) != 1:
            raise UserError(
                f"{path}: is a folder, not a weights file, and holds {len(found) or 'no'} {INDEX}; "
                "give a file, or a folder with one index"
            )
        (path,) = found
    if not path.is_file():
        raise UserError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}")
    if path.suffix != ".json":
        return [path]
    shards = sorted(set(_index(path).values()))
    for shard in shards:
        if not path.with_name(shard).is_file():
            raise UserError(f"{path}: lists {shard}, which does not lie beside it")
    return [path, *map(path.with_name, shards)]


def weights_sha256(path: Path) -> str:
    """SHA-256 of a weights file; of weights in several files, that of these files' hashes."""
    if folder := checkpoint_folder(path):
        return checkpoint_sha256(folder, path != folder)
    hashes = [file_sha256(file) for file in weights_files(path)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _index(path: Path) -> dict[str, str]:
    """Which tensor lies in which file, of the index of weights in shards."""
    try:
        shards = parse_json(require_regular_file(path).read_bytes())["weight_map"]
        if not shards or not all(isinstance(n, str) and n == Path(n).name for n in shards.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: is no index of weights in shards, {{'weight_map': {{tensor: file beside it}}}}"
        ) from None
    return shards


def _read(files: list[Path]) -> tuple[Any, str | None]:
    """Content of the files of ``weights_files``, and the key under which the state dict stands in it."""
    path, *shards = files
    if shards:
        held = {shard.name: _read_safetensors(shard) for shard in shards}
        index = _index(path)
        for key, shard in index.items():
            if key not in held[shard][0]:
                raise UserError(f"{path}: {key} is not in {shard}")
        return {key: held[shard][0][key] for key, shard in index.items()}, held[shards[0].name][1]
    with suppress(SafetensorError, OSError):  # it is of another layout, damaged, or may not be read
        return _read_safetensors(path)
    archive = zipfile.is_zipfile(require_regular_file(path))
    if archive:
        with zipfile.ZipFile(path) as members:
            kinds = {
                member.filename.rpartition("/")[2]: member.compress_type for member in members.infolist()
            }
        if "data.pkl" in kinds and set(kinds.values()) != {zipfile.ZIP_STORED}:
            raise UserError(
                f"{path}: is compressed inside, which torch.save never does; unpack it, save it anew"
            )
    with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings(action="ignore"):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    wrappers: list[str] = []
    while (
        isinstance(content, dict)
        and len(wrappers) < 8  # it may hold itself
        and (inner := next((k for k in WRAPPERS if isinstance(content.get(k), dict)), None))
    ):
        content = content[inner]
        wrappers.append(inner)
    # Nested, it is a training checkpoint, which nobody publishes.
    return content, None if len(wrappers) > 1 else "".join(wrappers)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    with safe_open(require_regular_file(path), "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no dict
        return state, (file.metadata() or {}).get("wrapper")


def _tensors(content: Any, path: Path, size: int) -> dict[str, Tensor]:
    """The state dict that files of ``size`` bytes hold, with the keys of the bare module."""
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    if not content or not all(isinstance(k, str) and _is_dense(v) for k, v in content.items()):
        entries = ", ".join(f"{key}"[:40] for key in list(content)[:4]) or "none"
        raise UserError(f"{path}: holds no state dict; its entries are {' '.join(entries.split())}")
    claimed = sum(tensor.nbytes for tensor in content.values())
    if claimed > LARGEST_SHARE * size + SMALL:
        raise UserError(
            f"{path}: its tensors would take {claimed / 1e9:,.1f} GB, there are {size:,} bytes: refused"
        )
    plain = {}
    for key, tensor in content.items():
        name = ".".join(part for part in key.split(".") if part not in INSERTED)
        if name in plain:
            raise UserError(f"{path}: holds {name} twice, once as {key}")
        plain[name] = tensor
    while all(key.startswith("module.") for key in plain):  # of DistributedDataParallel
        plain = {key.removeprefix("module."): tensor for key, tensor in plain.items()}
    return plain


def _is_dense(value: object) -> bool:
    """Whether it is a tensor with all its numbers."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_nested)
    )


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
    both = [(k, state[k], own[k]) for k in own if k in state]
    kinds = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own and not is_constant(k)],
        "wrongly shaped": [
            f"{k} {list(a.shape)} instead of {list(b.shape)}" for k, a, b in both if a.shape != b.shape
        ],
        "wrongly typed": [
            f"{k} {a.dtype}" for k, a, b in both if a.is_floating_point() != b.is_floating_point()
        ],
    }
    problems = (f"{len(n)} {kind} ({_first_three(n)})" for kind, n in kinds.items() if n)
    return "; ".join(problems) or None


def _first_three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def approximate_size(module: nn.Module) -> int:
    """Bytes of a file of the module's weights, which needs none itself: float32, as published files are.

    What such a file holds besides, or in half precision, is not known before it is there.
    """
    return sum(value.nbytes for value in module.state_dict().values())


def not_finite(state: dict[str, Tensor]) -> str | None:
    """The first few tensors that hold NaN or infinity; None if there are none. Reads all, copies nothing."""
    return _first_three([k for k, v in state.items() if not is_constant(k) and not _is_finite(v)]) or None


def _is_finite(tensor: Tensor) -> bool:
    has_values = tensor.is_floating_point() and tensor.numel()
    return not has_values or all(math.isfinite(end) for end in tensor.detach().aminmax())  # NaN if one is


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
    if problem := mismatch(module, state):
        likely = f"; it looks like {other}" if (other := guess(state)) else ""
        raise UserError(f"{source}: does not fit {what}: tensors {problem}{likely}")
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
    # Given a path, the library would make a file that its owner alone may read.
    write_binary(path, lambda file: file.write(save(tensors, metadata)))


def tensors_sha256(module: nn.Module) -> str:
    """Hash of a module's numbers and their names: the same for every file that holds the same weights."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        if not is_constant(key):
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
