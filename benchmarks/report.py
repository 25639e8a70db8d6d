"""A Markdown file of measured rows, one table per machine, that is written anew with every row."""

import re
from collections.abc import Sequence
from pathlib import Path

from models import UserError
from models.files import atomic_write
from models.tables import markdown_header, markdown_row

SECTION = "\n## "
RUN = re.compile(r"- \((\d+)\) (.*)")  # a run of the command, by number


def read(path: Path) -> tuple[str, dict[str, str]]:
    """The text before the tables, and that of each machine's section."""
    title, *sections = path.read_text().rstrip("\n").split(SECTION)
    return title, {section.split("\n")[0]: section for section in sections}


def table_of(section: str) -> list[list[str]]:
    """The cells of its lines, the head first."""
    lines = (line for line in section.split("\n") if line.startswith("| "))
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]


class Report:
    """Rows by name; those of other machines in the same file stay, and so do rows that are not run again.

    The last column says by its number which run a row is of; ``note`` is what is told of this one. Raises
    UserError where the file has a table of other columns.
    """

    def __init__(self, path: Path, title: str, machine: str, note: str, columns: Sequence[str]):
        self.path, self.machine, self.columns = path, machine, (*columns, "run")
        self.title, self.sections = read(path) if path.exists() else (title, {})
        section = self.sections.get(machine, "")
        self.runs = {int(found[1]): found[2] for found in map(RUN.fullmatch, section.split("\n")) if found}
        self.run = max(self.runs, default=0) + 1
        self.runs[self.run] = note
        head, *rows = table_of(section) or [list(self.columns)]
        if tuple(head) != self.columns:
            raise UserError(f"--output: {path} has a table of other columns for this machine; move it away")
        self.rows = {row[0]: row for row in rows}

    def put(self, name: str, cells: Sequence[str]) -> None:
        """Add a row or replace that of the same name, on disk too; missing cells stay empty."""
        padded = [*cells, *[""] * (len(self.columns) - 2 - len(cells))]
        self.rows[name] = [name, *padded, str(self.run)]
        told = {row[-1] for row in self.rows.values()}
        runs = "\n".join(f"- ({number}) {note}" for number, note in self.runs.items() if str(number) in told)
        table = "\n".join([markdown_header(self.columns), *map(markdown_row, self.rows.values())])
        self.sections[self.machine] = f"{self.machine}\n\n{runs}\n\n{table}"
        text = "".join(f"{part.strip()}\n{SECTION}" for part in (self.title, *self.sections.values()))
        text = text.removesuffix(SECTION)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, lambda temporary: temporary.write_text(text))
