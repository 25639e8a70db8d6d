"""The references that published metrics use: guided-diffusion's reference batches, by name."""

import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path

from models import UserError
from models.utils.files import cache_folder
from models.zoo.hub import Download, download, part_of

REFERENCE_IMAGES = 10_000  # images in a published reference; scripts/make_reference.py stores as many
BATCHES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


@dataclass(frozen=True)
class PublishedReference:
    """A reference batch at a public address: images and the statistics of the whole training set.

    resolution: of the images, in pixels.
    """

    address: str
    resolution: int

    @property
    def path(self) -> Path:
        """Where the file is stored on this machine, downloaded or not."""
        return cache_folder() / self.address.rpartition("/")[2]

    def downloads(self) -> list[Download]:
        """Return what ``fetch`` would download. Raise UserError if the stored file is damaged."""
        if Path(os.devnull) in self.path.parents:
            raise UserError(
                "--reference: there is no home folder to store the download in; set HOME or XDG_CACHE_HOME"
            )
        if self.path.exists():
            if not is_batch(self.path):
                raise UserError(f"--reference: {self.path} is damaged; delete it to have it downloaded again")
            return []
        part = part_of(self.path)
        size = REFERENCE_IMAGES * 3 * self.resolution**2 + 8 * (2048**2 + 2023**2)  # images and covariances
        missing = max(size - (part.stat().st_size if part.exists() else 0), 0)
        return [Download(self.address, missing, self.path.parent, "--reference")]

    def fetch(self) -> Path:
        """Return the path of the file; download it first if needed. Raise UserError if that fails."""
        return download(self.address, self.path, lambda part: is_batch(part, every_byte=True), "--reference")


REFERENCES = {
    "imagenet256": PublishedReference(f"{BATCHES}/256/VIRTUAL_imagenet256_labeled.npz", 256),
    "imagenet512": PublishedReference(f"{BATCHES}/512/VIRTUAL_imagenet512.npz", 512),
}


def is_batch(path: Path, every_byte: bool = False) -> bool:
    """Return whether a file is a reference with statistics; ``every_byte`` also compares all checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            statistics = {"mu.npy", "sigma.npy"} <= set(archive.namelist())
            return statistics and not (every_byte and archive.testzip())
    except Exception:  # zipfile and its decompressors raise some ten kinds of errors
        return False


def published_name(path: Path) -> str | None:
    """Return the name of the published reference that a file is a copy of, or None.

    Only references that are on this machine are compared. The name of the file does not matter.
    """
    with suppress(UserError, RuntimeError, OSError):  # the cache folder may not be readable
        cached = {name: reference.path for name, reference in REFERENCES.items() if reference.path.exists()}
        return next(
            (name for name, own in cached.items() if own.samefile(path) or cmp(own, path, False)), None
        )
    return None


def find_reference(text: str) -> PublishedReference | None:
    """Return the published reference that ``--reference`` names; None if it is a path.

    Raise UserError if the current folder holds a file of that name, because the value is then ambiguous.
    """
    if text in REFERENCES and os.path.lexists(text):
        raise UserError(
            f"--reference: {text} is the name of a published reference and of a file in this folder; "
            f"write ./{text} for the file, or move it"
        )
    return REFERENCES.get(text)
