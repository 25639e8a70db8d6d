"""Shared by the benchmarks: their options, the description of the machine, and the file of tables."""

import datetime
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cca.cli.parser import Parser
from cca.cli.tables import markdown_header, markdown_row
from models import UserError
from models.utils.files import VERSION, atomic_write


def make_parser(description: str | None, module: str, output: Path) -> Parser:
    """Return a parser with the common options; ``output`` is the file that a run of all rows writes."""
    parser = Parser(description or "", module)
    add = parser.add_argument
    add("--only", action="append", metavar="ROW", help="this row alone; may be given several times")
    add("--list", action="store_true", help="print the names of the rows")
    add("--small", action="store_true", help="rows of the bundled mini models alone")
    add("--output", type=Path, metavar="FILE", help=f"Markdown file (default: {output}, if all rows run)")
    return parser


def select(rows: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """Return the rows of ``--only``, or all, in running order. Raise UserError for an unknown name."""
    for name in names or ():
        if name not in rows:
            raise UserError(f"--only: there is no row {name!r}; --list prints the names of all rows")
    return {name: row for name, row in rows.items() if not names or name in names}


def processor() -> str:
    """Return the name of the first GPU, or of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)", file.read_text() if file.exists() else "", re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def provenance(command: str) -> str:
    """Return the line above the tables: command (after ``python``), date, machine and versions."""
    machine = f"{processor()}, {torch.get_num_threads()} threads"
    versions = f"cca {VERSION}, Python {platform.python_version()}, torch {torch.__version__}"
    return f"`python {command}`, {datetime.date.today()}: {machine}, {versions}"


class Report:
    """Markdown tables that are printed and written row by row, so that an interrupted run keeps its rows."""

    def __init__(self, path: Path | None, title: str, command: str):
        """
        Args:
            path: the file, which is replaced; None only prints the tables.
            title: heading of the file.
            command: the command line after ``python``.
        """
        self.path, self.text = path, ""
        self.write(f"# {title}\n\n{provenance(command)}.")

    def table(self, heading: str, note: str, columns: Sequence[str]) -> None:
        """Begin a table below a heading and a note."""
        self.write(f"\n## {heading}\n\n{note}\n\n{markdown_header(columns)}")

    def row(self, *cells: str) -> None:
        """Add a row to the table; missing cells at its end stay empty."""
        self.write(markdown_row(cells))

    def write(self, text: str) -> None:
        """Print lines and add them to the file."""
        print(text, flush=True)
        self.text += f"{text}\n"
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, lambda temporary: temporary.write_text(self.text))
