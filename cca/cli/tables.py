"""Markdown tables."""

from collections.abc import Iterable, Sequence


def markdown_header(columns: Sequence[str]) -> str:
    return f"{markdown_row(columns)}\n{'|---' * len(columns)}|"


def markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown_table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    return "\n".join([markdown_header(columns), *map(markdown_row, rows)])
