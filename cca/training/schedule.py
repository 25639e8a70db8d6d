"""What is trained when: the schedules of a run, and the order of the data.

Everything here is a function of the options and the step, so a resumed run, or one with other
processes, plans the same.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from cca.config import TrainingConfig
from cca.random_streams import DATA_ORDER, UNCONDITIONAL, stream


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of optimizer step ``step`` (from 0): VAR's linear schedule, constant for final_lr 1.

    lr/peak = wpe + (1 - wpe) * rest / 0.95, at most 1, with rest falling from 1 to 0 after the
    warm-up from 0.005. The published schedule counts micro-batches; a step takes the rate of its
    last one.
    """
    total = config.max_steps * config.schedule_accumulation
    return config.lr * lr_factor(_tick(step, config), config.warmup * total, total, config.final_lr)


def lr_factor(tick: int, warm: float, total: int, final: float) -> float:
    """Fraction of the peak rate at one tick of the schedule."""
    if tick < warm:
        return 0.005 + 0.995 * tick / warm
    rest = 1.0 - (tick - warm) / max(total - 1 - warm, 1)
    return final + (1.0 - final) * min(1.0, rest / 0.95)


def weight_decay(step: int, config: TrainingConfig) -> float:
    """Weight decay of a step: constant, or a cosine from ``weight_decay`` to ``final_weight_decay``."""
    first, last = config.weight_decay, config.final_weight_decay
    if last is None:
        return first
    total = config.max_steps * config.schedule_accumulation
    return last + (first - last) * (0.5 + 0.5 * math.cos(math.pi * _tick(step, config) / max(total - 1, 1)))


def _tick(step: int, config: TrainingConfig) -> int:
    """Place in the published schedule, which counts micro-batches, of an optimizer step's last one."""
    return (step + 1) * config.schedule_accumulation - 1


def global_batch(step: int, size: int, config: TrainingConfig) -> tuple[int, np.ndarray]:
    """Return the epoch of a step and the indices [batch_size] of its images, of ``size`` in all.

    What is left of an epoch after its last whole batch is dropped.
    """
    epoch, position = divmod(step, size // config.batch_size)
    order = _epoch_order(config.seed, epoch, size)
    return epoch, order[position * config.batch_size : (position + 1) * config.batch_size]


@functools.lru_cache(maxsize=1)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return stream(seed, DATA_ORDER, epoch).permutation(size)


def unconditional_rows(indices: np.ndarray, epoch: int, config: TrainingConfig) -> Tensor:
    """Return which images lose their class, drawn for each (seed, epoch, image): bool [B]."""
    draws = [stream(config.seed, UNCONDITIONAL, epoch, int(i)).random() for i in indices]
    return torch.tensor(draws) < config.uncond_ratio
