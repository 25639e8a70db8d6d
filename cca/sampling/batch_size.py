"""What fits: the images of a batch in a GPU's memory, and compilation in the time of a run."""

import torch

from cca.config import SampleRequest
from models import DTYPES, ARImageModel
from models.sampling import guided_steps
from models.utils.precision import free_memory
from models.zoo.loading import count_parameters

CPU_BATCH = 64
LARGEST_BATCH = 256  # on a GPU; above it nothing gets faster
MEMORY_SHARE = 0.6  # of what is free beside the weights; the rest is for decoding, casts and fragments
LOGIT_BYTES = 32  # of each logit of a step: as many copies as guidance, filters and sorting make
# Images of a process from which on a GPU compilation pays, where all steps are alike and where they are not.
# On an H100, the decoder's included: 140 to 410 of LlamaGen, 7,200 to 12,500 of VAR (results/benchmarks.md);
# where the host is faster eager LlamaGen is as well.
COMPILED_FROM = {True: 1_000, False: 10_000}


def row_bytes(model: ARImageModel, request: SampleRequest) -> int:
    """Memory that one image takes while its tokens are drawn (bytes): what is cached, and a step's logits."""
    rows = 2 if guided_steps(request.sampling, len(model.step_sizes)) else 1
    logits = max(model.step_sizes) * model.vocab_size * LOGIT_BYTES
    return rows * (model.cached_elements * DTYPES[request.dtype].itemsize + logits)


def default_batch_size(model: ARImageModel, request: SampleRequest, device: torch.device) -> int:
    """Images to decode at once: 64 on a CPU; on a GPU the largest power of two, 1 to 256, that takes
    MEMORY_SHARE of what is free and not for the weights. To be asked before these are on the GPU.
    """
    free = free_memory(device)
    if free is None:
        return CPU_BATCH
    weights = count_parameters(model.transformer) * DTYPES[request.dtype].itemsize
    weights += 4 * count_parameters(model.tokenizer)
    fitting = int(max(free - weights, 0) * MEMORY_SHARE) // row_bytes(model, request)
    return min(LARGEST_BATCH, 1 << max(fitting.bit_length() - 1, 0))


def compiles_by_default(
    model: ARImageModel, request: SampleRequest, device: torch.device, world_size: int
) -> bool:
    """On a GPU, for the images of the whole run that fall to a process, each of which compiles for itself."""
    return device.type == "cuda" and request.num_samples >= world_size * COMPILED_FROM[model.steps_alike]
