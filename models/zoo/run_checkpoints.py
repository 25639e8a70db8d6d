"""Checkpoints of training runs: read without executing anything, and checked for damage."""

import hashlib
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
from models.utils.files import file_sha256, read_json, reason

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
def careful(folder: Path) -> Iterator[None]:
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


def _checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 that was noted of each file of a checkpoint; empty where none was."""
    paths = sorted(folder.glob("sha256-*.json"))
    return {name: digest for path in paths for name, digest in read_json(path).items()}


def check_checkpoint(folder: Path, share: slice = slice(None)) -> None:
    """Raise UserError unless all files are as they were written; ``share``: those of them that are read.

    A checkpoint without checksums is taken as it is.
    """
    noted = _checksums(folder)
    files = {path.name for path in folder.iterdir() if not path.name.startswith("sha256-")}
    if noted and files != set(noted):
        name = min(files ^ set(noted))
        raise UserError(f"{folder} is damaged ({name} is {'missing' if name in noted else 'not of it'})")
    for name in sorted(noted)[share]:
        if file_sha256(folder / name) != noted[name]:
            raise UserError(f"{folder} is damaged ({name} is not what was written)")


def checkpoint_sha256(folder: Path, average: bool = False) -> str:
    """Return a hash of a checkpoint's files, as their checksums tell it, and of which weights are meant."""
    noted = _checksums(folder) or {file.name: file_sha256(file) for file in folder.iterdir()}
    return hashlib.sha256(repr((sorted(noted.items()), average)).encode()).hexdigest()


def read_checkpoint(folder: Path, average: bool = False) -> dict[str, torch.Tensor]:
    """Return the transformer's weights of a checkpoint, or their average, whole. Raises UserError."""
    with careful(folder):
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


def saved_steps(run: Path) -> list[int]:
    """Numbers of the steps whose state a run folder holds, ascending."""
    names = [path.name.removeprefix("step-") for path in (run / "state").glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def ema_name(checkpoint_name: str) -> str:
    """Under which name the average of the weights is written beside the model."""
    return checkpoint_name.replace(".", "_ema.")
