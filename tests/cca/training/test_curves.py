"""The picture of a run: what is drawn, of which steps, and when."""

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


def rows(count):
    drawn = np.random.default_rng(0).normal(size=(count, 2)).tolist()
    return [{"step": i + 1, "loss": loss, "rewards/chosen": chosen} for i, (loss, chosen) in enumerate(drawn)]


@pytest.mark.parametrize("values", [(1e308, -1e308), (3e38, -3e38), (1e-320, 0), (2**63, 1), (None, None)])
@pytest.mark.parametrize("count", [1, 120])
def test_any_number_is_drawn(values, count, tmp_path):
    """A damaged file may not end a run that is done."""
    made = [{"step": i + 1, "loss": v, "rewards/chosen": v} for i, v in enumerate(values * count)]
    draw_curves(tmp_path / "curves.png", made, "title")
    assert Image.open(tmp_path / "curves.png").format == "PNG"


@pytest.mark.parametrize("count", [1, 3, 60, 5000])
def test_a_panel_for_what_was_logged(count, tmp_path):
    made = [{**row, "loss": None if row["step"] == 2 else row["loss"]} for row in rows(count)]
    draw_curves(tmp_path / "two.png", made, "title")
    draw_curves(tmp_path / "one.png", [{"step": r["step"], "loss": r["rewards/chosen"]} for r in made], "t")
    two, one = (Image.open(tmp_path / name) for name in ("two.png", "one.png"))
    assert two.size == (2 * one.width, one.height)


@pytest.fixture
def drawn(monkeypatch):
    """What ``draw_curves`` is given in each call, which it still draws."""
    calls = []

    def draw(*given):
        calls.append(given)
        draw_curves(*given)

    monkeypatch.setattr(curves, "draw_curves", draw)
    return calls


def test_a_finished_run_is_left_as_it_is(disk, drawn, capsys):
    train("run")
    before = {path: path.read_bytes() for path in (disk / "run").rglob("*") if path.is_file()}
    os.utime(disk / "run" / "curves.png", (1, 1))
    for options in ((), ("--micro-batch-size", "2")):
        train("run", *options)
        assert {path: path.read_bytes() for path in before} == before
    assert (disk / "run" / "curves.png").stat().st_mtime == 1 and len(drawn) == 1
    # Killed between the last state and the model, it was not finished; a picture that is there stays.
    (disk / "run" / "model.pth").unlink()
    train("run")
    assert len(drawn) == 1 and (disk / "run" / "curves.png").read_bytes() == before[disk / "run/curves.png"]


def test_a_picture_is_not_worth_the_run(disk, monkeypatch, capsys):
    def full(*_):
        raise UserError("run/curves.png: cannot be written (No space left on device)")

    monkeypatch.setattr(curves, "draw_curves", full)
    train("run", steps=2)
    assert "no curves.png: run/curves.png: cannot be written" in capsys.readouterr().err
    assert (disk / "run" / "model.pth").exists() and not (disk / "run" / "curves.png").exists()


def test_tensorboard_has_the_same_names(disk):
    train("run", steps=2)
    line = metrics(disk / "run")[-1]
    events = EventAccumulator(str(disk / "run" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) >= line.keys() - {"step"}
    assert events.Scalars("rewards/margins")[-1].value == pytest.approx(line["rewards/margins"], rel=1e-6)


def test_training_starts_without_matplotlib():
    """It takes as long to import as a short run."""
    run("-c", "import sys, train_var_cca; assert 'matplotlib' not in sys.modules")
