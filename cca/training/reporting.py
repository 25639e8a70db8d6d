"""Where a run's metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, or nowhere."""

import importlib.util
import secrets
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models import UserError
from models.utils.files import atomic_write, reason, writing

REPORT_TO = ("tensorboard", "wandb", "none")


class TensorBoard:
    """Event files in DIR/tensorboard; values of steps after ``done`` are dropped. Raises UserError."""

    def __init__(self, folder: Path, done: int):
        with writing(folder / "tensorboard"):
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        self.flush = self.writer.flush

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)


class WandB:
    """A run of Weights & Biases, with the same names of metrics. Resuming training resumes the run.

    WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE choose project, entity and mode. Raises UserError.
    """

    def __init__(self, folder: Path, options: dict):
        import wandb

        id_file = folder / "wandb" / "run-id"
        if not id_file.exists():
            with writing(id_file.parent):
                id_file.parent.mkdir(exist_ok=True)
            atomic_write(id_file, lambda temporary: temporary.write_text(secrets.token_hex(4)))
        settings = wandb.Settings(console="off")  # the command replaces its output streams itself
        self.run: Any = None  # also None once sending has failed
        try:
            self.run = wandb.init(
                dir=folder, id=id_file.read_text(), resume="allow", name=folder.name, config=options,
                settings=settings,
            )  # fmt: skip
        except Exception as error:  # W&B, its settings or its service may raise anything
            raise UserError(f"--report-to: Weights & Biases did not start a run ({reason(error)})") from None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a step. If that fails, print a warning and send nothing more."""
        try:
            if self.run:
                self.run.log(metrics, step=step)
        except Exception as error:  # W&B's service ended, or the run was finished elsewhere
            self.run = None
            tqdm.write(f"warning: Weights & Biases gets no more metrics ({reason(error)})", file=sys.stderr)

    def flush(self) -> None:
        pass  # W&B writes by itself


Reporter = TensorBoard | WandB  # ``log`` is called for each step in order, ``flush`` with each checkpoint


def check_reporter(kind: str) -> None:
    """Raise UserError if --report-to needs a package that is not installed."""
    spec = importlib.util.find_spec("wandb") if kind == "wandb" else None
    # W&B creates a folder named wandb where it runs. Such a folder has a spec without an origin.
    if kind == "wandb" and (spec is None or spec.origin is None):
        raise UserError("--report-to: wandb is not installed; run pip install -r requirements-wandb.txt")


def open_reporter(kind: str, folder: Path, done: int, options: dict) -> Reporter | None:
    """Return the reporter of the steps after ``done``, None for "none". Raises UserError."""
    if kind == "wandb":
        return WandB(folder, options)
    return TensorBoard(folder, done) if kind == "tensorboard" else None
