"""The output folder of one run: config, metrics, TensorBoard, resumable state, exported model."""

import json
import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.utils.tensorboard import SummaryWriter

from cca.distributed import Processes
from cca.training.schedule import TrainingConfig
from cca.training.trainer import Trainer
from models import UserError
from models.checkpoints import save_published
from models.files import atomic_write, write_json

# Names in config.json where they are not the field's: a key that changed would not be compared on resuming.
CONFIG_KEYS = {"lambda_": "lam"}


def describe(config: TrainingConfig, extra: dict) -> dict:
    """Content of ``config.json``: ``options`` must agree on resuming, the rest is provenance."""
    options = {CONFIG_KEYS.get(name, name): value for name, value in asdict(config).items()}
    return {
        "options": {**options, **extra},
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


class RunFolder:
    """Where a run writes; every write is atomic, so a run killed at any moment leaves its last good state."""

    def __init__(self, path: Path, processes: Processes, description: dict):
        self.path, self.processes = path, processes
        self.states, self.metrics_path = path / "state", path / "metrics.jsonl"
        self.writer: SummaryWriter  # from ``resume`` on, of the main process
        if (path / "config.json").exists():
            before = json.loads((path / "config.json").read_text())["options"]
            changed = [k for k, v in description["options"].items() if before.get(k, v) != v]
            if changed:
                raise UserError(
                    f"--output: {path} holds a run with other options: "
                    + ", ".join(f"{k} {before[k]} instead of {description['options'][k]}" for k in changed)
                    + "; take these, or another folder"
                )
        processes.barrier()  # all have looked before one writes
        if processes.main and not (path / "config.json").exists():
            self.states.mkdir(parents=True, exist_ok=True)
            write_json(path / "config.json", description)
        processes.barrier()

    def saved_steps(self) -> list[int]:
        """Numbers of the steps whose state is complete, ascending."""
        return sorted(int(p.name.removeprefix("step-")) for p in self.states.glob("step-*"))

    def resume(self, trainer: Trainer) -> int:
        """Load the last saved state if there is one; returns the number of steps done."""
        done = (self.saved_steps() or [0])[-1]
        if done:
            state = trainer.state()
            with quiet():
                dcp.load(state, checkpoint_id=self.states / f"step-{done}")
            trainer.load_state(state)
        self.processes.barrier()
        if self.processes.main:
            lines = (
                self.metrics_path.read_text().splitlines(keepends=True) if self.metrics_path.exists() else []
            )
            atomic_write(self.metrics_path, lambda temporary: temporary.write_text("".join(lines[:done])))
            self.writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=done or None)
        return done

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and one point to each curve of TensorBoard.

        Called by the main process alone, once for each optimizer step, from 1, in order: after
        ``resume`` has cut both back to the step it returned.
        """
        with open(self.metrics_path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def save(self, trainer: Trainer, done: int) -> None:
        """Save the state of step ``done``, drop the one before. Raises UserError if it cannot be written."""
        temporary = self.states / ".writing"
        if self.processes.main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.processes.barrier()
        try:
            with quiet():
                dcp.save(trainer.state(), checkpoint_id=temporary)
            if self.processes.main:
                os.replace(temporary, self.states / f"step-{done}")
                for old in self.saved_steps()[:-1]:
                    shutil.rmtree(self.states / f"step-{old}")
                self.writer.flush()
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self.cannot_write(error) from None
        self.processes.barrier()

    def export(self, trainer: Trainer) -> None:
        """Write the model, and its average if there is one, in the published format."""
        name = Path(trainer.model.checkpoint_name)
        for weights, path in (
            (trainer.full_weights(), name),
            (trainer.full_ema(), f"{name.stem}_ema{name.suffix}"),
        ):
            if self.processes.main and weights:
                try:
                    save_published(weights, self.path / path, trainer.model.checkpoint_key)
                except (OSError, RuntimeError) as error:
                    raise self.cannot_write(error) from None
        self.processes.barrier()

    def cannot_write(self, error: BaseException) -> UserError:
        reason = next(
            (str(e) for e in _causes(error) if isinstance(e, OSError)),
            str(error).strip().splitlines()[0][:100],
        )
        last = self.saved_steps()
        kept = f"the state of step {last[-1]} is intact" if last else "no state was saved yet"
        return UserError(
            f"--output: {self.path} cannot be written ({reason}); {kept}, the same command goes on from there"
        )


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and what it came from; a CheckpointException holds the errors of all processes."""
    if error is None:
        return []
    inner = [e[0] for e in getattr(error, "failures", {}).values()]
    return [error, *(c for e in [*inner, error.__cause__ or error.__context__] for c in _causes(e))]


def quiet():
    """Without torch.distributed.checkpoint's notices about running in a single process."""
    return warnings.catch_warnings(action="ignore")
