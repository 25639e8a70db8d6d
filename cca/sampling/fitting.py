"""What fits: the images of a batch in a GPU's memory, and compilation in the time of a run."""

import torch

from cca.sampling.sampler import SampleRequest
from models import DTYPES, ARImageModel
from models.decoding import guided_steps
from models.devices import does_not_fit, free_memory
from models.plan import numbers, size_text

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
    return rows * (model.cached_numbers * DTYPES[request.dtype].itemsize + logits)


def fitting_batch(model: ARImageModel, request: SampleRequest, free: int) -> int:
    """The largest power of two of images, 1 to 256, that takes MEMORY_SHARE of so many bytes at most."""
    fitting = int(max(free, 0) * MEMORY_SHARE) // row_bytes(model, request)
    return min(LARGEST_BATCH, 1 << max(fitting.bit_length() - 1, 0))


def default_batch_size(model: ARImageModel, request: SampleRequest, device: torch.device) -> int:
    """Images to decode at once: 64 on a CPU; on a GPU the largest power of two, 1 to 256, that takes
    MEMORY_SHARE of what is free and not for the weights. To be asked before these are on the GPU.
    """
    free = free_memory(device)
    if free is None:
        return CPU_BATCH
    return fitting_batch(model, request, free - sampling_memory(model, request, 0))


def sampling_memory(model: ARImageModel, request: SampleRequest, batch_size: int) -> int:
    """What a process holds while it samples, about (bytes): the weights, and the rows of a batch."""
    weights = numbers(model.transformer) * DTYPES[request.dtype].itemsize + 4 * numbers(model.tokenizer)
    return weights + batch_size * row_bytes(model, request)


def model_too_large(name: str, model: ARImageModel, request: SampleRequest, free: int | None) -> str:
    """What to say where even the model does not fit; free: ``free_memory`` before it was on the GPU."""
    less = "" if DTYPES[request.dtype].itemsize == 2 else "--dtype bfloat16 takes less; or "
    weights = size_text(sampling_memory(model, request, 0))
    return does_not_fit(f"{name} in {request.dtype}, ~{weights} of weights,", free, less)


def batch_too_large(
    name: str, model: ARImageModel, request: SampleRequest, batch_size: int, free: int | None
) -> str:
    """What to say where a batch does not fit, with a size below it that should.

    free: ``free_memory`` before the run's first batch; later the caches of a compiled generator are there.
    """
    if batch_size == 1:
        return does_not_fit(f"one image of {name}, beside the weights,", free)
    fits = batch_size // 2 if free is None else min(fitting_batch(model, request, free), batch_size // 2)
    return f"--batch-size: {batch_size} images at once do not fit in the GPU's memory; {fits} should"


def decoder_too_large(name: str, free: int | None) -> str:
    """What to say where tokens cannot be decoded; free: as above."""
    return does_not_fit(f"decoding images of {name}, beside the weights,", free)


def compiles_by_default(
    model: ARImageModel, request: SampleRequest, device: torch.device, processes: int
) -> bool:
    """On a GPU, for the images of the whole run that fall to a process, each of which compiles for itself."""
    return device.type == "cuda" and request.num_samples >= processes * COMPILED_FROM[model.steps_alike]
