"""One process or several under torchrun: rank, device, the few collectives that are needed, and signals.

What the hosts tell each other (numbers, texts, who refuses) are tensors of the CPU, which gloo exchanges: no
host waits for a GPU because of them. NCCL exchanges tensors of GPUs.
"""

import atexit
import hashlib
import json
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
from torch import Tensor

from models.utils.errors import UserError
from models.utils.precision import ELSEWHERE, oom_as_user_error

QUIET_SECONDS = 4  # torchrun ends all with the first: who has something to say comes first
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """While it is entered, signals that would end the process are noted, so that a run can save first.

    Signals that were ignored before (SIGHUP under nohup) stay ignored.
    """

    asked = False

    def __enter__(self) -> "StopRequest":
        self.previous = {s: signal.getsignal(s) for s in STOP_SIGNALS}
        for number, handler in self.previous.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._note)
        return self

    def _note(self, *_) -> None:
        self.asked = True

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextmanager
def children_ignore_signals() -> Iterator[None]:
    """Processes forked inside never see a stop signal: loaders must outlive a signal to the whole group.

    They end when their parent closes them, or is gone.
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
            f"{name}: the environment says {text!r}, an integer of at least {low} is right; "
            "torchrun sets it, else unset it"
        )
    return value


class Ranks:
    """This process among all of the run; starts the process group where torchrun set one up."""

    def __init__(self):
        """Raises UserError where the environment's RANK, WORLD_SIZE and the like do not make a group."""
        self.rank, self.world_size = _environment("RANK", 0, 0), _environment("WORLD_SIZE", 1, 1)
        self.local_rank = local = _environment("LOCAL_RANK", 0, 0)
        tasks = _environment("SLURM_STEP_NUM_TASKS", 1, 1)
        if tasks > 1 and "RANK" not in os.environ:
            raise UserError(
                f"SLURM_STEP_NUM_TASKS: srun started {tasks} processes that do not know each other; "
                "let srun start one torchrun per node, as scripts/slurm.sbatch does; "
                "if each process is a run of its own, unset SLURM_STEP_NUM_TASKS"
            )
        if self.rank >= self.world_size:
            raise UserError(
                f"RANK: the environment says {self.rank}, WORLD_SIZE {self.world_size}; "
                "start several processes with torchrun, or unset RANK"
            )
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if self.world_size > 1 and missing:
            raise UserError(
                f"{missing[0]}: is not set, though WORLD_SIZE is {self.world_size}; "
                "start several processes with torchrun, or unset WORLD_SIZE"
            )
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # A cluster may show each rank one GPU of its own, as number 0.
        number = 0 if gpus == 1 else local
        if gpus and number >= gpus:
            raise UserError(f"LOCAL_RANK: is {local}, there are {gpus} GPUs; start one process for each")
        self.device = torch.device("cuda", number) if gpus else torch.device("cpu")
        if self.device.type == "cuda":
            with oom_as_user_error(f"CUDA_VISIBLE_DEVICES: GPU {number} has no free memory; {ELSEWHERE}"):
                torch.cuda.set_device(self.device)
        if self.world_size > 1 and not dist.is_initialized():
            self._meet("cpu:gloo,cuda:nccl" if gpus else "gloo")
            if gpus:
                self._refuse_shared_gpu()

    def _meet(self, backend: str) -> None:
        """Start the process group. Raises UserError."""
        given = os.environ.get("NCCL_SOCKET_IFNAME", "")
        if given in (name for _, name in socket.if_nameindex()):  # what NCCL is told holds for gloo too
            os.environ.setdefault("GLOO_SOCKET_IFNAME", given)
        try:
            dist.init_process_group(backend)
        except (RuntimeError, ValueError) as error:
            why = str(error).strip().splitlines()[0]
            if "gloo" in why:
                raise UserError(
                    f"GLOO_SOCKET_IFNAME: the {self.world_size} processes find each other, but not over this "
                    f"network interface ({why.rpartition('] ')[2][:120]}); name one that reaches all nodes"
                ) from None
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"MASTER_ADDR: the {self.world_size} processes do not meet at {place} ({why[:120]})"
            ) from None
        atexit.register(dist.destroy_process_group)

    def _refuse_shared_gpu(self) -> None:
        """Raise UserError where another rank computes on the same GPU."""
        name = f"{socket.gethostname()} {torch.cuda.get_device_properties(self.device).uuid}"
        gpus = self.all_gather(int(hashlib.sha256(name.encode()).hexdigest()[:12], 16))
        same = [rank for rank, gpu in enumerate(gpus) if gpu == gpus[self.rank]]

        def check() -> None:
            if len(same) > 1:
                raise UserError(f"LOCAL_RANK: ranks {same} see one GPU alone; start one process for each GPU")

        self.run_or_abort_all(check)

    @property
    def is_main(self) -> bool:
        """Whether this process does what only one may do: print, and write shared files."""
        return self.rank == 0

    @property
    def devices(self) -> str:
        """What all compute on, as a plan shows it: "CPU x 2"."""
        return f"{device_name(self.device)} x {self.world_size}"

    def command(self, line: str) -> str:
        """The whole command line of this run, ready to be pasted; ``line`` is what follows ``python``."""
        if self.world_size == 1:
            return f"python {line}"
        local = _environment("LOCAL_WORLD_SIZE", self.world_size, 1)
        nodes = self.world_size // local
        several = (
            f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint {os.environ['MASTER_ADDR']}:29500 "
            if nodes > 1
            else ""
        )
        return f"torchrun {several}--nproc_per_node {local} {line}"

    def share(self, count: int) -> slice:
        """This process's contiguous part of ``count`` items; parts differ by at most one."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Add up a tensor of equal shape over all processes, in place, on its device; returns that tensor."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def _hosts_sum(self, values: Tensor) -> list:
        """``sum`` of a CPU tensor. Ends this process where another has ended: that one has said why."""
        try:
            return self.all_reduce(values).tolist()
        except RuntimeError as error:
            time.sleep(QUIET_SECONDS)
            lost = str(error).strip().splitlines()[0][:120]
            print(f"process {self.rank}: ends, since it lost another ({lost})", file=sys.stderr)
            raise SystemExit(2) from None

    def all_reduce_numbers(self, *values: float) -> list[float]:
        """Numbers of the host added up over all processes; no GPU takes part."""
        return self._hosts_sum(torch.tensor(values, dtype=torch.float64))

    def all_gather(self, value: int) -> list[int]:
        """A number of the host from every process, in the order of their ranks."""
        own = [value * (rank == self.rank) for rank in range(self.world_size)]
        return [int(number) for number in self.all_reduce_numbers(*own)]

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set in one process at least."""
        return bool(self.all_reduce_numbers(float(flag))[0])

    def run_or_abort_all(
        self, call: Callable[[], object], on_rank0: bool = False, *values: float
    ) -> list[float]:
        """Run ``call`` in each process (or the main one); all stop together where one refuses.

        Returns ``values`` as ``total`` does, of the same exchange. Raises UserError where ``call`` did;
        the other processes end without a word.
        """
        if self.world_size == 1:
            call()
            return list(values)
        refusal = None
        try:
            if self.is_main or not on_rank0:
                call()
        except UserError as error:
            refusal = error
        refused, *totals = self.all_reduce_numbers(float(refusal is not None), *values)
        if refused:
            if refusal is None:
                time.sleep(QUIET_SECONDS)
                raise SystemExit(2)
            raise refusal
        return totals

    def broadcast_text(self, text: str) -> str:
        """The main process's text, on all."""
        content = torch.tensor(list(text.encode()), dtype=torch.int64)
        (size,) = self.all_reduce_numbers(len(content) if self.is_main else 0)
        return bytes(self._hosts_sum(content if self.is_main else content.new_zeros(int(size)))).decode()

    def broadcast_from_rank0(self, look: Callable[[], Any]) -> Any:
        """What the main process finds (JSON), on all. Raises UserError where ``look`` does."""
        if self.world_size == 1:
            return look()
        found: list[str] = []
        self.run_or_abort_all(lambda: found.append(json.dumps(look())), on_rank0=True)
        return json.loads(self.broadcast_text("".join(found)))

    def gather(self, part: Tensor) -> Tensor | None:
        """The rows of all processes in the order of their ranks, on the main one (None elsewhere).

        They stay on their device. Parts may have different numbers of rows.
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

    def digest(self, take: Callable[[], str | None]) -> str | None:
        """A SHA-256 (or None) of files, taken once on each node."""
        own = None

        def take_own() -> None:
            nonlocal own
            own = take() if self.local_rank == 0 else None

        self.run_or_abort_all(take_own)
        of_main = self.broadcast_text(own or "")
        return own if self.local_rank == 0 else of_main or None

    def barrier(self) -> None:
        """Wait until all processes are here; for the hosts alone, whatever is queued on their GPUs."""
        self.all_reduce_numbers(0)


def device_name(device: torch.device) -> str:
    """What to call it in a message."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
