"""Reading and writing of files: atomic writes, JSON, hashes."""

import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from huggingface_hub.utils import WeakFileLock

from models.utils.errors import UserError

VERSION = "1.0.0"  # also in CITATION.cff
CACHE_LOCK_SECONDS = 600  # without file locks, a process that was killed leaves its lock behind
FORMAT = 1  # format number of every JSON record on disk; outputs of another format are not resumed


UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size_text(size: float) -> str:
    """Return a number of bytes as text, such as "1.2 GB"."""
    unit = 0
    while size >= 999.5 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit > 2 else f"{size:.0f} {UNITS[unit]}"


def existing_part(path: Path) -> Path:
    """Return the path if it exists, else its nearest existing parent folder."""
    absolute = path.absolute()
    return next(part for part in (absolute, *absolute.parents) if os.path.exists(part))


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and the errors that caused it; a CheckpointException holds those of all ranks."""
    if error is None:
        return []
    inner = [e[0] for e in getattr(error, "failures", {}).values()]
    return [error, *(c for e in [*inner, error.__cause__ or error.__context__] for c in causes(e))]


def reason(error: BaseException) -> str:
    """Return in a few words why a file could not be read or written."""
    system = next((e for e in causes(error) if isinstance(e, OSError) and e.strerror), None)
    if system:
        return str(system.strerror)
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def cache_folder() -> Path:
    """Return the cache folder that all runs share; a path that cannot be used if there is no home folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.devnull, "no home, set HOME") if base.startswith("~") else Path(base, "cca-evaluator")


@contextmanager
def cache_lock(path: Path) -> Iterator[None]:
    """Context manager that lets one process at a time make a file of the cache folder.

    Raises OSError: the folder is not writable, or another process holds the lock for ``CACHE_LOCK_SECONDS``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path.with_suffix(".lock"), timeout=CACHE_LOCK_SECONDS):
        yield


def read_cached(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file in the cache folder; empty if it is missing or damaged."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            return dict(content)
    except Exception:  # numpy raises many kinds of errors for damaged files
        return {}


def write_cached(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays of a file in the cache folder, within ``cache_lock``. Raises UserError."""
    write_binary(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager that turns errors of the file system (full, read-only, not a file) into UserErrors."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # PyTorch's writer raises a plain RuntimeError.
        is_torch_writer = any(name in str(error) for name in ("PytorchStreamWriter", "inline_container"))
        if isinstance(error, RuntimeError) and not is_torch_writer:
            raise
        raise UserError(f"{path}: cannot be written ({reason(error)})") from None


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then rename it: no partial file ever appears.

    The temporary name is fixed, so that the next write replaces the file that a killed one left behind. Two
    processes must not write the same path at the same time (see the locks of outputs). Raises UserError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Rename a folder and then remove it, so that it never exists with only a part of its files.

    If an earlier removal was killed, its files are removed as well. Raises UserError.
    """
    trash = folder.with_name(f".{folder.name}.removed")
    with writing(folder):
        if trash.exists():
            shutil.rmtree(trash)
        if folder.exists():
            os.replace(folder, trash)
            shutil.rmtree(trash)


def finite_or_none(content: Any) -> Any:
    """Return a copy with None (JSON's null) in place of each number that is NaN or infinite."""
    if isinstance(content, dict):
        return {key: finite_or_none(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite_or_none(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Path, content: dict) -> None:
    """Write JSON atomically.

    Raises UserError for NaN and infinity, which JSON does not have; ``finite_or_none`` replaces them by null.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError:
        wrong = [key for key, value in content.items() if finite_or_none(value) != value]
        raise UserError(f"{path}: cannot be written, {', '.join(wrong)} is NaN or infinite") from None
    atomic_write(path, lambda temporary: temporary.write_text(text + "\n"))


def parse_json(text: str | bytes, **how: Any) -> Any:
    """Parse JSON that other programs wrote, which may begin with a byte-order mark.

    ``how`` holds options of ``json.loads``. Raises ValueError for text that is not JSON, is nested too deep,
    or contains an integer of more than 64 bits.
    """
    try:
        content = text if isinstance(text, bytes) else text.removeprefix("\ufeff")
        return json.loads(content, parse_int=_parse_integer, **how)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _parse_integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**64:
        raise ValueError("an integer of more than 64 bits")
    return number


def require_regular_file(path: Path) -> Path:
    """Return the path. Raises OSError for a pipe or a device, since reading it may never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "is not a file", str(path))
    return path


def read_json(path: Path) -> dict:
    """Return the JSON object in a file. Raises UserError for anything else."""
    try:
        content = parse_json(require_regular_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged or not JSON ({reason(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} instead of a JSON object")
    return content


def read_own_json(path: Path) -> dict | None:
    """Return the JSON object of a file that this project wrote; None for any other or missing file."""
    try:
        content = read_json(path)
    except UserError:
        return None
    return content if content.get("format") == FORMAT and isinstance(content.get("options"), dict) else None


def read_array(path: Path, mapped: Literal["r"] | None = None) -> np.ndarray:
    """Return the array of an .npy file; ``mapped`` maps it into memory in this mode instead of reading it.

    Raises UserError for other files, and for arrays of objects, because loading these executes code.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about headers that other versions wrote
            # For an .npz with an .npy name this returns an array of strings, which all callers refuse.
            return np.asanyarray(np.load(require_regular_file(path), mapped, allow_pickle=False))
    except Exception as error:  # a damaged header can raise anything
        raise UserError(f"{path}: is missing or damaged ({reason(error)})") from None


def write_binary(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: call ``write`` with it open (numpy would add a suffix to a path)."""

    def open_and_write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            write(file)

    atomic_write(path, open_and_write)


def file_sha256(path: Path) -> str:
    with open(require_regular_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
