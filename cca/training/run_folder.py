"""The output folder of one run: config, metrics, TensorBoard, resumable state, exported model."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.tensorboard import SummaryWriter

from cca.config import TrainingConfig
from cca.distributed import Processes
from cca.losses import LOSSES
from cca.training.checkpoints import ema_name, load_state, quiet, saved_steps, write_checksums
from cca.training.curves import draw_curves
from cca.training.trainer import Trainer
from models import UserError
from models.utils.files import (
    atomic_write,
    finite_or_none,
    parse_json,
    read_json,
    reason,
    remove_folder,
    write_json,
    writing,
)
from models.zoo.checkpoint_formats import save_published

# Names in config.json where they are not the field's: a key that changed would not be compared on resuming.
CONFIG_KEYS = {"lambda_": "lam"}
# Told there beside the options, not compared: a run that goes on takes it unless the user says otherwise.
MICRO_BATCH = "micro_batch_size"


def options_of_config(config: TrainingConfig) -> dict:
    """Return the options of a run under their names in config.json."""
    return {CONFIG_KEYS.get(name, name): value for name, value in asdict(config).items()}


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "numpy": np.__version__}


def _row(line: str) -> dict:
    """A line of ``metrics.jsonl``, with the step it is of; raises ValueError, KeyError or TypeError."""
    row = parse_json(line)
    if type(row["step"]) is not int:
        raise TypeError
    return row


class RunFolder:
    """Where a run writes; every write is atomic, so a run killed at any moment leaves its last good state."""

    def __init__(self, path: Path, processes: Processes, options: dict, keep_states: int = 1):
        """``options``: those of config.json."""
        self.path, self.processes, self.keep_states, self.options = path, processes, keep_states, options
        self.states, self.metrics_path = path / "state", path / "metrics.jsonl"
        self.writer: SummaryWriter  # from ``resume`` on, of the main process

    def saved_steps(self) -> list[int]:
        """Numbers of the steps whose state is complete, ascending."""
        return saved_steps(self.path)

    def resume(self, trainer: Trainer) -> int:
        """Load the last saved state if there is one; returns the number of steps done.

        Raises UserError for a damaged state; it names the folder to delete.
        """
        done = int(self.processes.from_main(str((self.saved_steps() or [0])[-1])))
        if done:
            state = trainer.state()
            self.processes.agree(lambda: self._load(state, done))
            trainer.load_state(state)
        self.processes.agree(lambda: self._begin(done), main=True)
        return done

    def _begin(self, done: int) -> None:
        """Leave in the folder what belongs to the steps that are done; open TensorBoard."""
        for left in (*self.states.glob(".*.removed"), self.states / ".writing"):
            shutil.rmtree(left, ignore_errors=True)
        self._cut_back(done)
        self._drop_old()

    def _load(self, state: dict, done: int) -> None:
        path, before = self.states / f"step-{done}", self.saved_steps()[:-1]
        try:
            load_state(state, path, self.processes)
        except UserError as error:
            rest = f"step {before[-1]}" if before else "the start"
            raise UserError(
                f"--output: {error}; delete that folder, and the same command goes on from {rest}"
            ) from None

    def _lines(self) -> tuple[list[tuple[str, dict]], int]:
        """The last line of each step in metrics.jsonl, in order, with its content; how many are damaged."""
        kept: dict[int, tuple[str, dict]] = {}
        damaged = 0
        lines = (
            self.metrics_path.read_text(errors="replace").splitlines() if self.metrics_path.exists() else []
        )
        for line in lines:
            try:
                row = _row(line)
                kept[row["step"]] = line, row
            except (ValueError, KeyError, TypeError):
                damaged += 1  # cut off where the process was killed or the disk was full
        return [kept[step] for step in sorted(kept)], damaged

    def _cut_back(self, done: int) -> None:
        """Leave in metrics and TensorBoard what belongs to the steps that are done; open the latter."""
        lines, damaged = self._lines()
        lines = [(line, row) for line, row in lines if 0 < row["step"] <= done]
        text = "".join(f"{line}\n" for line, _ in lines)
        missing = done - text.count("\n")
        if missing:
            print(
                f"warning: {self.metrics_path}: {missing} of {done} steps have no line, "
                f"{damaged} were cut off",
                file=sys.stderr,
            )
        atomic_write(self.metrics_path, lambda temporary: temporary.write_text(text))
        with writing(self.path / "tensorboard"):
            self.writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=done or None)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and one point to each curve of TensorBoard.

        Called by the main process alone, once for each optimizer step, from 1, in order: after
        ``resume`` has cut both back to the step it returned.
        """
        # A skipped step's loss may be no number.
        line = json.dumps(finite_or_none({"step": step, **metrics}), allow_nan=False)
        try:
            with open(self.metrics_path, "a") as file:
                file.write(line + "\n")
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
        except OSError as error:
            raise self.cannot_write(error) from None

    def save(self, trainer: Trainer, done: int) -> None:
        """Save the state of step ``done``, drop old ones; note what micro-batches it was made with.

        Raises UserError if it cannot be written.
        """
        temporary = self.states / ".writing"
        self.processes.agree(lambda: remove_folder(temporary), main=True)
        self.processes.agree(lambda: self._save(trainer, temporary))
        self.processes.agree(lambda: self._keep(temporary, done, trainer.micro_batch_size), main=True)

    def _save(self, trainer: Trainer, temporary: Path) -> None:
        try:
            with quiet():
                dcp.save(trainer.state(), checkpoint_id=temporary)
            write_checksums(temporary, self.processes)
        except (OSError, RuntimeError, UserError, dcp.api.CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self.cannot_write(error) from None

    def _keep(self, temporary: Path, done: int, micro_batch: int) -> None:
        state, config = self.states / f"step-{done}", self.path / "config.json"
        description = read_json(config)
        if description.get(MICRO_BATCH) != micro_batch:
            write_json(config, {**description, MICRO_BATCH: micro_batch})
        with writing(state):
            os.replace(temporary, state)
            self._drop_old()
            self.writer.flush()

    def _drop_old(self) -> None:
        for old in self.saved_steps()[: -self.keep_states]:
            remove_folder(self.states / f"step-{old}")

    def export(self, trainer: Trainer) -> None:
        """Draw the curves, write the average if there is one, then the model: with it the run is finished."""
        name = trainer.model.checkpoint_name
        self.processes.agree(self._draw, main=True)
        for weights, path in ((trainer.full_ema(), ema_name(name)), (trainer.full_weights(), name)):
            # Of a sharded model, the main process alone has the weights.
            self.processes.agree(partial(self._export, weights, self.path / path, trainer), main=True)

    def _draw(self) -> None:
        """Draw ``curves.png`` of all steps."""
        loss = LOSSES[self.options["loss"]]
        values = {"beta": f"β = {self.options['beta']:g}", "lambda_": f"λ = {self.options['lam']:g}"}
        chosen = ", ".join(values[name] for name in loss.hyperparameters)
        name = f"{self.options['loss']} ({chosen})" if chosen else self.options["loss"]
        title = f"{self.options['model']}, {name}, batch {self.options['batch_size']}"
        try:
            draw_curves(self.path / "curves.png", [row for _, row in self._lines()[0]], title)
        except (UserError, ImportError) as error:  # a picture is not worth the run
            print(f"no curves.png: {error}", file=sys.stderr)

    def _export(self, weights: dict, path: Path, trainer: Trainer) -> None:
        if weights:
            save_published(weights, path, trainer.model.checkpoint_key)

    def cannot_write(self, error: BaseException) -> UserError:
        last = self.saved_steps()
        kept = f"the state of step {last[-1]} is intact" if last else "no state was saved yet"
        return UserError(
            f"--output: {self.path} cannot be written ({reason(error)}); {kept}, "
            "the same command goes on from there"
        )
