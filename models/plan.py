"""What a command is about to do: a few aligned lines before the work, after which ``--dry-run`` stops."""

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from torch import nn

from models.errors import UserError, printable

_hidden = False

UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Download:
    """A file that will be fetched: its name, about how many bytes, where to, and by which option's wish."""

    name: str
    size: int
    folder: Path
    option: str


def add_dry_run_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done, without network, and stop"
    )


def size_text(size: float) -> str:
    """Bytes as people write them: "1.2 GB"."""
    unit = 0
    while size >= 999.5 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit > 2 else f"{size:.0f} {UNITS[unit]}"


@contextmanager
def hidden_plans() -> Iterator[None]:
    """Nothing is shown inside, of commands that another one calls by the dozen."""
    global _hidden
    _hidden = True
    try:
        yield
    finally:
        _hidden = False


def numbers(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def parameter_count(module: nn.Module) -> str:
    return f"{numbers(module) / 1e6:,.1f} M"


def show_plan(rows: Mapping[str, str], downloads: Sequence[Download] = ()) -> None:
    """Print the rows, aligned, and what is to be downloaded, with its sizes and whether the disk has room."""
    if _hidden:
        return
    shown = {name: [text] for name, text in rows.items()}
    if downloads:
        lines = [f"~{size_text(file.size)}: {file.name}" for file in downloads]
        for disk in dict.fromkeys(_disk(file.folder) for file in downloads):
            room = "enough" if _needed(disk, downloads) <= _free(disk) else "too little"
            free = f"{size_text(_free(disk))} are free at {disk}, which is {room}"
            lines.append(_unusable(disk) or free)
        if constants.HF_HUB_OFFLINE:
            lines.append("HF_HUB_OFFLINE is set, so they will be refused")
        shown["downloads"] = lines
    width = max(map(len, shown)) + 2
    for name, (first, *others) in shown.items():
        print(f"{name:<{width}}{printable(first)}")
        for line in others:
            print(f"{'':<{width}}{printable(line)}")
    print(flush=True)


def output_text(path: Path) -> str:
    """How a plan names a file that is written, whatever is there."""
    return f"{path}, instead of what is there" if path.exists() else str(path)


def require_space(downloads: Sequence[Download]) -> None:
    """Raise UserError where what is to be downloaded cannot be put, or does not fit, as far as is known."""
    for file in downloads:
        disk = _disk(file.folder)
        if unusable := _unusable(disk):
            raise UserError(f"{file.option}: {file.name} is to be downloaded, {unusable}")
        if _needed(disk, downloads) > _free(disk):
            raise UserError(
                f"{file.option}: {file.name} is to be downloaded (~{size_text(file.size)}), "
                f"{disk} has {size_text(_free(disk))} free"
            )


def _needed(disk: Path, downloads: Sequence[Download]) -> int:
    return sum(file.size for file in downloads if _disk(file.folder) == disk)


def _disk(folder: Path) -> Path:
    """The part of a path that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _unusable(place: Path) -> str | None:
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return None
    return f"{place} is no folder that may be written to"


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free
