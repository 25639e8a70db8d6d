"""Weights files of all formats: reading without executing code, loading into a module, writing, hashing.

The content of a file decides its format, not its name. Only an index of shards must be a ``.json``.
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

# Keys under which published files and trainers keep the state dict.
WRAPPERS = ("model", "module", "state_dict", "trainer", "var_wo_ddp")
# Parts that torch.compile, FSDP and activation checkpointing insert into keys.
INSERTED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Types allowed besides tensors: LlamaGen's options, and numpy scalars as in PyTorch's documentation
# (https://docs.pytorch.org/docs/stable/notes/serialization.html).
_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # numpy 1 and 2
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdgFDG"},
]
# Tensors may have at most LARGEST_RATIO times the bytes of their file, plus SMALL bytes. They exceed the file
# only if they share storage.
LARGEST_RATIO, SMALL = 8, 2**26


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a ``.safetensors`` or PyTorch file, without the dicts that wrap it.

    ``path`` may also be the index of a sharded ``.safetensors``, the folder of such an index, or a checkpoint
    of a training run (``RUN/state/step-N``, followed by ``:ema`` for the average). Tensors stay memory-mapped
    if the file allows it. Nothing in the file is executed: only tensors, containers, numbers and
    ``argparse.Namespace`` (in LlamaGen's files) are accepted. Raises UserError for anything else.
    """
    return read_weights(path)[0]


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the state dict of a file as ``read_state_dict`` does, and the key that wrapped it in the file.

    The key is "" if nothing wrapped it, and None if the file does not tell how such weights are published.
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
        raise UserError(f"{path}: cannot be read (permission denied)") from None
    except Exception as error:  # a damaged file can raise anything in the readers
        name = re.search(r"(?:GLOBAL |<class ')([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and name:
            raise UserError(
                f"{path}: refused, it holds {name[1]} besides tensors; such objects may execute code and are "
                "never loaded; if you trust the file, save only its tensors to another file: "
                "torch.save(torch.load(FILE, weights_only=False)['model'], OTHER)"
            ) from None
        is_download = path.is_relative_to(constants.HF_HUB_CACHE)
        again = f"; delete {path.resolve()} to have it downloaded again" if is_download else ""
        raise UserError(
            f"{path}: not a weights file (.pt, .pth or .safetensors), or truncated or damaged{again}"
        ) from None


def weights_files(path: Path) -> list[Path]:
    """Return the files of some weights: a single file, or an index followed by its shards.

    Raises UserError for a folder without an index, and for an index whose shards are not beside it.
    """
    if path.is_dir():
        indices = sorted(path.glob(INDEX))
        if len(indices) != 1:
            raise UserError(
                f"{path}: is a folder, not a weights file, and holds {len(indices) or 'no'} {INDEX}; "
                "give a file, or a folder with one index"
            )
        (path,) = indices
    if not path.is_file():
        raise UserError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}")
    if path.suffix != ".json":
        return [path]
    shards = sorted(set(_index(path).values()))
    for shard in shards:
        if not path.with_name(shard).is_file():
            raise UserError(f"{path}: lists {shard}, which is not in the same folder")
    return [path, *map(path.with_name, shards)]


def weights_sha256(path: Path) -> str:
    """Return the SHA-256 of a weights file; for several files, the SHA-256 of their hashes."""
    if folder := checkpoint_folder(path):
        return checkpoint_sha256(folder, path != folder)
    hashes = [file_sha256(file) for file in weights_files(path)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _index(path: Path) -> dict[str, str]:
    """Return the map from tensor names to file names in the index of sharded weights."""
    try:
        shards = parse_json(require_regular_file(path).read_bytes())["weight_map"]
        if not shards or not all(isinstance(n, str) and n == Path(n).name for n in shards.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: is not an index of sharded weights, {{'weight_map': {{tensor: file beside it}}}}"
        ) from None
    return shards


def _read(files: list[Path]) -> tuple[Any, str | None]:
    """Return the content of the files of ``weights_files``, and the key that wrapped the state dict."""
    path, *shards = files
    if shards:
        contents = {shard.name: _read_safetensors(shard) for shard in shards}
        index = _index(path)
        for key, shard in index.items():
            if key not in contents[shard][0]:
                raise UserError(f"{path}: {key} is not in {shard}")
        return {key: contents[shard][0][key] for key, shard in index.items()}, contents[shards[0].name][1]
    with suppress(SafetensorError, OSError):  # the file has another format, is damaged or cannot be read
        return _read_safetensors(path)
    content, wrappers = _unwrap(_read_torch(path))
    # Several wrappers mean a training checkpoint, which is not a format for publishing.
    return content, None if len(wrappers) > 1 else "".join(wrappers)


def _read_torch(path: Path) -> Any:
    """Return the content of a file of ``torch.save``, memory-mapped if its format allows it."""
    archive = zipfile.is_zipfile(require_regular_file(path))
    if archive:
        with zipfile.ZipFile(path) as members:
            kinds = {
                member.filename.rpartition("/")[2]: member.compress_type for member in members.infolist()
            }
        if "data.pkl" in kinds and set(kinds.values()) != {zipfile.ZIP_STORED}:
            raise UserError(
                f"{path}: is a compressed archive, which torch.save never writes; unpack it and save it again"
            )
    with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)


