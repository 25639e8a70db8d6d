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

# Entries of config.json that are not compared on resume. A resumed run keeps them unless options change them.
MICRO_BATCH, KEPT = "micro_batch_size", "keep_states"


class RunFolder:
    """The output folder of a run. A run that is killed at any moment leaves its last good checkpoint.

    Files are replaced atomically, except metrics.jsonl and TensorBoard's. These are appended to, and
    ``resume`` removes what later steps wrote.

    Args:
        options: the options in config.json.
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
        self.checkpoints, self.metrics_path = path / "state", path / "metrics.jsonl"
        self.report_to = report_to
        self.reporter: Reporter | None = None  # set by ``resume`` on rank 0

    def resume(self, trainer: Trainer) -> int:
        """Load the last checkpoint if there is one, and return the number of steps done.

        Raises:
            UserError: the checkpoint is damaged; the message names the folder to delete.
        """
        done = self.ranks.broadcast_from_rank0(lambda: (saved_steps(self.path) or [0])[-1])
        if done:
            state = trainer.state()
            self._load(state, done)
            trainer.load_state(state)
        self.ranks.run_or_abort_all(lambda: self._begin(done), on_rank0=True)
        return done

    def _load(self, state: dict, done: int) -> None:
        try:
            load_checkpoint(state, self.checkpoints / f"step-{done}", self.ranks)
        except UserError as error:
            before = ["the start", *(f"step {step}" for step in saved_steps(self.path)[:-1])]
            raise UserError(
                f"--output: {error}; delete that folder, then run the same command again to continue "
                f"from {before[-1]}"
            ) from None

    def _begin(self, done: int) -> None:
        """Remove from the folder what does not belong to the first ``done`` steps; open the reporter."""
        leftovers = [*self.checkpoints.glob(".*.removed"), self.checkpoints / ".writing"]
        if not done:  # an earlier start, perhaps with other options, saved no checkpoint
            leftovers += [self.path / name for name in ("tensorboard", "wandb", "samples")]
            (self.path / "curves.png").unlink(missing_ok=True)
        for folder in leftovers:
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

        Called on rank 0 alone, after ``resume``, once for each optimizer step (from 1) in order.
        """
        try:
            with open(self.metrics_path, "a") as file:
                # The loss of a skipped step may be NaN.
                file.write(json.dumps(finite_or_none({"step": step, **metrics})) + "\n")
            if self.reporter:
                self.reporter.log(step, metrics)
        except OSError as error:
            raise self._write_error(error) from None

    def save(self, trainer: Trainer, done: int, unreadable: dict[str, dict]) -> None:
        """Write the checkpoint of step ``done`` and remove old ones. All ranks take part.

        config.json gets the micro-batch size and the images that could not be read.

        Raises:
            UserError: the checkpoint cannot be written.
        """
        temporary = self.checkpoints / ".writing"

        def write() -> None:
            try:
                write_checkpoint(trainer.state(), temporary, self.ranks)
            except (OSError, RuntimeError, UserError, CheckpointException) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise self._write_error(error) from None

        self.ranks.run_or_abort_all(write)
        entries: dict = {MICRO_BATCH: trainer.micro_batch_size, KEPT: self.keep_states}
        entries |= {NOTED: unreadable} if unreadable else {}
        self.ranks.run_or_abort_all(lambda: self._commit(temporary, done, entries), on_rank0=True)

    def _commit(self, temporary: Path, done: int, entries: dict) -> None:
        """Add ``entries`` to config.json, move a complete checkpoint to its place, remove old ones."""
        checkpoint, config = self.checkpoints / f"step-{done}", self.path / "config.json"
        description = read_json(config)
        if description != {**description, **entries}:
            write_json(config, {**description, **entries})
        with writing(checkpoint):
            os.replace(temporary, checkpoint)
            self._drop_old()
            if self.reporter:
                self.reporter.flush()

    def _drop_old(self) -> None:
        for old in saved_steps(self.path)[: -self.keep_states]:
            try:
                remove_folder(self.checkpoints / f"step-{old}")
            except UserError as error:  # the new checkpoint is complete
                tqdm.write(f"warning: an old checkpoint could not be removed: {error}", file=sys.stderr)

    def export(self, trainer: Trainer) -> None:
        """Write the averaged weights, if any, then the model. Its file marks the run as finished."""
        name, key = trainer.model.checkpoint_name, trainer.model.checkpoint_key
        # Only rank 0 gets the weights of a sharded model, and the averages.
        weights, averages = trainer.full_weights(), trainer.full_ema()

        def write() -> None:
            check_finite(weights)
            check_finite(averages)
            if averages:  # the file also has the constant buffers
                save_published({**weights, **averages}, self.path / ema_name(name), key)
            save_published(weights, self.path / name, key)

        self.ranks.run_or_abort_all(write, on_rank0=True)

    def draw_curves(self) -> None:
        """Draw ``curves.png`` of all steps if it is missing; print a warning if that fails."""
        if (self.path / "curves.png").exists():
            return
        loss = self.options["loss"]
        values = {"beta": f"β = {self.options['beta']:g}", "lambda_": f"λ = {self.options['lam']:g}"}
        if used := ", ".join(values[name] for name in LOSSES[loss].hyperparameters):
            loss += f" ({used})"
        title = f"{self.options['model']}, {loss}, batch {self.options['batch_size']}"
        try:
            # Imported late: matplotlib takes longer to import than all else that a training command needs.
            from cca.training.curves import draw_curves

            if rows := self._rows():
                draw_curves(self.path / "curves.png", rows, title)
        except Exception as error:  # for example an MPLBACKEND that a notebook set
            print(f"warning: no curves.png: {reason(error)}", file=sys.stderr)

    def _write_error(self, error: BaseException) -> UserError:
        """Return the error to raise where a file of the run cannot be written."""
        return UserError(
            f"--output: {self.path} cannot be written ({reason(error)}); "
            "run the same command again to resume from the last checkpoint"
        )
