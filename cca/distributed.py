"""One process or several under torchrun: rank, device, and the few collectives that are needed."""

import atexit
import os

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """This process among all of the run; starts the process group where torchrun set one up."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)

    @property
    def main(self) -> bool:
        """Whether this process does what only one may do: print, and write shared files."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's contiguous part of ``count`` items; parts differ by at most one."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor of equal shape over all processes, in place; returns the same tensor."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, part: Tensor) -> Tensor | None:
        """The rows of all processes in the order of their ranks, on the main one (None elsewhere).

        Parts may differ by one row, as ``share`` cuts them.
        """
        if self.world == 1:
            return part
        rows = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        rows[self.rank] = len(part)
        counts = self.sum(rows).tolist()
        padded = part.new_zeros(max(counts), *part.shape[1:])
        padded[: len(part)] = part
        padded = padded.to(self.device)
        if not self.main:
            dist.gather(padded)
            return None
        parts = [torch.empty_like(padded) for _ in counts]
        dist.gather(padded, parts)
        return torch.cat([p[:n].to(part.device) for p, n in zip(parts, counts)])

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
