"""What ``config.json`` keeps of the data, so that a run goes on with no other."""

from pathlib import Path

from cca.data.sources import TokenSource
from cca.distributed import Processes
from cca.training.run_folder import read_options
from models import UserError


def data_record(path: Path, data: TokenSource, processes: Processes) -> tuple[dict, dict]:
    """What must agree on resuming, and what is only told: where the data lies, since a folder may move."""
    compared = {"images": len(data), "data_sha256": processes.digest(data.fingerprint)}
    return compared, {"path": str(path), "classes": data.classes}


def refuse_renumbered(folder: Path, classes: dict[str, int] | None) -> None:
    """Raise UserError for a run of an earlier version, which numbered class folders by their position."""
    before = read_options(folder / "config.json")
    if "data" in before and list(classes.values() if classes else ()) != list(range(len(classes or ()))):
        raise UserError(
            f"--output: {folder} was trained with class folders numbered by position, "
            "which are not their classes; take another folder"
        )
