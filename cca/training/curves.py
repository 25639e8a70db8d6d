"""The plot of a training run (curves.png): loss, rewards, margins and accuracies over the steps."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # needs no display and no global state of pyplot
from matplotlib.ticker import MaxNLocator

from models.utils.files import atomic_write

# Each panel: the label of its axis, and {name of a metric in the log: its label in the legend}.
PANELS = {
    "loss": ("loss per image", {"loss": "loss"}),
    "rewards": ("reward, nats", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    "margins": ("chosen − rejected, nats", {"rewards/margins": "margin"}),
    "accuracies": ("share with chosen > rejected", {"rewards/accuracies": "accuracy"}),
}
REFERENCES = {"rewards": 0.0, "margins": 0.0, "accuracies": 0.5}  # a thin grey line at this value
COLOURS = ("tab:blue", "tab:orange")
MAX_MARKED_STEPS = 50  # with more steps, the curves have no markers


def metric_values(rows: list[dict], name: str) -> np.ndarray:
    """Return a metric of all rows, float64 [len(rows)]; NaN where it is missing or too large for float32.

    Only a damaged file has larger values; matplotlib would fail on them.
    """
    entries = [row.get(name) for row in rows]
    values = np.array([v if isinstance(v, (int, float)) else np.nan for v in entries], dtype=np.float64)
    return np.where(np.abs(values) <= np.finfo(np.float32).max, values, np.nan)


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the finite values in a window (odd) around each: [n] -> [n]; NaN without any."""
    known = np.isfinite(values)
    sums = np.convolve(np.where(known, values, 0.0), np.ones(window), mode="same")
    counts = np.convolve(known.astype(np.float64), np.ones(window), mode="same").round()
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _draw_panel(axis: Axes, panel: str, steps: np.ndarray, series: dict[str, np.ndarray]) -> None:
    """Plot each value and, with 100 steps or more, the moving mean over a fiftieth of the steps."""
    window = len(steps) // 50 | 1  # odd
    marker = "o" if len(steps) <= MAX_MARKED_STEPS else None
    for (label, values), colour in zip(series.items(), COLOURS):
        if window > 1:
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6)
        axis.plot(steps, moving_mean(values, window), color=colour, marker=marker, markersize=4, label=label)
    if panel in REFERENCES:
        axis.axhline(REFERENCES[panel], color="gray", linewidth=0.8, zorder=0)
    if panel == "accuracies":
        axis.set_ylim(-0.03, 1.03)
    axis.set_xlim(steps[0] - 1, steps[-1] + 1)  # a single step needs a range, too
    if len(series) > 1:
        axis.legend(fontsize=9)
    axis.set_title(f"{panel}, mean of {window} steps" if window > 1 else panel, fontsize=10)
    axis.set(xlabel="optimizer step", ylabel=PANELS[panel][0])
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.ticklabel_format(axis="y", useOffset=False)


def draw_curves(path: Path, rows: list[dict], title: str) -> None:
    """Write a PNG with one panel for each of PANELS whose metrics are in ``rows``.

    Args:
        rows: the metrics of each step, by ascending ``step``. A first step with rewards of 0 (policy and
            reference are equal) is left out unless it is the only one.
        title: heading of the picture.

    Raises:
        UserError: the file cannot be written.
    """
    rows = [row for row in rows if row["step"] > 1 or row.get("rewards/margins") != 0] or rows
    steps = np.array([row["step"] for row in rows])
    series = {
        panel: {label: metric_values(rows, name) for name, label in names.items()}
        for panel, (_, names) in PANELS.items()
    }
    panels = {panel: curves for panel, curves in series.items() if np.isfinite([*curves.values()]).any()}
    columns, lines = (2 if len(panels) > 1 else 1), max((len(panels) + 1) // 2, 1)
    width, height = 5.4 * columns, 3.3 * lines + 0.5  # inches
    figure = Figure(figsize=(width, height), dpi=110)
    # Fixed margins: matplotlib would compute a layout for as long as it draws everything else.
    figure.subplots_adjust(
        left=0.9 / width, right=1 - 0.2 / width, bottom=0.55 / height, top=1 - 0.75 / height,
        wspace=0.24, hspace=0.34,
    )  # fmt: skip
    figure.suptitle(title, fontsize=12, y=1 - 0.2 / height, va="top")
    for place, (panel, curves) in enumerate(panels.items(), 1):
        _draw_panel(figure.add_subplot(lines, columns, place), panel, steps, curves)
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))
