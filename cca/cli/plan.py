"""The plan of a command: a few aligned lines, printed before the work; with ``--dry-run`` nothing follows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from huggingface_hub import constants

from cca.cli.parser import Parser
from models.utils.errors import printable
from models.utils.files import size_text
from models.zoo.hub import Download

_hidden = False


def add_dry_run_option(parser: Parser) -> None:
    parser.group("output").add_argument(
        "--dry-run", action="store_true", help="print the plan and exit: without network and without output"
    )


@contextmanager
def hidden_plans() -> Iterator[None]:
    """Context manager that hides plans: ``scripts.reproduce`` runs many commands, and prints each itself."""
    global _hidden
    _hidden = True
    try:
        yield
    finally:
        _hidden = False


def show_plan(rows: Mapping[str, str], downloads: Sequence[Download] = ()) -> None:
    """Print the rows, aligned, then the files to download and their sizes."""
    if _hidden:
        return
    cells = {name: [text] for name, text in rows.items()}
    if downloads:
        lines = [f"~{size_text(file.size)}: {file.name}" for file in downloads]
        if constants.HF_HUB_OFFLINE:
            lines.append("HF_HUB_OFFLINE is set, so they will be refused")
        cells["downloads"] = lines
    width = max(map(len, cells)) + 2
    for name, (first, *others) in cells.items():
        print(f"{name:<{width}}{printable(first)}")
        for line in others:
            print(f"{'':<{width}}{printable(line)}")
    print(flush=True)
