"""The plot of a run (curves.png): its panels and when a run draws it; the metrics in TensorBoard."""

import os

import numpy as np
import pytest
from commands import metrics, run
from PIL import Image
from specimens import weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cca.training.curves as curves
import train_var_cca
from cca.training.curves import draw_curves
from models.utils.errors import UserError


def train(output, *options, steps=4):
    fixed = ["--data", "few.npz", "--max-steps", str(steps), "--save-every", "2", "--output", output]
    train_var_cca.main([*weights("var"), *fixed, *options])


def make_rows(count):
    pairs = np.random.default_rng(0).normal(size=(count, 2)).tolist()
    return [{"step": i + 1, "loss": loss, "rewards/chosen": chosen} for i, (loss, chosen) in enumerate(pairs)]


@pytest.mark.parametrize("values", [(1e308, -1e308), (3e38, -3e38), (1e-320, 0), (2**63, 1), (None, None)])
@pytest.mark.parametrize("count", [1, 120])
def test_curves_of_extreme_values(values, count, tmp_path):
    """Extreme or missing values, as in a damaged metrics.jsonl, raise no error."""
    rows = [{"step": i + 1, "loss": v, "rewards/chosen": v} for i, v in enumerate(values * count)]
    draw_curves(tmp_path / "curves.png", rows, "title")
    assert Image.open(tmp_path / "curves.png").format == "PNG"


@pytest.mark.parametrize("count", [1, 3, 60, 5000])
def test_curves_have_a_panel_per_logged_metric(count, tmp_path):
    rows = [{**row, "loss": None if row["step"] == 2 else row["loss"]} for row in make_rows(count)]
    draw_curves(tmp_path / "two.png", rows, "title")
    draw_curves(tmp_path / "one.png", [{"step": r["step"], "loss": r["rewards/chosen"]} for r in rows], "t")
    two, one = (Image.open(tmp_path / name) for name in ("two.png", "one.png"))
    assert two.size == (2 * one.width, one.height)


@pytest.fixture
def plots(monkeypatch):
    """List of the arguments of each call of ``draw_curves``; the calls still draw."""
    calls = []

    def draw(*args):
        calls.append(args)
        draw_curves(*args)

    monkeypatch.setattr(curves, "draw_curves", draw)
    return calls


def test_rerun_does_not_change_finished_run(disk, plots, capsys):
    train("run")
    before = {path: path.read_bytes() for path in (disk / "run").rglob("*") if path.is_file()}
    os.utime(disk / "run" / "curves.png", (1, 1))
    for options in ((), ("--micro-batch-size", "2")):
        train("run", *options)
        assert {path: path.read_bytes() for path in before} == before
    assert (disk / "run" / "curves.png").stat().st_mtime == 1 and len(plots) == 1
    # Without its model, as after a kill between last checkpoint and export, the run is not finished.
    # An existing curves.png is kept.
    (disk / "run" / "model.pth").unlink()
    train("run")
    assert len(plots) == 1 and (disk / "run" / "curves.png").read_bytes() == before[disk / "run/curves.png"]


def test_run_finishes_if_curves_cannot_be_written(disk, monkeypatch, capsys):
    def raise_disk_full(*_):
        raise UserError("run/curves.png: cannot be written (No space left on device)")

    monkeypatch.setattr(curves, "draw_curves", raise_disk_full)
    train("run", steps=2)
    assert "no curves.png: run/curves.png: cannot be written" in capsys.readouterr().err
    assert (disk / "run" / "model.pth").exists() and not (disk / "run" / "curves.png").exists()


def test_tensorboard_tags_equal_metric_names(disk):
    train("run", steps=2)
    line = metrics(disk / "run")[-1]
    events = EventAccumulator(str(disk / "run" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) >= line.keys() - {"step"}
    assert events.Scalars("rewards/margins")[-1].value == pytest.approx(line["rewards/margins"], rel=1e-6)


def test_training_does_not_import_matplotlib_at_start():
    """Importing matplotlib would take as long as a short run."""
    run("-c", "import sys, train_var_cca; assert 'matplotlib' not in sys.modules")
