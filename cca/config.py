"""Configuration of sampling and training: the options that determine the results."""

from dataclasses import asdict, dataclass

from models.sampling import SamplingOptions
from models.utils.errors import UserError
from models.utils.limits import Limited, Limits
from models.utils.precision import DTYPES


@dataclass(frozen=True)
class SampleRequest(Limited):
    """What to sample.

    classes: the classes to sample, at least one.
    eval_size: resolution in pixels that images are resized to (bicubic); None keeps the model's.

    Raises UserError for values outside ``limits``.
    """

    num_samples: int
    classes: tuple[int, ...]
    class_order: str
    seed: int
    eval_size: int | None
    dtype: str
    sampling: SamplingOptions

    limits = {
        "num_samples": Limits(1, kind=int),
        "class_order": ("balanced", "random"),
        "seed": Limits(0, kind=int),
        "eval_size": Limits(1, kind=int),
        "dtype": DTYPES,
    }

    def check_classes(self, num_classes: int) -> None:
        """Raise UserError if ``classes`` is empty or has a class outside 0 … num_classes - 1."""
        if not self.classes or not all(0 <= c < num_classes for c in self.classes):
            text = ",".join(map(str, self.classes)) or "the list is empty"
            raise UserError(f"--classes: {text}; expected classes in 0 … {num_classes - 1}")


@dataclass(frozen=True)
class TrainingConfig(Limited):
    """All options that determine the trained weights; ``--help`` of the training commands explains them.

    Raises UserError for values outside ``limits``.
    """

    loss: str
    beta: float
    lambda_: float
    uncond_ratio: float
    batch_size: int
    lr: float
    weight_decay: float
    final_weight_decay: float | None
    grad_clip: float
    warmup: float
    final_lr: float
    schedule_accumulation: int
    max_steps: int
    ema: float
    seed: int
    dtype: str

    limits = {
        "beta": Limits(0, above=True),
        "lambda_": Limits(0),
        "uncond_ratio": Limits(0, 1),
        "batch_size": Limits(1, kind=int),
        "lr": Limits(0),
        "weight_decay": Limits(0),
        "final_weight_decay": Limits(0),
        "grad_clip": Limits(0, above=True),
        "warmup": Limits(0, 1),
        "final_lr": Limits(0, 1),
        "schedule_accumulation": Limits(1, kind=int),
        "max_steps": Limits(1, kind=int),
        "ema": Limits(0, 1),
        "seed": Limits(0, kind=int),
        "dtype": DTYPES,
    }

    def options(self) -> dict:
        """Return the options by the names that they have in config.json."""
        return {"lam" if name == "lambda_" else name: value for name, value in asdict(self).items()}
