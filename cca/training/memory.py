"""How well a run uses its GPU, and what to do where its memory does not suffice."""

import torch

from cca.training.batch import Batch
from cca.training.trainer import Trainer
from models.utils.precision import oom_reason

USED_MEMORY = 0.8  # of a GPU's, by a micro-batch that is chosen; the rest is for what lies between tensors
# What to say where the memory does not suffice; {why} is the text of the error.
MODEL_TOO_LARGE = (
    "--model: the memory does not suffice ({why}); take more GPUs with --parallel fsdp. "
    "The same command resumes from the last checkpoint"
)
MICRO_BATCH_TOO_LARGE = (
    "--micro-batch-size: the memory does not suffice ({why}); take a smaller one, --checkpointing, or more "
    "GPUs with --parallel fsdp. The same command resumes from the last checkpoint"
)

# Dense bfloat16 operations per second, from NVIDIA's data sheets (which give twice as many, "with sparsity");
# the first name that is part of the GPU's.
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
    """bfloat16 operations per second that a device can do at best; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return None if "MIG" in name else next((rate for part, rate in PEAKS if part in name), None)


def step_flops(trainer: Trainer, batch: Batch) -> int:
    """Return the floating-point operations of this rank's part of a step; see ``forward_flops``.

    Forward and backward pass of the policy are three forward passes, the reference's is a fourth.
    """
    if trainer.objective is None:
        return 3 * len(batch) * trainer.model.forward_flops()
    return 4 * (len(batch) + len(trainer.paired_rows(batch))) * trainer.model.forward_flops()


def images_that_fit(of_two: int, of_four: int, memory: float, later: int) -> int:
    """Images of a micro-batch, a power of two, that take no more than USED_MEMORY of a GPU.

    Args:
        of_two, of_four: bytes in use while as many images are trained on.
        memory: bytes of the GPU; later: bytes that come to them besides.
    """
    each = max((of_four - of_two) / 2, 1)
    images = (USED_MEMORY * memory - later - (of_two - 2 * each)) / each
    return 1 << max(int(images), 1).bit_length() - 1


def fitting_micro_batch(trainer: Trainer, most: int) -> int:
    """``images_that_fit`` of a trainer on a GPU, measured on made-up images; at most ``most``.

    Depends on the model, its options and the kind of GPU, not on what else is in its memory; but 1 where that
    leaves no room to measure.
    """
    device, model = trainer.ranks.device, trainer.model

    def bytes_of(images: int) -> int:
        labels = torch.arange(images) % 2
        tokens = torch.zeros(images, model.sequence_length, dtype=torch.int64)
        torch.cuda.reset_peak_memory_stats(device)
        with trainer.synchronise(last=False), torch.compiler.set_stance("force_eager"):
            loss, _ = trainer.micro_loss(Batch(tokens, labels, 1 - labels, labels < 0))
            trainer.scaler.scale(loss).backward()
        return torch.cuda.max_memory_allocated(device)

    memory = torch.cuda.get_device_properties(device).total_memory
    moments = 8 * sum(p.numel() for p in trainer.net.parameters() if p.requires_grad)
    try:
        bytes_of(2)  # from now on there are gradients, as in all micro-batches but a step's first
        fitting = images_that_fit(bytes_of(2), bytes_of(4), memory, moments)
    except RuntimeError as error:
        if oom_reason(error) is None:
            raise
        fitting = 1  # the run will say if even one does not fit
    trainer.optimizer.zero_grad(set_to_none=True)
    return min(fitting, most)