def _unwrap(content: Any) -> tuple[Any, list[str]]:
    """Return what the dicts under the keys WRAPPERS contain, and these keys, the outermost first."""
    keys = list[str]()
    while isinstance(content, dict) and len(keys) < 8:  # a dict may contain itself
        key = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if key is None:
            break
        content = content[key]
        keys.append(key)
    return content, keys


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    with safe_open(require_regular_file(path), "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, file is not a dict
        return state, (file.metadata() or {}).get("wrapper")


def _tensors(content: Any, path: Path, size: int) -> dict[str, Tensor]:
    """Return the state dict in files of ``size`` bytes, with the keys of the unwrapped module."""
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    if not content or not all(isinstance(k, str) and _is_dense(v) for k, v in content.items()):
        entries = ", ".join(f"{key}"[:40] for key in list(content)[:4]) or "none"
        raise UserError(f"{path}: holds no state dict; its entries are {' '.join(entries.split())}")
    tensor_bytes = sum(tensor.nbytes for tensor in content.values())
    if tensor_bytes > LARGEST_RATIO * size + SMALL:
        raise UserError(
            f"{path}: refused, its tensors would take {tensor_bytes / 1e9:,.1f} GB, "
            f"but the file has only {size:,} bytes"
        )
    state = {}
    for key, tensor in content.items():
        name = ".".join(part for part in key.split(".") if part not in INSERTED)
        if name in state:
            raise UserError(f"{path}: holds {name} twice, once as {key}")
        state[name] = tensor
    while all(key.startswith("module.") for key in state):  # DistributedDataParallel adds this prefix
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return state


def _is_dense(value: object) -> bool:
    """Return whether it is a dense tensor whose elements are all in memory."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_nested)
    )


# Constant buffers and statistics. A file may lack them or hold them in other shapes.
CONSTANTS = (
    "lvl_1L",
    "attn_bias_for_masking",
    "zero_k_bias",
    "ema_vocab_hit_SV",
    "codebook_used",
    "freqs_cis",
)


def is_constant(key: str) -> bool:
    """Return whether a key names a constant buffer or a usage statistic."""
    return key.split(".")[-1] in CONSTANTS


def mismatch(module: nn.Module, state: dict[str, Tensor]) -> str | None:
    """Return the first few missing, unexpected, wrongly shaped or typed tensors as text; None if all fit."""
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
    """Return about how many bytes a file of the module's weights has; the module may be on the meta device.

    The estimate assumes float32 and nothing but the weights, as in most published files.
    """
    return sum(value.nbytes for value in module.state_dict().values())


def not_finite(state: dict[str, Tensor]) -> str | None:
    """Return the first few tensors with NaN or infinity as text; None if all are finite. Copies nothing."""
    return _first_three([k for k, v in state.items() if not is_constant(k) and not _is_finite(v)]) or None


def _is_finite(tensor: Tensor) -> bool:
    has_values = tensor.is_floating_point() and tensor.numel()
    # Both the minimum and the maximum are NaN if any element is.
    return not has_values or all(math.isfinite(end) for end in tensor.detach().aminmax())


def load_weights(
    module: nn.Module,
    path: str | Path,
    what: str,
    guess: Callable[[dict[str, Tensor]], str | None] = lambda state: None,
) -> None:
    """Load a weights file into a module, after a check that all tensors fit and all elements are finite.

    Args:
        what: name of the module in errors.
        guess: may return the name of the model that unsuitable weights belong to.

    Raises:
        UserError: the file cannot be read, or its tensors do not fit or are not finite.
    """
    state = read_state_dict(path)
    if problem := mismatch(module, state):
        likely = f"; it looks like {other}" if (other := guess(state)) else ""
        raise UserError(f"{path}: does not fit {what}: tensors {problem}{likely}")
    weights = {k: v.float() if v.is_floating_point() else v for k, v in state.items() if not is_constant(k)}
    if wrong := not_finite(weights):
        raise UserError(f"{path}: holds weights that are not finite (NaN or infinite): {wrong}")
    module.load_state_dict(weights, strict=False, assign=True)  # float32 tensors are not copied


def save_published(state: dict[str, Tensor], path: Path, key: str = "") -> None:
    """Write a state dict in the format of the official code: under ``key``, or without a key if it is ""."""
    state = {k: v.detach().cpu().clone() for k, v in state.items()}
    # With a path instead of an open file, PyTorch would store the file's name inside.
    write_binary(path, lambda file: torch.save({key: state} if key else state, file))


def save_safetensors(state: dict[str, Tensor], path: Path, key: str = "") -> None:
    """Write a state dict as .safetensors, with the key under which it is published in the metadata."""
    metadata = {"format": "pt", "wrapper": key}
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    # With a path, the library would create a file that only its owner can read.
    write_binary(path, lambda file: file.write(save(tensors, metadata)))


def tensors_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of a module's tensors and their names, the same for every file of these weights."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        if not is_constant(key):
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
