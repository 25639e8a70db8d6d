"""Saved states of a run: found, read without executing anything, and checked for damage."""

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

from cca.distributed import Processes
from models.base import ARImageModel
from models.utils.errors import UserError
from models.utils.files import file_sha256, read_json, reason, write_json
from models.zoo.checkpoint_formats import INDEX, fit_weights, tensors_sha256

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


class _Reader(dcp.FileSystemReader):
    """The framework's reader, whose own way to the description would execute what it holds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / ".metadata").read_bytes()
        # A damaged length of a byte array makes Python print a line of its own.
        if any(opcode.name == "BYTEARRAY8" for opcode, _, _ in pickletools.genops(content)):
            raise pickle.UnpicklingError("it holds a byte array, which no saved state does")
        return _Description(io.BytesIO(content)).load()


class _Planner(dcp.DefaultLoadPlanner):
    """Takes numbers and containers alone for what is no tensor."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        again = io.BytesIO()
        torch.save(plain, again)
        again.seek(0)
        super().load_bytes(read_item, again)


@contextmanager
def _careful(folder: Path) -> Iterator[None]:
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


def write_checkpoint(state: dict, folder: Path, processes: Processes) -> None:
    """Write a trainer's state (all ranks take part), and the SHA-256 of each file."""
    with warnings.catch_warnings(action="ignore"):
        dcp.save(state, checkpoint_id=folder)
    own = sorted(folder.glob(f"__{processes.rank}_*")) + ([folder / ".metadata"] if processes.main else [])
    write_json(folder / f"sha256-{processes.rank}.json", {path.name: file_sha256(path) for path in own})


def check_checkpoint(folder: Path, share: slice = slice(None)) -> None:
    """Raise UserError unless all files are as they were written; ``share``: those of them that are read.

    A checkpoint without checksums is taken as it is.
    """
    checksums = sorted(folder.glob("sha256-*.json"))
    noted = {name: digest for path in checksums for name, digest in read_json(path).items()}
    files = {path.name for path in folder.iterdir() if not path.name.startswith("sha256-")}
    if noted and files != set(noted):
        name = min(files ^ set(noted))
        raise UserError(f"{folder} is damaged ({name} is {'missing' if name in noted else 'not of it'})")
    for name in sorted(noted)[share]:
        if file_sha256(folder / name) != noted[name]:
            raise UserError(f"{folder} is damaged ({name} is not what was written)")


def load_checkpoint(state: dict, folder: Path, processes: Processes) -> None:
    """Fill ``state`` in place from a checkpoint (all ranks take part). Raises UserError."""

    def check() -> None:
        with _careful(folder):
            check_checkpoint(folder, slice(processes.rank, None, processes.world))
            _Reader(folder).read_metadata()

    processes.agree(check)
    with _careful(folder):
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner())


def read_weights(folder: Path, average: bool = False) -> dict[str, torch.Tensor]:
    """Return the transformer's weights of a checkpoint, or their average, whole. Raises UserError."""
    with _careful(folder):
        check_checkpoint(folder)
        metadata = _Reader(folder).read_metadata().state_dict_metadata
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
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=True)
    return state["model"] | state.get("ema", {})


def load_run_weights(model: ARImageModel, folder: Path, average: bool) -> str:
    """Give a model the weights of a saved state; returns the SHA-256 of the tensors. Raises UserError."""
    state = read_weights(folder, average)
    fit_weights(model.transformer, state, f"--weights: {folder}", "the model")
    return tensors_sha256(model.transformer)


def saved_steps(run: Path) -> list[int]:
    """Numbers of the steps whose state a run folder holds, ascending."""
    names = [path.name.removeprefix("step-") for path in (run / "state").glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def ema_name(checkpoint_name: str) -> str:
    """Under which name the average of the weights is written beside the model."""
    return checkpoint_name.replace(".", "_ema.")


def weights_of_run(text: str, checkpoint_name: str) -> tuple[Path, bool] | None:
    """What ``--weights RUN``, ``RUN/state/step-N`` means, ``:ema`` after either for the average.

    Returns:
        a weights file or the folder of a state, and whether its average is meant; None where the text
        names no run folder. Of a run, the exported model is taken, or its newest state.

    Raises:
        UserError: the folder holds neither.
    """
    average = text.endswith(":ema")
    path = Path(text.removesuffix(":ema"))
    if text in ("base", "cca") or not path.is_dir() or any(path.glob(INDEX)):  # published, a file, shards
        return None
    if (path / ".metadata").exists():
        return path, average
    exported = path / (ema_name(checkpoint_name) if average else checkpoint_name)
    if exported.exists():
        return exported, average
    steps = saved_steps(path)
    if not steps:
        raise UserError(f"--weights: {path} holds no {exported.name} and no saved state")
    return path / "state" / f"step-{steps[-1]}", average
