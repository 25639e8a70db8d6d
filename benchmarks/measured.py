"""What `python -m benchmarks.gpu` measured beside what was predicted of speed and of memory."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu_rows import Row, precision, recipe_config, request_of, rows
from benchmarks.report import read, table_of
from cca.sampling.fitting import sampling_memory
from cca.training.gpu import training_memory
from models import ZOO, UserError
from models.loading import build_model
from models.tables import markdown_table

COLUMNS = (
    "what", "images/s, predicted eager", "measured eager", "measured compiled", "times as fast",
    "compiling pays from, images", "memory, GB, by the product's rule", "measured eager", "measured compiled",
)  # fmt: skip


def of_the_last_machine(path: Path) -> tuple[str, dict[str, list[str]]]:
    """Its name, and the cells of its rows. Raises UserError where the file has none."""
    sections = read(path)[1] if path.is_file() else {}
    if not sections:
        raise UserError(f"--measured: {path} has no table of benchmarks.gpu")
    machine, section = list(sections.items())[-1]
    return machine, {name: cells for name, *cells in table_of(section)}


def alike(row: Row) -> Row:
    """What a row and its compiled one have in common, and with a row of predictions."""
    return replace(row, name="", images=0, compiled=False, rounds=0)


def expected_memory(row: Row) -> float | None:
    """By the rules that choose a batch or a micro-batch (bytes); None: there is none."""
    if row.kind not in ("sample", "train"):
        return None
    device = torch.device("cuda")
    model = build_model(row.model, device="meta")
    if row.kind == "sample":
        return sampling_memory(model, request_of(row, model, device), row.images)
    config = recipe_config(row.model, 2 * row.images, precision(row, device))
    return training_memory(model, config, row.images, 1, False)


def number(cells: list[str] | None, column: int) -> float | None:
    """None: not measured."""
    try:
        return float(cells[column]) if cells else None
    except (ValueError, IndexError):
        return None


class Compiling:
    """Seconds that it takes once, and those that it saves on an image."""

    def __init__(self, eager: list[str] | None, compiled: list[str] | None):
        speeds, self.takes = (number(eager, 1), number(compiled, 1)), number(compiled, 5)
        self.saves = 1 / speeds[0] - 1 / speeds[1] if speeds[0] and speeds[1] else None


def pays_from(parts: list[Compiling]) -> float | None:
    """Images from which on compiling all of it pays; None: not measured, or never."""
    takes = [part.takes for part in parts if part.takes is not None]
    saves = [part.saves for part in parts if part.saves is not None]
    whole = len(takes) == len(saves) == len(parts)
    return sum(takes) / sum(saves) if whole and sum(saves) > 0 else None


def shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def comparison(path: Path, predicted: Mapping[Row, str]) -> str:
    """A table; ``predicted``: images/s, eager, by ``alike`` rows. Raises UserError as above."""
    machine, cells = of_the_last_machine(path)
    known = rows(small=False)
    compiled = {alike(row): cells.get(row.name) for row in known if row.compiled}
    decoders = {
        ZOO[row.model].tokenizer: Compiling(cells.get(row.name), compiled[alike(row)])
        for row in known
        if row.kind == "decode" and not row.compiled and alike(row) in compiled
    }
    table = []
    for row in (row for row in known if not row.compiled):
        eager, other = cells.get(row.name), compiled.get(alike(row))
        speeds = number(eager, 1), number(other, 1)
        # Sampling compiles the tokenizer's decoder too.
        parts = [Compiling(eager, other)]
        if row.kind == "sample":
            parts.append(decoders[ZOO[row.model].tokenizer])
        memory = expected_memory(row)
        table.append([
            row.name.replace("-eager", ""),
            predicted.get(alike(row), "–"),
            *(shown(speed, ".4g") for speed in speeds),
            shown(speeds[1] / speeds[0] if speeds[0] and speeds[1] else None, ".1f"),
            shown(pays_from(parts), ",.0f"),
            shown(memory and memory / 1e9, ".2f"),
            *(shown(number(found, 2), ".2f") for found in (eager, other)),
        ])  # fmt: skip
    return f"{machine}:\n\n{markdown_table(COLUMNS, table)}"
