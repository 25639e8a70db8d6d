"""The output folder of one run: config, metrics, checkpoints to resume from, exported model."""

import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from cca.distributed import Ranks
from cca.losses import LOSSES
from cca.training.checkpoints import load_checkpoint, write_checkpoint
from cca.training.reporting import Reporter, open_reporter
from cca.training.trainer import Trainer, check_finite
from cca.training.unreadable import NOTED
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
from models.zoo.run_folders import ema_name, saved_steps

# Told there beside the options, not compared: a run that goes on takes it unless the user says otherwise.
MICRO_BATCH, KEPT = "micro_batch_size", "keep_states"


class RunFolder:
    """Where a run writes, so that a run killed at any moment leaves its last good state.

    Files are replaced at once, except metrics.jsonl and TensorBoard's, which grow; ``resume`` cuts them.

    Args:
        options: those of config.json.
        report_to: one of ``REPORT_TO``.
    """

    def __init__(
        self,
        path: Path,
        ranks: Ranks,
        options: dict,
        keep_states: int = 1,
        report_to: str = "tensorboard",
    ):
        self.path, self.ranks, self.keep_states, self.options = path, ranks, keep_states, options
        self.states, self.metrics_path = path / "state", path / "metrics.jsonl"
        self.report_to = report_to
        self.reporter: Reporter  # from ``resume`` on, of rank 0

    def resume(self, trainer: Trainer) -> int:
        """Load the last checkpoint if there is one; return the number of steps done.

        Raises UserError for a damaged one; it names the folder to delete.
        """
        done = int(self.ranks.broadcast_text(str((saved_steps(self.path) or [0])[-1])))
        if done:
            state = trainer.state()
            self._load(state, done)
            trainer.load_state(state)
        self.ranks.run_or_abort_all(lambda: self._begin(done), on_rank0=True)
        return done

    def _load(self, state: dict, done: int) -> None:
        try:
            load_checkpoint(state, self.states / f"step-{done}", self.ranks)
        except UserError as error:
            before = ["the start", *(f"step {step}" for step in saved_steps(self.path)[:-1])]
            raise UserError(
                f"--output: {error}; delete that folder, and the same command goes on from {before[-1]}"
            ) from None

    def _begin(self, done: int) -> None:
        """Leave in the folder what belongs to the steps that are done; open the reporter."""
        left = [*self.states.glob(".*.removed"), self.states / ".writing"]
        if not done:  # what a start left that came to nothing, perhaps with other options
            left += [self.path / name for name in ("tensorboard", "wandb", "samples")]
            (self.path / "curves.png").unlink(missing_ok=True)
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        self._drop_old()
        rows = [row for row in self._rows() if 0 < row["step"] <= done]
        if len(rows) < done:
            print(
                f"warning: {self.metrics_path}: {done - len(rows)} of {done} steps have no line",
                file=sys.stderr,
            )
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        atomic_write(self.metrics_path, lambda temporary: temporary.write_text(text))
        self.reporter = open_reporter(self.report_to, self.path, done, self.options)

    def _rows(self) -> list[dict]:
        """Return the last line of each step in metrics.jsonl, in order."""
        rows: dict[int, dict] = {}
        text = self.metrics_path.read_text(errors="replace") if self.metrics_path.exists() else ""
        for line in text.splitlines():
            # A line is cut off where the process was killed or the disk was full.
            with suppress(ValueError, KeyError, TypeError):
                row = parse_json(line)
                if type(row["step"]) is int:
                    rows[row["step"]] = row
        return [rows[step] for step in sorted(rows)]

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl, and report the step.

        Called on rank 0 alone, once for each optimizer step, from 1, in order: after ``resume`` has cut both
        back to the step it returned.
        """
        try:
            with open(self.metrics_path, "a") as file:
                # A skipped step's loss may be no number.
                file.write(json.dumps(finite_or_none({"step": step, **metrics})) + "\n")
            self.reporter.log(step, metrics)
        except OSError as error:
            raise self.cannot_write(error) from None

    def save(self, trainer: Trainer, done: int, unreadable: dict[str, dict]) -> None:
        """Write the checkpoint of step ``done``, drop old ones.

        Note the micro-batch that it was made with, and the images that could not be read.

        Raises UserError if it cannot be written.
        """
        temporary = self.states / ".writing"

        def write() -> None:
            try:
                write_checkpoint(trainer.state(), temporary, self.ranks)
            except (OSError, RuntimeError, UserError, CheckpointException) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise self.cannot_write(error) from None

        self.ranks.run_or_abort_all(write)
        noted: dict = {MICRO_BATCH: trainer.micro_batch_size, KEPT: self.keep_states}
        noted |= {NOTED: unreadable} if unreadable else {}
        self.ranks.run_or_abort_all(lambda: self._keep(temporary, done, noted), on_rank0=True)

    def _keep(self, temporary: Path, done: int, noted: dict) -> None:
        state, config = self.states / f"step-{done}", self.path / "config.json"
        description = read_json(config)
        if description != {**description, **noted}:
            write_json(config, {**description, **noted})
        with writing(state):
            os.replace(temporary, state)
            self._drop_old()
            self.reporter.flush()

    def _drop_old(self) -> None:
        for old in saved_steps(self.path)[: -self.keep_states]:
            try:
                remove_folder(self.states / f"step-{old}")
            except UserError as error:  # the new one is there
                tqdm.write(f"warning: an old state stays: {error}", file=sys.stderr)

    def export(self, trainer: Trainer) -> None:
        """Write the average of the weights if there is one, then the model: with it the run is finished."""
        model, key = trainer.model.checkpoint_name, trainer.model.checkpoint_key
        # Of a sharded model, rank 0 alone has the weights.
        gathered = {ema_name(model): trainer.full_ema(), model: trainer.full_weights()}

        def write() -> None:
            for weights in gathered.values():
                check_finite(weights)
            for name, weights in gathered.items():
                if weights:
                    save_published(weights, self.path / name, key)

        self.ranks.run_or_abort_all(write, on_rank0=True)

    def draw_curves(self) -> None:
        """Draw ``curves.png`` of all steps if it is missing; where that fails, a warning says so."""
        if (self.path / "curves.png").exists():
            return
        loss = self.options["loss"]
        values = {"beta": f"β = {self.options['beta']:g}", "lambda_": f"λ = {self.options['lam']:g}"}
        if used := ", ".join(values[name] for name in LOSSES[loss].hyperparameters):
            loss += f" ({used})"
        title = f"{self.options['model']}, {loss}, batch {self.options['batch_size']}"
        try:
            # It takes longer to import than all that a training command needs before its first step.
            from cca.training.curves import draw_curves

            draw_curves(self.path / "curves.png", self._rows(), title)
        except Exception as error:  # a notebook's MPLBACKEND among others
            print(f"warning: no curves.png: {reason(error)}", file=sys.stderr)

    def cannot_write(self, error: BaseException) -> UserError:
        return UserError(
            f"--output: {self.path} cannot be written ({reason(error)}); "
            "the same command resumes from the last checkpoint"
        )
