"""What fits: the images of a batch in a GPU's memory, and compilation in the time of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cca.sampling.sampler import SampleRequest
from models import DTYPES, ARImageModel, UserError
from models.decoding import guided_steps
from models.plan import numbers

CPU_BATCH = 64
LARGEST_BATCH = 256  # on a GPU; above it nothing gets faster
MEMORY_SHARE = 0.6  # of what is free; the rest is for the weights' copies, decoding and fragments
LOGIT_BYTES = 32  # of each logit of a step: as many copies as guidance, filters and sorting make
# Images of a run from which on a GPU compilation pays, where all steps are one graph and where each is its
# own. Of the former an H200 compiled in 14 s what saved 55 ms on every image of LlamaGen-B.
COMPILED_FROM = {True: 1_000, False: 10_000}


def row_bytes(model: ARImageModel, request: SampleRequest) -> int:
    """Memory that one image takes while its tokens are drawn (bytes): what is cached, and a step's logits."""
    rows = 2 if guided_steps(request.sampling, len(model.step_sizes)) else 1
    logits = max(model.step_sizes) * model.vocab_size * LOGIT_BYTES
    return rows * (model.cached_numbers * DTYPES[request.dtype].itemsize + logits)


def default_batch_size(model: ARImageModel, request: SampleRequest, device: torch.device) -> int:
    """Images to decode at once: 64 on a CPU; on a GPU the power of two that MEMORY_SHARE of it holds."""
    if device.type == "cpu":
        return CPU_BATCH
    free, _ = torch.cuda.mem_get_info(device)
    fitting = int(free * MEMORY_SHARE) // row_bytes(model, request)
    return min(LARGEST_BATCH, 1 << max(fitting.bit_length() - 1, 0))


def sampling_memory(model: ARImageModel, request: SampleRequest, batch_size: int) -> int:
    """What a process holds while it samples, about (bytes): the weights, and the rows of a batch."""
    weights = numbers(model.transformer) * DTYPES[request.dtype].itemsize + 4 * numbers(model.tokenizer)
    return weights + batch_size * row_bytes(model, request)


@contextmanager
def memory_named(
    model: ARImageModel, request: SampleRequest, batch_size: int, device: torch.device
) -> Iterator[None]:
    """Raises UserError instead of CUDA's error where a batch does not fit in the memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        fits = min(default_batch_size(model, request, device), max(batch_size // 2, 1))
        raise UserError(
            f"--batch-size: {batch_size} images at once do not fit in the GPU's memory; {fits} should"
        ) from None


def compiles_by_default(model: ARImageModel, request: SampleRequest, device: torch.device) -> bool:
    """On a GPU, for the number of images of the whole run: it is the same for a run that goes on."""
    return device.type == "cuda" and request.num_samples >= COMPILED_FROM[model.steps_alike]
