"""Checkpoints of training runs, read without executing anything.

This file imports torch.distributed.checkpoint, which takes over a second.
"""

import io
import pickle
import pickletools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from models.utils.errors import UserError
from models.utils.files import reason
from models.zoo.run_folders import check_checkpoint

# What the framework's description of a state is made of. It is a pickle: nothing else is let through.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}  # fmt: skip


class _Description(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no saved state does")


class Reader(dcp.FileSystemReader):
    """The framework's reader, whose own way to the description would execute what it holds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / ".metadata").read_bytes()
        # A damaged length of a byte array makes Python print a line of its own.
        if any(opcode.name == "BYTEARRAY8" for opcode, _, _ in pickletools.genops(content)):
            raise pickle.UnpicklingError("it holds a byte array, which no saved state does")
        return _Description(io.BytesIO(content)).load()


class Planner(dcp.DefaultLoadPlanner):
    """Takes numbers and containers alone for what is no tensor."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        again = io.BytesIO()
        torch.save(plain, again)
        again.seek(0)
        super().load_bytes(read_item, again)


@contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """Context manager that turns whatever a damaged checkpoint raises into a UserError.

    torch.distributed.checkpoint's notices about running in a single process are not shown.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except UserError:
        raise
    except (Exception, dcp.api.CheckpointException) as error:  # a damaged file can raise anything
        raise UserError(f"{folder} is damaged or not a state of this trainer ({reason(error)})") from None


def read_checkpoint(folder: Path, average: bool = False) -> dict[str, torch.Tensor]:
    """Return the transformer's weights of a checkpoint, or their average, whole. Raises UserError."""
    with checkpoint_errors(folder):
        check_checkpoint(folder)
        metadata = Reader(folder).read_metadata().state_dict_metadata
        state = {
            part: {
                key.removeprefix(f"{part}."): torch.empty(entry.size, dtype=entry.properties.dtype)
                for key, entry in metadata.items()
                if key.startswith(f"{part}.") and isinstance(entry, TensorStorageMetadata)
            }
            for part in (("model", "ema") if average else ("model",))
        }
        if not all(state.values()):
            missing = "average of the weights (the run had no --ema)" if state["model"] else "weights"
            raise UserError(f"{folder}: holds no {missing}")
        dcp.load(state, storage_reader=Reader(folder), planner=Planner(), no_dist=True)
    return state["model"] | state.get("ema", {})
