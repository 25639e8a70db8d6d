"""One process or several under torchrun: rank, device, collectives and stop signals.

Ranks exchange numbers, texts and errors as CPU tensors through gloo, so that no CPU waits for a GPU because
of them. GPU tensors go through NCCL.
"""

import atexit
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

# Its functions have the process group as a default argument. If torch.compile's modules imported it after the
# group is made, these functions would keep gloo's threads alive until Python ends. A thread that then frees a
# tensor aborts the process.
import torch.distributed.nn  # noqa: F401
from torch import Tensor

from models.utils.errors import UserError
from models.utils.precision import ELSEWHERE, oom_as_user_error

QUIET_SECONDS = 4  # torchrun kills all ranks when one exits: the rank that prints the error must exit first
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Context manager that records stop signals in ``is_requested``, so that a run can save before it stops.

    Signals that were ignored before (SIGHUP under nohup) stay ignored.
    """

    is_requested = False

    def __enter__(self) -> "StopRequest":
        self.previous = {s: signal.getsignal(s) for s in STOP_SIGNALS}
        for number, handler in self.previous.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._handle)
        return self

    def _handle(self, *_) -> None:
        self.is_requested = True

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextmanager
def children_ignore_signals() -> Iterator[None]:
    """Context manager in which forked processes block stop signals.

    A scheduler sends the signal to the whole process group, and data-loading workers must survive it until
    the run has saved. They end when their parent closes them or ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(name: str, default: int, low: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise UserError(
            f"{name}: the environment variable is {text!r}; expected an integer of at least {low}; "
            "torchrun sets it; without torchrun unset it"
        )
    return value


class Ranks:
    """The rank of this process and the collectives; starts the process group under torchrun."""

    def __init__(self):
        """Raise UserError if RANK, WORLD_SIZE and the other environment variables do not define a group."""
        self.rank, self.world_size = _environment("RANK", 0, 0), _environment("WORLD_SIZE", 1, 1)
        self.local_rank = local = _environment("LOCAL_RANK", 0, 0)
        tasks = _environment("SLURM_STEP_NUM_TASKS", 1, 1)
        if tasks > 1 and "RANK" not in os.environ:
            raise UserError(
                f"SLURM_STEP_NUM_TASKS: srun started {tasks} processes that form no process group; "
                "let srun start one torchrun per node, as scripts/slurm.sbatch does; "
                "if each process is a run of its own, unset SLURM_STEP_NUM_TASKS"
            )
        if self.rank >= self.world_size:
            raise UserError(
                f"RANK: the environment variable is {self.rank}; expected less than WORLD_SIZE "
                f"({self.world_size}); "
                "start several ranks with torchrun, or unset RANK"
            )
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if self.world_size > 1 and missing:
            raise UserError(
                f"{missing[0]}: the environment variable is not set, but WORLD_SIZE is {self.world_size}; "
                "start several ranks with torchrun, or unset WORLD_SIZE"
            )
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # A cluster may make one GPU visible to each rank: its index is then 0 on every rank.
        number = 0 if gpus == 1 else local
        if gpus and number >= gpus:
            raise UserError(f"LOCAL_RANK: {local}, but this machine has {gpus} GPUs; start one rank per GPU")
        self.device = torch.device("cuda", number) if gpus else torch.device("cpu")
        if self.device.type == "cuda":
            with oom_as_user_error(f"CUDA_VISIBLE_DEVICES: GPU {number} has no free memory; {ELSEWHERE}"):
                torch.cuda.set_device(self.device)
        if self.world_size > 1 and not dist.is_initialized():
            self._init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
            self._refuse_shared_gpu()

    def _init_process_group(self, backend: str) -> None:
        """Start the process group. Raises UserError."""
        interface = os.environ.get("NCCL_SOCKET_IFNAME", "")
        if interface in (name for _, name in socket.if_nameindex()):  # gloo uses the interface set for NCCL
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        try:
            dist.init_process_group(backend)
        except (RuntimeError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            if "gloo" in why:
                raise UserError(
                    f"GLOO_SOCKET_IFNAME: the {self.world_size} ranks cannot connect over this network "
                    f"interface ({why.rpartition('] ')[2][:120]}); set it to one that reaches all nodes"
                ) from None
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"MASTER_ADDR: the {self.world_size} ranks cannot connect at {place} ({why[:120]})"
            ) from None
        atexit.register(dist.destroy_process_group)

    def _refuse_shared_gpu(self) -> None:
        """Raise UserError if two ranks compute on the same GPU."""
        own: object = self.rank
        if self.device.type == "cuda":
            own = socket.gethostname(), str(torch.cuda.get_device_properties(self.device).uuid)
        gpus = self.all_gather(own)
        shared = [rank for rank, gpu in enumerate(gpus) if gpus.count(gpu) > 1]

        def check() -> None:
            if shared:
                raise UserError(f"LOCAL_RANK: ranks {shared} share GPUs; start one rank per GPU")

        self.run_or_abort_all(check)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes shared files."""
        return self.rank == 0

    @property
    def devices(self) -> str:
        """The devices of all ranks as the plan shows them, such as "CPU x 2"."""
        return f"{device_name(self.device)} x {self.world_size}"

    def command(self, line: str) -> str:
        """Return the command line of this run; ``line`` is what follows ``python``.

        With several nodes the rendezvous is left out, which torchrun does not tell.
        """
        if self.world_size == 1:
            return f"python {line}"
        local = _environment("LOCAL_WORLD_SIZE", self.world_size, 1)
        nodes = f"--nnodes {self.world_size // local} " if self.world_size > local else ""
        return f"torchrun {nodes}--nproc_per_node {local} {line}"

    def share(self, count: int) -> slice:
        """Return this rank's contiguous share of ``count`` items; shares differ by at most one item."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum a tensor of equal shape over all ranks, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    @contextmanager
    def _exit_after_others(self) -> Iterator[None]:
        """Context manager for gloo's collectives. If another rank has ended, this one exits too.

        The other one has printed why.
        """
        try:
            yield
        except RuntimeError as error:
            time.sleep(QUIET_SECONDS)
            why = str(error).strip().splitlines()[0][:120]
            print(f"rank {self.rank}: exits because another rank has ended ({why})", file=sys.stderr)
            raise SystemExit(2) from None

    def all_reduce_numbers(self, *values: float) -> list[float]:
        """Return each number summed over all ranks; GPUs take no part."""
        with self._exit_after_others():
            return self.all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()

    def all_gather(self, value: Any) -> list:
        """Return the values of all ranks, in order of rank; GPUs take no part. Values are pickled."""
        values = [value] * self.world_size
        if self.world_size > 1:
            with self._exit_after_others():
                dist.all_gather_object(values, value)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on at least one rank."""
        return bool(self.all_reduce_numbers(float(flag))[0])

    def run_or_abort_all(
        self, fn: Callable[[], object], on_rank0: bool = False, *values: float
    ) -> list[float]:
        """Run ``fn`` on every rank, or on rank 0 only; if it raises UserError on one rank, all ranks end.

        Return ``values``, each summed over all ranks in the same collective. Raise UserError on the ranks
        where ``fn`` did; the others exit without a message.
        """
        if self.world_size == 1:
            fn()
            return list(values)
        own_error = None
        try:
            if self.is_main or not on_rank0:
                fn()
        except UserError as error:
            own_error = error
        errors, *sums = self.all_reduce_numbers(float(own_error is not None), *values)
        if errors:
            if own_error is None:
                time.sleep(QUIET_SECONDS)
                raise SystemExit(2)
            raise own_error
        return sums

    def broadcast_from_rank0(self, fn: Callable[[], Any]) -> Any:
        """Run ``fn`` on rank 0 and return its result on every rank.

        Raise UserError on rank 0 if ``fn`` does; the others exit.
        """
        results = list[Any]()
        self.run_or_abort_all(lambda: results.append(fn()), on_rank0=True)
        return self.all_gather(results)[0][0]

    def gather(self, part: Tensor) -> Tensor | None:
        """Return the parts of all ranks, concatenated in order of rank, on rank 0; None on other ranks.

        The result stays on the device. Parts may have different lengths.
        """
        if self.world_size == 1:
            return part
        counts = self.all_gather(len(part))
        padded = part.new_zeros(max(counts), *part.shape[1:])
        padded[: len(part)] = part
        if not self.is_main:
            dist.gather(padded)
            return None
        parts = [torch.empty_like(padded) for _ in counts]
        dist.gather(padded, parts)
        return torch.cat([p[:n] for p, n in zip(parts, counts)])

    def digest(self, compute: Callable[[], str | None]) -> str | None:
        """Return the SHA-256 (or None) that ``compute`` returns for files; it runs once on each node."""
        own = list[str | None]()
        self.run_or_abort_all(lambda: own.append(compute() if self.local_rank == 0 else None))
        of_all = self.all_gather(own[0])
        return of_all[self.rank if self.local_rank == 0 else 0]

    def barrier(self) -> None:
        """Wait until all ranks reach this call; it does not wait for work queued on GPUs."""
        self.all_reduce_numbers(0)


def device_name(device: torch.device) -> str:
    """Return the name of a device for messages."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
