"""Tables of text: Markdown, and columns aligned for a terminal."""

from collections.abc import Collection, Iterable, Sequence


def markdown_header(columns: Sequence[str]) -> str:
    return f"{markdown_row(columns)}\n{'|---' * len(columns)}|"


def markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown_table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    return "\n".join([markdown_header(columns), *map(markdown_row, rows)])


def aligned_table(rows: Sequence[dict[str, str]], left: Collection[str]) -> str:
    """Columns in ``left`` are aligned there, the others, numbers, to the right."""
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    lines = [
        "  ".join(row[c].ljust(w) if c in left else row[c].rjust(w) for c, w in widths.items()).rstrip()
        for row in (dict(zip(widths, widths)), *rows)
    ]
    return "\n".join(lines)
