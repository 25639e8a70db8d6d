"""How much of a GPU a run uses: FLOPs per step, peak rate, and the micro-batch that fits in memory."""

import torch

from cca.training.batch import Batch
from cca.training.trainer import Trainer
from models.utils.precision import oom_reason

USED_MEMORY = 0.8  # share of GPU memory that a chosen micro-batch may use; the rest is for fragmentation
# Messages for running out of GPU memory; {why} is the text of the error.
MODEL_TOO_LARGE = (
    "--model: does not fit in GPU memory ({why}); use more GPUs with --parallel fsdp, "
    "then run the same command again to resume from the last checkpoint"
)
MICRO_BATCH_TOO_LARGE = (
    "--micro-batch-size: does not fit in GPU memory ({why}); use a smaller one, --checkpointing, or more "
    "GPUs with --parallel fsdp, then run the same command again to resume from the last checkpoint"
)

# Dense bfloat16 FLOP/s from NVIDIA's data sheets, which list twice as many "with sparsity". The first entry
# whose name is part of the GPU's name counts.
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("L40S", 362e12),
)


def peak_rate(device: torch.device) -> float | None:
    """Return the peak bfloat16 FLOP/s of a device, or None if it is not in PEAKS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return None if "MIG" in name else next((rate for part, rate in PEAKS if part in name), None)


def step_flops(trainer: Trainer, batch: Batch) -> int:
    """Return the floating-point operations of this rank's part of a step; see ``forward_flops``.

    The policy's forward and backward pass count as three forward passes. The reference adds a fourth.
    """
    if trainer.objective is None:
        return 3 * len(batch) * trainer.model.forward_flops()
    return 4 * (len(batch) + len(trainer.pair_indices(batch))) * trainer.model.forward_flops()


def images_that_fit(peak_of_two: int, peak_of_four: int, gpu_bytes: float, later_bytes: int) -> int:
    """Return the largest micro-batch, a power of two, that takes at most USED_MEMORY of a GPU.

    Args:
        peak_of_two, peak_of_four: peak bytes while training on two and on four images.
        gpu_bytes: memory of the GPU.
        later_bytes: memory that is allocated later, whatever the micro-batch.
    """
    per_image = max((peak_of_four - peak_of_two) / 2, 1)
    images = (USED_MEMORY * gpu_bytes - later_bytes - (peak_of_two - 2 * per_image)) / per_image
    return 1 << max(int(images), 1).bit_length() - 1


def fitting_micro_batch(trainer: Trainer, limit: int) -> int:
    """Return the ``images_that_fit`` of a trainer on a GPU, at most ``limit``, measured on dummy images.

    The result depends on the model, its options and the kind of GPU, not on what else is in its memory.
    It is 1 if even the measurement does not fit.
    """
    device, model = trainer.ranks.device, trainer.model

    def peak_bytes(images: int) -> int:
        labels = torch.arange(images) % 2
        tokens = torch.zeros(images, model.sequence_length, dtype=torch.int64)
        torch.cuda.reset_peak_memory_stats(device)
        with trainer.synchronise(last=False), torch.compiler.set_stance("force_eager"):
            loss, _ = trainer.micro_loss(Batch(tokens, labels, 1 - labels, labels < 0))
            trainer.scaler.scale(loss).backward()
        return torch.cuda.max_memory_allocated(device)

    gpu_bytes = torch.cuda.get_device_properties(device).total_memory
    moment_bytes = 8 * sum(p.numel() for p in trainer.net.parameters() if p.requires_grad)
    try:
        peak_bytes(2)  # allocates the gradients, which only a step's first micro-batch lacks
        images = images_that_fit(peak_bytes(2), peak_bytes(4), gpu_bytes, moment_bytes)
    except RuntimeError as error:
        if oom_reason(error) is None:
            raise
        images = 1  # training reports it if even one does not fit
    trainer.optimizer.zero_grad(set_to_none=True)
    return min(images, limit)
