"""Files of any kind: atomic writes, JSON, hashes."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then rename: never a half-written file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write JSON, atomically."""
    atomic_write(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def write_binary(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write`` with an open file, atomically (given a name, numpy would add a suffix to it)."""

    def open_and_write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            write(file)

    atomic_write(path, open_and_write)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
