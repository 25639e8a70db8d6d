"""Defaults of sampling: the batch size that fits in memory, and whether compilation pays."""

import torch

from cca.config import SampleRequest
from models import DTYPES, ARImageModel
from models.sampling import guided_steps
from models.utils.precision import free_memory
from models.zoo.loading import count_parameters

CPU_BATCH = 64
LARGEST_BATCH = 256  # on a GPU; larger batches are not faster
MEMORY_SHARE = 0.6  # of the memory left beside the weights; the rest is for decoding, casts and fragmentation
LOGIT_BYTES = 32  # per logit of a step, for the copies that guidance, filters and sorting make
# Images per rank above which compilation pays on a GPU, by whether all decoding steps are alike. Measured on
# an H100, decoder included: 140 to 410 for LlamaGen, 7,200 to 12,500 for VAR (results/benchmarks.md). On a
# faster host eager LlamaGen is faster too, hence the larger number.
COMPILED_FROM = {True: 1_000, False: 10_000}


def bytes_per_image(model: ARImageModel, request: SampleRequest) -> int:
    """Return the memory in bytes that sampling takes per image: the cache and the logits of a step."""
    rows = 2 if guided_steps(request.sampling, len(model.step_sizes)) else 1
    logits = max(model.step_sizes) * model.vocab_size * LOGIT_BYTES
    return rows * (model.cached_elements * DTYPES[request.dtype].itemsize + logits)


def default_batch_size(model: ARImageModel, request: SampleRequest, device: torch.device) -> int:
    """Return the number of images to sample at once.

    That is 64 on a CPU. On a GPU it is the largest power of two from 1 to 256 that fits in MEMORY_SHARE of
    the free memory without the weights. Call this before the weights are on the GPU.
    """
    free = free_memory(device)
    if free is None:
        return CPU_BATCH
    weights = count_parameters(model.transformer) * DTYPES[request.dtype].itemsize
    weights += 4 * count_parameters(model.tokenizer)
    images = int(max(free - weights, 0) * MEMORY_SHARE) // bytes_per_image(model, request)
    return min(LARGEST_BATCH, 1 << max(images.bit_length() - 1, 0))


def compiles_by_default(
    model: ARImageModel, request: SampleRequest, device: torch.device, world_size: int
) -> bool:
    """Return whether to compile by default: on a GPU, if each rank samples enough images for it to pay."""
    return device.type == "cuda" and request.num_samples >= world_size * COMPILED_FROM[model.steps_alike]
