"""Settings that depend on the device: precisions, sizes of chunks and batches, and GPU memory."""

import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from models.utils.errors import UserError
from models.utils.files import causes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The following dicts have one value for each type of device.
# float32 logits that exist at a time in the likelihood and in sampling: enough to fill a GPU, and few enough
# for a CPU's cache.
LIKELIHOOD_LOGITS = {"cuda": 2**24, "cpu": 2**21}
SAMPLED_LOGITS = {"cuda": 2**24, "cpu": 2**18}
# Pixels per batch of the tokenizer's decoder: 32 images of 256 x 256 pixels on a GPU, 4 on a CPU, where
# larger batches are not faster.
DECODED_PIXELS = {"cuda": 2**21, "cpu": 2**18}
# Pixels per batch of the tokenizer's encoder: 16 images of 256 x 256 pixels or 7 of 384 x 384 on a GPU.
# The encoder needs about 3 KB per pixel.
ENCODED_PIXELS = {"cuda": 2**20, "cpu": 2**18}
# Images per forward pass in training a bundled model: more do not fit in a CPU's cache.
TRAINED_IMAGES = {"cuda": 2**20, "cpu": 32}
# The most data-loading workers of a rank, and the bytes of shared memory that they need. Containers often
# have only 64 MB.
MOST_LOADERS, LOADERS_MEMORY = 8, 2**30
# Default number of images per forward pass of a feature extractor.
EXTRACTED_IMAGES = 250
# Words in out-of-memory errors of the driver and of libraries that allocate GPU memory themselves (cuBLAS,
# cuDNN, Triton, NCCL). PyTorch's own exception covers only its allocator.
MEMORY_SIGNS = ("out of memory", "alloc_failed")
# Advice for the case that no option makes the work smaller.
ELSEWHERE = "stop other processes on that GPU, or choose another GPU with CUDA_VISIBLE_DEVICES"
# Ends of messages for ``oom_as_user_error``, which follow the option and what does not fit. The text of the
# error replaces {why}.
DOES_NOT_FIT = f"does not fit in GPU memory ({{why}}); {ELSEWHERE}"
TOO_MANY_IMAGES = f"images at once do not fit in GPU memory ({{why}}); use a smaller value, or {ELSEWHERE}"


def default_loaders() -> int:
    """Return the default number of data-loading workers of this rank.

    With GPUs it is this rank's share of the CPU cores, at most MOST_LOADERS. It is 0 without GPUs, because
    all cores compute then, and 0 if there is too little shared memory.
    """
    has_shared_memory = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").total >= LOADERS_MEMORY
    if not torch.cuda.is_available() or not has_shared_memory:
        return 0
    local = os.environ.get("LOCAL_WORLD_SIZE", "")  # ranks that torchrun started on this machine
    local_world_size = max(1, int(local) if local.isdigit() else 1)
    return min(MOST_LOADERS, len(os.sched_getaffinity(0)) // local_world_size)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Return autocast on that device to the named dtype; "float32" turns it off."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def autocast_dtype(device: torch.device, own: torch.dtype) -> torch.dtype:
    """Return the dtype in which a layer of dtype ``own`` computes: autocast's if it is on, else ``own``."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else own


def compute_deterministically() -> None:
    """Make all computations reproducible to the bit, also on GPUs. Call it before anything runs there.

    PyTorch then selects kernels that add in a fixed order (attention's gradient, embeddings), and raises an
    error if there is no such kernel.
    """
    # These variables are read when cuBLAS and the compiler are first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on that device, without waiting for work queued on a GPU."""
    to_gpu = device.type == "cuda"
    if to_gpu and tensor.device.type == "cpu" and torch.cuda.is_available():
        tensor = tensor.pin_memory()  # only copies from pinned memory are asynchronous
    return tensor.to(device, non_blocking=to_gpu)


def allow_tf32(device: torch.device) -> None:
    """Allow TF32 in float32 matmuls on a GPU for the rest of the process, as the published scripts do."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """Context manager for float32 matmuls and convolutions in full precision: no TF32 and no autocast."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    legacy, before = "highest", (matmul.fp32_precision, conv.fp32_precision)
    with suppress(RuntimeError):  # PyTorch raises if its newer settings differ from the older one
        legacy = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    conv.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        matmul.fp32_precision, conv.fp32_precision = before


def oom_reason(error: RuntimeError) -> str | None:
    """Return the one-line reason of a GPU out-of-memory error, or None for other errors.

    The causes of the error are searched too, because a failed capture of a CUDA graph raises another error
    in the end. The memory of the failed work is freed.
    """
    errors = [cause for cause in causes(error) if isinstance(cause, RuntimeError)]
    texts = [
        str(cause).strip()
        for cause in errors
        if isinstance(cause, torch.OutOfMemoryError) or any(s in str(cause).lower() for s in MEMORY_SIGNS)
    ]
    if not texts:
        return None
    for cause in errors:
        traceback.clear_frames(cause.__traceback__)  # frames of ended functions keep their tensors alive
    torch.cuda.empty_cache()
    # PyTorch's third sentence and the driver's second line are general advice that does not help here.
    return ". ".join(texts[0].split("\n")[0].split(". ")[:2]).rstrip(".")


def free_memory(device: torch.device) -> int | None:
    """Return the bytes of GPU memory that this process can allocate, including PyTorch's unused cache.

    Return None for a CPU.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def oom_as_user_error(message: str) -> Iterator[None]:
    """Context manager that turns a GPU out-of-memory error into UserError(message).

    The text of the error replaces {why} in the message. The memory of the failed work is freed.
    """
    try:
        yield
    except RuntimeError as error:
        why = oom_reason(error)
        if why is None:
            raise
        raise UserError(message.replace("{why}", why)) from None


def full_parts(rows: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """Yield parts of a batch that all have ``size`` entries, each with its number of real entries.

    The last part is padded. Convolutions round differently at different batch sizes, but pixels and tokens
    must not depend on it.
    """
    for part in rows.split(size):
        yield torch.cat([part, part[:1].expand(size - len(part), *part.shape[1:])]), len(part)


def row_chunks(rows: Tensor, vocab: int, logits_at_once: dict[str, int]) -> list[slice]:
    """Return slices of the first dimension, each with at least one row and at most ``logits_at_once`` logits.

    A row has ``vocab`` logits, and ``logits_at_once`` has one value for each type of device. Slices of more
    than 16 rows start at multiples of 16 rows, so that kernels access aligned memory.
    """
    count = max(1, logits_at_once[rows.device.type] // vocab)
    count -= count % 16 if count > 16 else 0
    return [slice(start, min(start + count, len(rows))) for start in range(0, len(rows), count)]
