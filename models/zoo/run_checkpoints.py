"""Reading checkpoints of training runs without executing code.

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

# The types in the metadata of a torch.distributed checkpoint. The metadata is a pickle, so nothing else is
# accepted.
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


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint contains")


class Reader(dcp.FileSystemReader):
    """A FileSystemReader that does not execute code when it unpickles the metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / ".metadata").read_bytes()
        # Python prints its own error for a byte array with a damaged length.
        if any(opcode.name == "BYTEARRAY8" for opcode, _, _ in pickletools.genops(content)):
            raise pickle.UnpicklingError("it holds a byte array, which no checkpoint contains")
        return _MetadataUnpickler(io.BytesIO(content)).load()


class Planner(dcp.DefaultLoadPlanner):
    """A load planner that accepts only numbers and containers besides tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        content = torch.load(value, weights_only=True)
        safe_bytes = io.BytesIO()
        torch.save(content, safe_bytes)
        safe_bytes.seek(0)
        super().load_bytes(read_item, safe_bytes)


@contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """Context manager that turns any error of a damaged checkpoint into a UserError.

    It hides the warnings of torch.distributed.checkpoint about running in a single process.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except UserError:
        raise
    except (Exception, dcp.api.CheckpointException) as error:  # a damaged file can raise anything
        raise UserError(
            f"{folder} is damaged or not a checkpoint of this trainer ({reason(error)})"
        ) from None


def read_checkpoint(folder: Path, average: bool = False) -> dict[str, torch.Tensor]:
    """Return the transformer's state dict from a checkpoint, or its average. Raises UserError."""
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
