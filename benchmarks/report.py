"""A Markdown file of measured rows, one table per machine, that is written anew with every row."""

from collections.abc import Sequence
from pathlib import Path

from models.files import atomic_write
from models.tables import markdown_header, markdown_row

SECTION = "\n## "


class Report:
    """Rows by name; those of other machines in the same file stay, and so do rows that are not run again."""

    def __init__(self, path: Path, title: str, machine: str, notes: str, columns: Sequence[str]):
        self.path, self.machine, self.columns = path, machine, columns
        text = path.read_text() if path.exists() else f"{title}\n"
        self.title, *sections = text.rstrip("\n").split(SECTION)
        self.sections = {section.split("\n")[0]: section for section in sections}
        before, *_ = self.sections.get(machine, "").partition("\n\n| ")
        told = [line for line in before.split("\n")[1:] if line and line != notes]
        self.notes = "\n\n".join([*told, notes])  # of the commands that wrote the rows
        self.rows = {
            line.split(" | ")[0].removeprefix("| "): line
            for line in self.sections.get(machine, "").split("\n")
            if line.startswith("| ") and line != markdown_row(columns)
        }

    def put(self, name: str, cells: Sequence[str]) -> None:
        """Add a row or replace that of the same name, on disk too; missing cells stay empty."""
        padded = [*cells, *[""] * (len(self.columns) - 1 - len(cells))]
        self.rows[name] = markdown_row([name, *padded])
        table = "\n".join([markdown_header(self.columns), *self.rows.values()])
        self.sections[self.machine] = f"{self.machine}\n\n{self.notes}\n\n{table}"
        text = "".join(f"{part.strip()}\n{SECTION}" for part in (self.title, *self.sections.values()))
        text = text.removesuffix(SECTION)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, lambda temporary: temporary.write_text(text))
