"""The references that published figures are held against: guided-diffusion's batches, by name."""

import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path

from models import UserError
from models.utils.files import cache_folder
from models.zoo.hub import Download, download, part_of

REFERENCE_IMAGES = 10_000  # of a published reference; as many are kept of others
BATCHES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


@dataclass(frozen=True)
class PublishedReference:
    """A batch at a public address: images of that side (pixels), and statistics of the whole training set."""

    address: str
    side: int

    @property
    def path(self) -> Path:
        """Where it is, or will be, on this machine."""
        return cache_folder() / self.address.rpartition("/")[2]

    def downloads(self) -> list[Download]:
        """What ``fetch`` would download; raises UserError where a file is there and is no such reference."""
        if Path(os.devnull) in self.path.parents:
            raise UserError("--reference: there is no home folder to keep it in; set HOME or XDG_CACHE_HOME")
        if self.path.exists():
            if not is_batch(self.path):
                raise UserError(f"--reference: {self.path} is damaged; delete it to have it downloaded again")
            return []
        part = part_of(self.path)
        size = REFERENCE_IMAGES * 3 * self.side**2 + 8 * (2048**2 + 2023**2)  # images and covariances
        missing = max(size - (part.stat().st_size if part.exists() else 0), 0)
        return [Download(self.address, missing, self.path.parent, "--reference")]

    def fetch(self) -> Path:
        """The file, downloaded if need be. Raises UserError where it cannot be had."""
        return download(self.address, self.path, lambda part: is_batch(part, every_byte=True), "--reference")


REFERENCES = {
    "imagenet256": PublishedReference(f"{BATCHES}/256/VIRTUAL_imagenet256_labeled.npz", 256),
    "imagenet512": PublishedReference(f"{BATCHES}/512/VIRTUAL_imagenet512.npz", 512),
}


def is_batch(path: Path, every_byte: bool = False) -> bool:
    """Whether a file is a reference with statistics; ``every_byte``: and each of its checksums is right."""
    try:
        with zipfile.ZipFile(path) as archive:
            statistics = {"mu.npy", "sigma.npy"} <= set(archive.namelist())
            return statistics and not (every_byte and archive.testzip())
    except Exception:  # zipfile and its decompressors raise some ten kinds for damaged files
        return False


def published_name(path: Path) -> str | None:
    """Return the name of the published reference of which a file is a copy, whatever the file is called.

    None where it is none of those that are on this machine.
    """
    with suppress(UserError, RuntimeError, OSError):  # of a cache that cannot be had
        kept = {name: reference.path for name, reference in REFERENCES.items() if reference.path.exists()}
        return next((name for name, own in kept.items() if own.samefile(path) or cmp(own, path, False)), None)
    return None


def find_reference(text: str) -> PublishedReference | None:
    """The published reference that --reference names; None where it gives a path.

    Raises UserError for a name that is one of the current folder too: it was a path before it was a name.
    """
    if text in REFERENCES and os.path.lexists(text):
        raise UserError(
            f"--reference: {text} is the name of a published reference, and there is one here too: "
            f"write ./{text} for that, or move it"
        )
    return REFERENCES.get(text)
