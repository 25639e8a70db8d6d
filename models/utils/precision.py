"""What depends on the device: precisions by name, and how much is worked on at a time."""

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

# Each by kind of device. float32 logits held at a time by the likelihood, and those that a draw
# works on: enough to fill a GPU; what stays in a CPU's cache.
LIKELIHOOD_LOGITS = {"cuda": 2**24, "cpu": 2**21}
DRAWN_LOGITS = {"cuda": 2**24, "cpu": 2**18}
# Pixels of one batch of the tokenizer's decoder: 32 images of 256 x 256, and 4 on a CPU, which more
# do not make faster.
DECODED_PIXELS = {"cuda": 2**21, "cpu": 2**18}
# Pixels of one batch of its encoder, which holds about 3 KB for each: 16 images of 256 x 256, 7 of 384 x 384.
ENCODED_PIXELS = {"cuda": 2**20, "cpu": 2**18}
# Images of a bundled model's training pass: more do not fit a CPU's cache.
TRAINED_IMAGES = {"cuda": 2**20, "cpu": 32}
# Processes that read images, of each process, and the bytes of shared memory that they need (containers
# often have 64 MB).
MOST_LOADERS, LOADERS_MEMORY = 8, 2**30
# Images per forward pass of a feature extractor, unless the user says otherwise.
EXTRACTED_IMAGES = 250
# What errors say where a GPU's memory runs out, of the driver and of libraries that take memory themselves
# (cuBLAS, cuDNN, Triton, NCCL): PyTorch's own exception is of its allocator alone.
MEMORY_SIGNS = ("out of memory", "alloc_failed")
# What helps where nothing smaller can be chosen.
ELSEWHERE = "end what else uses that GPU, or choose another with CUDA_VISIBLE_DEVICES"
# Ends of messages for ``oom_as_user_error``, after the option and what does not fit; {why}: of the error.
DOES_NOT_FIT = f"does not fit in GPU memory ({{why}}); {ELSEWHERE}"
TOO_MANY_IMAGES = (
    f"images at once do not fit in the GPU's memory ({{why}}); take a smaller one, or {ELSEWHERE}"
)


def default_loaders() -> int:
    """Processes that read images ahead for this one: none on a CPU, whose cores all compute.

    Where there are GPUs, this process's share of the cores that it may use, MOST_LOADERS at most; none
    where there is no shared memory for them.
    """
    has_shared_memory = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").total >= LOADERS_MEMORY
    if not torch.cuda.is_available() or not has_shared_memory:
        return 0
    local = os.environ.get("LOCAL_WORLD_SIZE", "")  # processes that torchrun started on this machine
    processes = max(1, int(local) if local.isdigit() else 1)
    return min(MOST_LOADERS, len(os.sched_getaffinity(0)) // processes)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Mixed precision by name on that device; float32 turns it off."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def autocast_dtype(device: torch.device, own: torch.dtype) -> torch.dtype:
    """The precision in which a layer of precision ``own`` computes: autocast's, where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else own


def compute_deterministically() -> None:
    """The same bits from the same work, on GPUs as well; to be called before anything is computed there.

    PyTorch then takes kernels that add up in a fixed order (attention's gradient, embeddings), and
    raises where it has none.
    """
    # Read when cuBLAS and the compiler are first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on that device; a host that has work queued on a GPU does not wait for it."""
    to_gpu = device.type == "cuda"
    if to_gpu and tensor.device.type == "cpu" and torch.cuda.is_available():
        tensor = tensor.pin_memory()  # only from there can a copy be queued like other work
    return tensor.to(device, non_blocking=to_gpu)


def allow_tf32(device: torch.device) -> None:
    """Let a GPU round the factors of float32 products to TF32, as the published scripts do; for good."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """Matmuls and convolutions of float32 in float32 and nothing less, whatever is allowed or cast around."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    legacy, before = "highest", (matmul.fp32_precision, conv.fp32_precision)
    with suppress(RuntimeError):  # PyTorch does not read it where its newer settings say otherwise
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
    """What an error, or one behind it, says of a GPU's memory that ran out, in one line; None: nothing.

    A CUDA graph whose capture fails raises an error of its own in the end. What the work held is freed.
    """
    errors = [cause for cause in causes(error) if isinstance(cause, RuntimeError)]
    texts = [
        str(cause).strip()
        for cause in errors
        if isinstance(cause, torch.OutOfMemoryError) or any(s in str(cause).lower() for s in MEMORY_SIGNS)
    ]
    if not texts:
        return None
    for each in errors:
        traceback.clear_frames(each.__traceback__)  # of functions that ended: they hold their tensors
    torch.cuda.empty_cache()
    # PyTorch's third sentence is advice on the allocator; the driver's second line on how to find an error.
    return ". ".join(texts[0].split("\n")[0].split(". ")[:2]).rstrip(".")


def free_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that this process can have: those of nobody, and those that PyTorch keeps unused.

    None on a CPU, whose memory is not counted.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def oom_as_user_error(message: str) -> Iterator[None]:
    """Turn a GPU's out-of-memory error raised inside the block into UserError(message).

    {why} in the message is replaced by the text of the error. What the work held is freed.
    """
    try:
        yield
    except RuntimeError as error:
        why = oom_reason(error)
        if why is None:
            raise
        raise UserError(message.replace("{why}", why)) from None


def full_parts(rows: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """The rows of a tensor in parts of one size, each with how many of it count: the last is filled up.

    Convolutions round differently from one batch size to another, which a pixel or a token must not.
    """
    for part in rows.split(size):
        yield torch.cat([part, part[:1].expand(size - len(part), *part.shape[1:])]), len(part)


def row_chunks(rows: Tensor, vocab: int, logits_at_once: dict[str, int]) -> list[slice]:
    """Slices of the rows of a tensor with at most so many logits each; at least one row.

    They start at multiples of 16 rows, if there are so many: kernels read and write aligned memory.
    """
    count = max(1, logits_at_once[rows.device.type] // vocab)
    count -= count % 16 if count > 16 else 0
    return [slice(start, min(start + count, len(rows))) for start in range(0, len(rows), count)]
