"""The picture that a run leaves of its training: loss, rewards, margins and accuracies over the steps."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # draws without a display, and without pyplot's global state
from matplotlib.ticker import MaxNLocator

from models.utils.files import atomic_write

# By panel the label of its axis, and what is drawn, by its name in the log with what the legend calls it.
PANELS = {
    "loss": ("loss per image", {"loss": "loss"}),
    "rewards": ("reward, nats", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    "margins": ("chosen − rejected, nats", {"rewards/margins": "margin"}),
    "accuracies": ("share with chosen > rejected", {"rewards/accuracies": "accuracy"}),
}
REFERENCES = {"rewards": 0.0, "margins": 0.0, "accuracies": 0.5}  # a thin grey line
COLOURS = ("tab:blue", "tab:orange")
MARKED = 50  # up to so many steps each has a point


def values_of(rows: list[dict], name: str) -> np.ndarray:
    """A metric in all rows, float64 [len(rows)]; NaN where a row has no such number that float32 can hold.

    Larger ones, as only a damaged file has, would end in an error of matplotlib.
    """
    found = [row.get(name) for row in rows]
    values = np.array([v if isinstance(v, (int, float)) else np.nan for v in found], dtype=np.float64)
    return np.where(np.abs(values) <= np.finfo(np.float32).max, values, np.nan)


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the numbers among ``window`` values (odd) around each: [n] -> [n]; NaN where none is."""
    known = np.isfinite(values)
    sums = np.convolve(np.where(known, values, 0.0), np.ones(window), mode="same")
    counts = np.convolve(known.astype(np.float64), np.ones(window), mode="same").round()
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _draw_panel(axis: Axes, panel: str, steps: np.ndarray, series: dict[str, np.ndarray]) -> None:
    """Draw each value, and over them from 100 steps on the means of a fiftieth of the steps."""
    window = len(steps) // 50 | 1  # odd
    marker = "o" if len(steps) <= MARKED else None
    for (label, values), colour in zip(series.items(), COLOURS):
        if window > 1:
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6)
        axis.plot(steps, moving_mean(values, window), color=colour, marker=marker, markersize=4, label=label)
    if panel in REFERENCES:
        axis.axhline(REFERENCES[panel], color="gray", linewidth=0.8, zorder=0)
    if panel == "accuracies":
        axis.set_ylim(-0.03, 1.03)
    axis.set_xlim(steps[0] - 1, steps[-1] + 1)  # of a single step, too
    if len(series) > 1:
        axis.legend(fontsize=9)
    axis.set_title(f"{panel}, mean of {window} steps" if window > 1 else panel, fontsize=10)
    axis.set(xlabel="optimizer step", ylabel=PANELS[panel][0])
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.ticklabel_format(axis="y", useOffset=False)


def draw_curves(path: Path, rows: list[dict], title: str) -> None:
    """Write a PNG with a panel for each of PANELS that the rows have numbers of.

    Args:
        rows: what was logged of each step, by ascending ``step``. A first step at which policy and reference
            are one, so that all rewards are 0, is left out where there are others.
        title: stands on top.

    Raises:
        UserError: it cannot be written.
    """
    rows = [row for row in rows if row["step"] > 1 or row.get("rewards/margins") != 0] or rows
    steps = np.array([row["step"] for row in rows])
    series = {
        panel: {label: values_of(rows, name) for name, label in names.items()}
        for panel, (_, names) in PANELS.items()
    }
    drawn = {panel: curves for panel, curves in series.items() if np.isfinite([*curves.values()]).any()}
    columns, lines = (2 if len(drawn) > 1 else 1), max((len(drawn) + 1) // 2, 1)
    width, height = 5.4 * columns, 3.3 * lines + 0.5  # inches
    figure = Figure(figsize=(width, height), dpi=110)
    # Measured by hand: a layout that is computed takes as long as all the rest.
    figure.subplots_adjust(
        left=0.9 / width, right=1 - 0.2 / width, bottom=0.55 / height, top=1 - 0.75 / height,
        wspace=0.24, hspace=0.34,
    )  # fmt: skip
    figure.suptitle(title, fontsize=12, y=1 - 0.2 / height, va="top")
    for place, (panel, curves) in enumerate(drawn.items(), 1):
        _draw_panel(figure.add_subplot(lines, columns, place), panel, steps, curves)
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))
