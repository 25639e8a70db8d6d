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

from cca.distributed import Processes
from cca.training.curves import draw_curves
from cca.training.losses import LOSSES
from cca.training.schedule import TrainingConfig
from cca.training.states import ema_name, load_state, quiet, saved_steps, write_checksums
from cca.training.trainer import Trainer
from models import UserError
from models.files import (
    atomic_write,
    finite_or_none,
    parse_json,
    read_json,
    reason,
    remove_folder,
    write_json,
    writing,
)
from models.outputs import differing
from models.weights import save_published

# Names in config.json where they are not the field's: a key that changed would not be compared on resuming.
CONFIG_KEYS = {"lambda_": "lam"}
# Told there beside the options, not compared: a run that goes on takes it unless the user says otherwise.
MICRO_BATCH = "micro_batch_size"
# Names in metrics.jsonl of an earlier version, whose rewards were not scaled. Such lines stay as they are.
EARLIER_NAMES = {
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "null_reward": "rewards/null",
}


def describe(config: TrainingConfig, extra: dict, command: str | None = None) -> dict:
    """Content of ``config.json``: ``options`` must agree on resuming, the rest is provenance."""
    options = {CONFIG_KEYS.get(name, name): value for name, value in asdict(config).items()}
    return {
        "command": command,
        "options": {**options, **extra},
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


def read_options(config: Path) -> dict:
    """The options in a run's ``config.json``. Raises UserError for another file."""
    options = read_json(config).get("options")
    if not isinstance(options, dict):
        raise UserError(f"{config}: holds no options of a run; take another folder")
    return options


def noted_micro_batch(folder: Path) -> int:
    """Images of a micro-batch with which a run that has saved states was trained last; 0: not noted.

    Raises UserError for a note that is no such number.
    """
    config = folder / "config.json"
    description = read_json(config) if saved_steps(folder) and config.exists() else {}
    if MICRO_BATCH not in description:
        return 0
    noted = description[MICRO_BATCH]
    if type(noted) is not int or noted < 1:
        raise UserError(f"{config}: {MICRO_BATCH} is {noted!r}, not a number of images; delete that entry")
    return noted


def refuse_others(folder: Path, options: dict) -> None:
    """Raise UserError where the folder holds a run with other options than these, or with none.

    Writes nothing. What is no run's may lie there: logs, codes. What the loss does not depend on may differ.
    """
    config = folder / "config.json"
    if not config.exists() and saved_steps(folder):
        raise UserError(f"--output: {folder} holds saved states, but no config.json: take another folder")
    unused = LOSSES[options["loss"]].absent
    if config.exists() and (changed := differing(read_options(config), options, unused)):
        raise UserError(
            f"--output: {folder} holds a run with other options: "
            f"{', '.join(changed)}; take these, or another folder"
        )


def _row(line: str) -> dict:
    """A line of ``metrics.jsonl``, with the step it is of; raises ValueError, KeyError or TypeError."""
    row = parse_json(line)
    if type(row["step"]) is not int:
        raise TypeError
    return row


def renamed(metrics: dict, scale: float) -> dict:
    """A line of ``metrics.jsonl`` under today's names: rewards of an earlier version times ``scale``."""
    found = {}
    for name, value in metrics.items():
        reward = name in EARLIER_NAMES and name != "accuracy" and isinstance(value, float)
        found[EARLIER_NAMES.get(name, name)] = scale * value if reward else value
    return found


class RunFolder:
    """Where a run writes; every write is atomic, so a run killed at any moment leaves its last good state."""

    def __init__(self, path: Path, processes: Processes, description: dict, keep_states: int = 1):
        """Raises UserError for the folder of a run with other options."""
        self.path, self.processes, self.keep_states = path, processes, keep_states
        self.options = description["options"]
        self.states, self.metrics_path = path / "state", path / "metrics.jsonl"
        self.writer: SummaryWriter  # from ``resume`` on, of the main process
        processes.agree(lambda: self._claim(description), main=True)

    def _claim(self, description: dict) -> None:
        """Note the options; the states' folder comes first, so that what has a config.json has both."""
        config = self.path / "config.json"
        refuse_others(self.path, description["options"])
        with writing(self.states):
            self.states.mkdir(parents=True, exist_ok=True)
            for left in (*self.states.glob(".*.removed"), self.states / ".writing"):
                shutil.rmtree(left, ignore_errors=True)
        if not config.exists():
            write_json(config, description)

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
        self.processes.agree(lambda: self._cut_back(done, trainer.config.max_steps), main=True)
        self.processes.agree(self._drop_old, main=True)
        return done

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

    def _cut_back(self, done: int, max_steps: int) -> None:
        """Leave in metrics and TensorBoard what belongs to the steps that are done; open the latter."""
        lines, damaged = self._lines()
        lines = [(line, row) for line, row in lines if 0 < row["step"] <= done]
        earlier = [row["step"] for _, row in lines if EARLIER_NAMES.keys() & row.keys()]
        if earlier and done < max_steps:
            print(
                f"note: {self.metrics_path}: steps up to {earlier[-1]} keep the names of an earlier version "
                f"({', '.join(EARLIER_NAMES)}), with rewards not multiplied by beta; later steps have "
                f"{', '.join(EARLIER_NAMES.values())}",
                file=sys.stderr,
            )
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
        self.processes.agree(lambda: self._draw(finished=(self.path / name).exists()), main=True)
        for weights, path in ((trainer.full_ema(), ema_name(name)), (trainer.full_weights(), name)):
            # Of a sharded model, the main process alone has the weights.
            self.processes.agree(partial(self._export, weights, self.path / path, trainer), main=True)

    def _draw(self, finished: bool) -> None:
        """Draw ``curves.png`` of all steps, unless the run was finished before."""
        if finished:
            return
        loss = LOSSES[self.options["loss"]]
        scale = loss.reward_scale(self.options["beta"])
        values = {"beta": f"β = {self.options['beta']:g}", "lambda_": f"λ = {self.options['lam']:g}"}
        chosen = ", ".join(values[name] for name in loss.hyperparameters)
        name = f"{self.options['loss']} ({chosen})" if chosen else self.options["loss"]
        title = f"{self.options['model']}, {name}, batch {self.options['batch_size']}"
        try:
            draw_curves(self.path / "curves.png", [renamed(row, scale) for _, row in self._lines()[0]], title)
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
