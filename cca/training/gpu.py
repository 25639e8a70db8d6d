"""How well a run uses its GPU, and what to do where its memory does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models import UserError

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


@contextmanager
def explaining_memory(micro_batch_size: int, checkpointing: bool) -> Iterator[None]:
    """A GPU's memory that runs out inside is a UserError, which says what needs less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        less = ["fewer (the results stay the same)"] if micro_batch_size > 1 else []
        less += [] if checkpointing else ["--checkpointing"]
        less += ["more GPUs with --parallel fsdp"]
        why = ". ".join(str(error).split(". ")[:2]).rstrip(".")  # the rest is advice on the allocator
        raise UserError(
            f"--micro-batch-size: the memory does not suffice for {micro_batch_size} images at once ({why}); "
            f"take {', or '.join(less)}. The same command goes on from the last saved state"
        ) from None
