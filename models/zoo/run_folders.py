"""The weights in a training run's folder, with their config.json and checksums."""

import hashlib
from pathlib import Path

from models.utils.errors import UserError
from models.utils.files import FORMAT, file_sha256, read_json
from models.zoo.hub import HUB

INDEX = "*.safetensors.index.json"  # index of sharded published weights


def saved_steps(run: Path) -> list[int]:
    """Return the steps of which a run folder has a checkpoint, in ascending order."""
    names = [path.name.removeprefix("step-") for path in (run / "state").glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def ema_name(checkpoint_name: str) -> str:
    """Return the name of the file with the average of the weights."""
    return checkpoint_name.replace(".", "_ema.")


def run_weights(text: str, checkpoint_name: str) -> Path | None:
    """Return the weights of RUN, RUN/state/step-N or RUN/model.pth, or with ``:ema`` their average.

    Returns:
        a weights file or a checkpoint, both in the form that ``read_state_dict`` takes. For RUN it is the
        exported model, or else the newest checkpoint. None if the text names no run.

    Raises:
        UserError: the folder has neither an exported model nor a checkpoint.
    """
    path, average = Path(text.removesuffix(":ema")), text.endswith(":ema")
    if text in ("base", "cca") or text.startswith(HUB):
        return None
    if path.is_file():
        return path if path.name in (checkpoint_name, ema_name(checkpoint_name)) and not average else None
    if checkpoint_folder(path):
        return Path(text)
    if not path.is_dir() or any(path.glob(INDEX)):  # a folder with an index holds published weights
        return None
    exported = path / (ema_name(checkpoint_name) if average else checkpoint_name)
    if exported.exists():
        return exported
    if steps := saved_steps(path):
        return path / "state" / f"step-{steps[-1]}{':ema' if average else ''}"
    raise UserError(f"--weights: {path} holds no {exported.name} and no checkpoint")


def run_config(weights: Path) -> dict:
    """Return the config.json of the run that wrote the weights; empty if no run of this project did.

    Raises UserError if the file is damaged.
    """
    folder = checkpoint_folder(weights)
    path = (folder.parent.parent if folder else weights.parent) / "config.json"
    content = read_json(path) if path.exists() else {}
    is_own = content.get("format") == FORMAT and isinstance(content.get("options"), dict)
    return content if is_own else {}


def checkpoint_folder(path: Path) -> Path | None:
    """Return the folder of the checkpoint ``path``, with or without ``:ema``; None if it is no checkpoint."""
    folder = path.with_name(path.name.removesuffix(":ema")) if path.name else path
    return folder if (folder / ".metadata").exists() else None


def _checksums(folder: Path) -> dict[str, str]:
    """Return the recorded SHA-256 of each file of a checkpoint; empty if none is recorded."""
    paths = sorted(folder.glob("sha256-*.json"))
    return {name: digest for path in paths for name, digest in read_json(path).items()}


def check_checkpoint(folder: Path, share: slice = slice(None)) -> None:
    """Raise UserError unless the files of a checkpoint match their checksums.

    A checkpoint without checksums is accepted. ``share`` selects the files whose contents are checked.
    """
    checksums = _checksums(folder)
    files = {path.name for path in folder.iterdir() if not path.name.startswith("sha256-")}
    if checksums and files != set(checksums):
        name = min(files ^ set(checksums))
        problem = "is missing" if name in checksums else "does not belong to it"
        raise UserError(f"{folder} is damaged ({name} {problem})")
    for name in sorted(checksums)[share]:
        if file_sha256(folder / name) != checksums[name]:
            raise UserError(f"{folder} is damaged ({name} does not match its checksum)")


def checkpoint_sha256(folder: Path, average: bool = False) -> str:
    """Return a hash of a checkpoint's checksums and of ``average``, which selects the weights."""
    checksums = _checksums(folder) or {file.name: file_sha256(file) for file in folder.iterdir()}
    return hashlib.sha256(repr((sorted(checksums.items()), average)).encode()).hexdigest()
