"""Where a run's metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, or nowhere."""

import importlib.util
import secrets
import sys
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models import UserError
from models.utils.files import atomic_write, reason, writing

REPORT_TO = ("tensorboard", "wandb", "none")


class Reporter(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Report one step. Called for each step in order; raises OSError where it cannot be written."""

    def flush(self) -> None:
        """Write what was reported so far."""


class Nowhere:
    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def flush(self) -> None:
        pass


class TensorBoard:
    """Curves in DIR/tensorboard; those after ``done`` steps are dropped. Raises UserError."""

    def __init__(self, folder: Path, done: int):
        with writing(folder / "tensorboard"):
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        self.flush = self.writer.flush

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)


class WandB:
    """A run of Weights & Biases under the same names; resumed, the same one. Raises UserError.

    Project, entity and mode are those of the environment (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE).
    """

    def __init__(self, folder: Path, options: dict):
        import wandb

        number = folder / "wandb" / "run-id"
        if not number.exists():
            with writing(number.parent):
                number.parent.mkdir(exist_ok=True)
            atomic_write(number, lambda temporary: temporary.write_text(secrets.token_hex(4)))
        settings = wandb.Settings(console="off")  # the command replaces its output streams itself
        self.run: Any = None  # once sending has failed
        try:
            self.run = wandb.init(
                dir=folder, id=number.read_text(), resume="allow", name=folder.name, config=options,
                settings=settings,
            )  # fmt: skip
        except Exception as error:  # of W&B, its settings or its service
            raise UserError(
                f"--report-to: Weights & Biases does not take the run ({reason(error)})"
            ) from None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step. Where that fails, a warning says so, and nothing more is sent."""
        try:
            if self.run:
                self.run.log(metrics, step=step)
        except Exception as error:  # W&B's service ended, or the run was finished elsewhere
            self.run = None
            tqdm.write(f"warning: Weights & Biases gets no more metrics ({reason(error)})", file=sys.stderr)

    def flush(self) -> None:
        pass  # W&B writes by itself


def check_reporter(kind: str) -> None:
    """Raise UserError where a package is missing."""
    found = importlib.util.find_spec("wandb")
    # A folder named wandb, which W&B makes where it runs, has a spec without an origin.
    if kind == "wandb" and (found is None or found.origin is None):
        raise UserError("--report-to: wandb is not installed: pip install -r requirements-wandb.txt")


def open_reporter(kind: str, folder: Path, done: int, options: dict) -> Reporter:
    """Return what reports the steps after ``done``. Raises UserError."""
    if kind == "wandb":
        return WandB(folder, options)
    return TensorBoard(folder, done) if kind == "tensorboard" else Nowhere()
