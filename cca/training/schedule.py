"""The schedules of a run (learning rate, weight decay) and the order of its data.

Everything here is a function of the options and the step. So a resumed run, or one on another number of
ranks, has the same schedule and order.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from cca.config import TrainingConfig
from cca.random_streams import DATA_ORDER, UNCONDITIONAL, stream


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0): VAR's linear schedule.

    The warm-up rises linearly from 0.005 to 1 times the peak rate. After it, the factor of the peak rate is
    final_lr + (1 - final_lr) * rest / 0.95, at most 1, where rest falls from 1 to 0. With final_lr 1 the rate
    is constant. The published schedule counts micro-batches; a step takes the rate of its last one.
    """
    total = config.max_steps * config.schedule_accumulation
    return config.lr * lr_factor(_tick(step, config), config.warmup * total, total, config.final_lr)


def lr_factor(tick: int, warm: float, total: int, final: float) -> float:
    """Return the factor of the peak rate at one tick of the schedule."""
    if tick < warm:
        return 0.005 + 0.995 * tick / warm
    rest = 1.0 - (tick - warm) / max(total - 1 - warm, 1)
    return final + (1.0 - final) * min(1.0, rest / 0.95)


def weight_decay(step: int, config: TrainingConfig) -> float:
    """Return the weight decay of a step: constant, or a cosine to ``final_weight_decay``."""
    first, last = config.weight_decay, config.final_weight_decay
    if last is None:
        return first
    total = config.max_steps * config.schedule_accumulation
    return last + (first - last) * (0.5 + 0.5 * math.cos(math.pi * _tick(step, config) / max(total - 1, 1)))


def _tick(step: int, config: TrainingConfig) -> int:
    """Return the index of a step's last micro-batch: the published schedule counts micro-batches."""
    return (step + 1) * config.schedule_accumulation - 1


def global_batch(step: int, size: int, config: TrainingConfig) -> tuple[int, np.ndarray]:
    """Return the epoch of a step and the indices [batch_size] of its images, out of ``size`` images.

    The incomplete last batch of an epoch is dropped.
    """
    epoch, position = divmod(step, size // config.batch_size)
    order = _epoch_order(config.seed, epoch, size)
    return epoch, order[position * config.batch_size : (position + 1) * config.batch_size]


@functools.lru_cache(maxsize=1)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return stream(seed, DATA_ORDER, epoch).permutation(size)


def sample_unconditional(indices: np.ndarray, epoch: int, config: TrainingConfig) -> Tensor:
    """Return which images are trained without their class, bool [B], sampled by (seed, epoch, image)."""
    uniforms = [stream(config.seed, UNCONDITIONAL, epoch, int(i)).random() for i in indices]
    return torch.tensor(uniforms) < config.uncond_ratio
