"""What a command is about to do: a few aligned lines before the work, after which ``--dry-run`` stops."""

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from huggingface_hub import constants

from models.utils.errors import printable
from models.utils.files import size_text
from models.zoo.hub import Download, space_needed

_hidden = False


def add_dry_run_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be done, without network, and stop"
    )


@contextmanager
def hidden_plans() -> Iterator[None]:
    """Nothing is shown inside, of commands that another one calls by the dozen."""
    global _hidden
    _hidden = True
    try:
        yield
    finally:
        _hidden = False


def show_plan(rows: Mapping[str, str], downloads: Sequence[Download] = ()) -> None:
    """Print the rows, aligned, and what is to be downloaded, with its sizes and whether the disk has room."""
    if _hidden:
        return
    shown = {name: [text] for name, text in rows.items()}
    if downloads:
        lines = [f"~{size_text(file.size)}: {file.name}" for file in downloads]
        for folder, needed in space_needed(downloads).items():
            free = shutil.disk_usage(folder).free
            room = "enough" if needed <= free else "too little"
            lines.append(f"{size_text(free)} are free at {folder}, which is {room}")
        if constants.HF_HUB_OFFLINE:
            lines.append("HF_HUB_OFFLINE is set, so they will be refused")
        shown["downloads"] = lines
    width = max(map(len, shown)) + 2
    for name, (first, *others) in shown.items():
        print(f"{name:<{width}}{printable(first)}")
        for line in others:
            print(f"{'':<{width}}{printable(line)}")
    print(flush=True)
