"""Checkpoints of a run: everything that an exact resume needs."""

import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp

from cca.distributed import Ranks
from models.utils.files import file_sha256, write_json
from models.zoo.run_checkpoints import Planner, Reader, checkpoint_errors
from models.zoo.run_folders import check_checkpoint


def write_checkpoint(state: dict, folder: Path, ranks: Ranks) -> None:
    """Write a trainer's state dict and the SHA-256 of each file. All ranks take part."""
    with warnings.catch_warnings(action="ignore"):
        dcp.save(state, checkpoint_id=folder)
    own = sorted(folder.glob(f"__{ranks.rank}_*")) + ([folder / ".metadata"] if ranks.is_main else [])
    write_json(folder / f"sha256-{ranks.rank}.json", {path.name: file_sha256(path) for path in own})


def load_checkpoint(state: dict, folder: Path, ranks: Ranks) -> None:
    """Fill a trainer's state dict in place from a checkpoint. All ranks take part.

    Raises:
        UserError: the checkpoint is damaged.
    """

    def check() -> None:
        with checkpoint_errors(folder):
            check_checkpoint(folder, slice(ranks.rank, None, ranks.world_size))
            Reader(folder).read_metadata()

    def load() -> None:
        with checkpoint_errors(folder):
            dcp.load(state, storage_reader=Reader(folder), planner=Planner())

    ranks.run_or_abort_all(check)
    ranks.run_or_abort_all(load)
