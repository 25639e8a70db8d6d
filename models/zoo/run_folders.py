"""Where a training run keeps its weights, and what it notes about them."""

import hashlib
from pathlib import Path

from models.utils.errors import UserError
from models.utils.files import FORMAT, file_sha256, read_json
from models.zoo.hub import HUB

INDEX = "*.safetensors.index.json"  # of published weights in shards


def saved_steps(run: Path) -> list[int]:
    """Numbers of the steps whose state a run folder holds, ascending."""
    names = [path.name.removeprefix("step-") for path in (run / "state").glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def ema_name(checkpoint_name: str) -> str:
    """Under which name the average of the weights is written beside the model."""
    return checkpoint_name.replace(".", "_ema.")


def run_weights(text: str, checkpoint_name: str) -> Path | None:
    """Find the weights that RUN, RUN/state/step-N or RUN/model.pth means; ``:ema`` asks for the average.

    Returns:
        a weights file, or a checkpoint as ``read_state_dict`` takes it; of a run, its exported model, or its
        newest checkpoint. None where the text names no run.

    Raises:
        UserError: the folder holds neither.
    """
    if text.startswith(HUB):
        return None
    path, average = Path(text.removesuffix(":ema")), text.endswith(":ema")
    exported = path / (ema_name(checkpoint_name) if average else checkpoint_name)
    if text in ("base", "cca") or any(path.glob(INDEX)):  # published, in shards
        return None
    if checkpoint_folder(path):
        return Path(text)
    if exported.exists():
        return exported
    if not path.is_dir():
        is_exported = path.name in (checkpoint_name, ema_name(checkpoint_name)) and Path(text).is_file()
        return path if is_exported else None
    steps = saved_steps(path)
    if not steps:
        raise UserError(f"--weights: {path} holds no {exported.name} and no saved state")
    return path / "state" / f"step-{steps[-1]}{':ema' if average else ''}"


def run_config(weights: Path) -> dict:
    """Return the config.json of the run that weights belong to; empty where there is none of ours.

    Raises UserError for a damaged one.
    """
    folder = checkpoint_folder(weights)
    path = (folder.parent.parent if folder else weights.parent) / "config.json"
    content = read_json(path) if path.exists() else {}
    is_own = content.get("format") == FORMAT and isinstance(content.get("options"), dict)
    return content if is_own else {}


def checkpoint_folder(path: Path) -> Path | None:
    """Return the folder of the checkpoint that ``path`` names, with ``:ema`` or without; None: of none."""
    folder = path.with_name(path.name.removesuffix(":ema")) if path.name else path
    return folder if (folder / ".metadata").exists() else None


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
