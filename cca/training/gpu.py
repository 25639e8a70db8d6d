"""How well a run uses its GPU, and what to do where its memory does not suffice."""

from contextlib import AbstractContextManager

import torch

from cca.training.batch import Batch
from cca.training.losses import LOSSES
from cca.training.schedule import TrainingConfig
from cca.training.trainer import Trainer
from models import DTYPES, ARImageModel
from models.devices import memory_named, memory_ran_out
from models.plan import numbers

# Bytes kept for the backward pass per token, channel and block, as counted for both backbones (104 and 93
# in float32, 63 and 65 in 16 bits), by bytes of the precision; and where blocks are computed again.
KEPT_BYTES, CHECKPOINTED_BYTES = {4: 104, 2: 65}, 5
USED_MEMORY = 0.8  # of a GPU's, by a micro-batch that is chosen; the rest is for what lies between tensors

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


def training_memory(
    model: ARImageModel, config: TrainingConfig, micro_batch_size: int, shards: int, checkpointing: bool
) -> int:
    """What a process holds while it trains, about (bytes): weights, gradients, moments, activations.

    shards: processes over which the weights and all that belongs to them are split.
    """
    net, own = model.transformer, DTYPES[config.dtype].itemsize
    paired = LOSSES[config.loss].objective is not None
    each = 4 + 4 + 8 + (4 if config.ema else 0) + (own if paired else 0)  # AdamW's two moments; the reference
    cast = own if config.dtype != "float32" else 0  # autocast's copy of the weights
    blocks = len(net.transformer_blocks())
    channels = model.sequence_length * net.output_layer().in_features * blocks
    kept = KEPT_BYTES[own]
    row = channels * (CHECKPOINTED_BYTES + kept / blocks if checkpointing else kept)
    weights = numbers(net) * (each / shards + cast) + 4 * numbers(model.tokenizer)
    return int(weights + (2 if paired else 1) * micro_batch_size * row)


def explaining_memory(images: int, checkpointing: bool) -> AbstractContextManager:
    """A GPU's memory that runs out inside is a UserError, which says what needs less.

    images: of the micro-batches inside; 0 where there are none.
    """
    smaller = f"a smaller one, such as {images // 2} (the same results but for rounding and dropout's masks)"
    less = [smaller] if images > 1 else []
    less += [] if checkpointing or not images else ["--checkpointing"]
    less += ["more GPUs with --parallel fsdp"]
    return memory_named(
        f"{'--micro-batch-size' if images else '--model'}: the memory does not suffice ({{why}}); "
        f"take {', or '.join(less)}. The same command goes on from the last saved state"
    )


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

    Depends on the model, its options and the kind of GPU, not on what else is in its memory.
    """
    device, model = trainer.processes.device, trainer.model

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
        if memory_ran_out(error) is None:
            raise
        fitting = 1  # the run will say if even one does not fit
    trainer.optimizer.zero_grad(set_to_none=True)
    return min(fitting, most)
