"""What a run is: the options that decide its results."""

from dataclasses import asdict, dataclass

from models.sampling import SamplingOptions


@dataclass(frozen=True)
class SampleRequest:
    """What is sampled; ``classes`` lists the classes in use, ``eval_size`` resizes (bicubic)."""

    num_samples: int
    classes: tuple[int, ...]
    class_order: str
    seed: int
    eval_size: int | None
    dtype: str
    sampling: SamplingOptions


@dataclass(frozen=True)
class TrainingConfig:
    """Every option that decides what is trained; see ``--help`` of the commands."""

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

    def options(self) -> dict:
        """Return the options under their names in config.json."""
        return {"lam" if name == "lambda_" else name: value for name, value in asdict(self).items()}
