"""Files of any kind: atomic writes, JSON, hashes."""

import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from models.utils.errors import UserError

FORMAT = 1  # of every marker and description on disk; nothing of another format is resumed


UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size_text(size: float) -> str:
    """Bytes as people write them: "1.2 GB"."""
    unit = 0
    while size >= 999.5 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit > 2 else f"{size:.0f} {UNITS[unit]}"


def existing_part(path: Path) -> Path:
    """Return a path as far as it exists: itself, or the nearest folder above it that does."""
    whole = path.absolute()
    return next(part for part in (whole, *whole.parents) if os.path.exists(part))


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and what it came from; a CheckpointException holds the errors of all processes."""
    if error is None:
        return []
    inner = [e[0] for e in getattr(error, "failures", {}).values()]
    return [error, *(c for e in [*inner, error.__cause__ or error.__context__] for c in causes(e))]


def reason(error: BaseException) -> str:
    """Why something could not be read or written, in a few words."""
    system = next((e for e in causes(error) if isinstance(e, OSError) and e.strerror), None)
    if system:
        return str(system.strerror)
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def cache_folder() -> Path:
    """Return where all runs keep what they need again; no usable place where there is no home."""
    place = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.devnull, "no home, set HOME") if place.startswith("~") else Path(place, "cca-evaluator")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses (full, read-only, a folder in the way) into a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # PyTorch's writer has no error of its own.
        of_torch = any(name in str(error) for name in ("PytorchStreamWriter", "inline_container"))
        if isinstance(error, RuntimeError) and not of_torch:
            raise
        raise UserError(f"{path}: cannot be written ({reason(error)})") from None


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then rename: never a half-written file.

    The temporary file has one fixed name, so that the next write replaces what a killed one left. Two
    processes must not write the same path at once: see the locks of outputs. Raises UserError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder: renamed first, so that no moment leaves it with a part of its files.

    What a removal that was killed left behind is removed as well. Raises UserError.
    """
    doomed = folder.with_name(f".{folder.name}.removed")
    with writing(folder):
        if doomed.exists():
            shutil.rmtree(doomed)
        if folder.exists():
            os.replace(folder, doomed)
            shutil.rmtree(doomed)


def finite_or_none(content: Any) -> Any:
    """The same dicts and lists with None (JSON's null) for each number that is NaN or infinite."""
    if isinstance(content, dict):
        return {key: finite_or_none(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite_or_none(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Path, content: dict) -> None:
    """Write JSON, atomically.

    Raises UserError for numbers that are NaN or infinite, which JSON does not have; where null is
    meant, ``finite_or_none`` puts it there.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError:
        wrong = [key for key, value in content.items() if finite_or_none(value) != value]
        raise UserError(f"{path}: is not written, {', '.join(wrong)} would hold NaN or infinity") from None
    atomic_write(path, lambda temporary: temporary.write_text(text + "\n"))


def parse_json(text: str | bytes, **how: Any) -> Any:
    """``json.loads``, options and all, for files of others, which may begin with a byte-order mark.

    Raises ValueError for what is no JSON, nested too deep, or holds a whole number beyond 64 bits.
    """
    try:
        plain = text if isinstance(text, bytes) else text.removeprefix("\ufeff")
        return json.loads(plain, parse_int=_whole_number, **how)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _whole_number(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**64:
        raise ValueError("a number of more than 64 bits")
    return number


def require_regular_file(path: Path) -> Path:
    """Return the path. Raises OSError for a pipe or a device, whose reader may wait for ever."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "is not a file", str(path))
    return path


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError for anything else."""
    try:
        content = parse_json(require_regular_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged or not JSON ({reason(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} instead of an object")
    return content


def read_own_json(path: Path) -> dict | None:
    """Return the JSON object of a file that this project wrote; None for any other file, or none."""
    try:
        content = read_json(path)
    except UserError:
        return None
    return content if content.get("format") == FORMAT and isinstance(content.get("options"), dict) else None


def read_array(path: Path, mapped: Literal["r"] | None = None) -> np.ndarray:
    """The array of an .npy file; ``mapped``: mapped into memory in that mode, not read.

    Raises UserError for anything else, and for objects, which would be executed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of headers that other versions wrote
            # Of an .npz under that name this is an array of texts, which no caller takes.
            return np.asanyarray(np.load(require_regular_file(path), mapped, allow_pickle=False))
    except Exception as error:  # a damaged header can raise anything
        raise UserError(f"{path}: is missing or damaged ({reason(error)})") from None


def write_binary(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write`` with an open file, atomically (given a name, numpy would add a suffix to it)."""

    def open_and_write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            write(file)

    atomic_write(path, open_and_write)


def file_sha256(path: Path) -> str:
    with open(require_regular_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
