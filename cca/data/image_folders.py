"""Images in folders and archives: listing, fingerprints, and reading."""

import argparse
import hashlib
import heapq
import itertools
import os
import unicodedata
import warnings
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from cca.data.archives import Archive, find_archive
from models import UserError
from models.transforms import centre_crop, to_rgb
from models.utils.errors import printable
from models.utils.files import reason

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
OPENED_FILES, OPENED_BYTES = 1000, 2**16  # how many files a fingerprint reads, and how much of each


def add_orientation_option(group: argparse._ArgumentGroup) -> None:
    """Add --exif-orientation, for commands that read images from folders and archives."""
    group.add_argument(
        "--exif-orientation",
        action="store_true",
        help="rotate images as their EXIF orientation says (default: off, as in the published code)",
    )


def check_orientation_option(args: argparse.Namespace, *paths: Path) -> None:
    """Raise UserError if --exif-orientation is set but no input is a folder or an archive."""
    if args.exif_orientation and not any(is_image_folder(path) for path in paths):
        raise UserError(
            "--exif-orientation: applies to folders and archives, not to an .npz; omit the option"
        )


def normalised_name(name: str) -> str:
    """Return the name in NFC, because file systems and archives store composed characters differently."""
    return unicodedata.normalize("NFC", name)


def is_turned(image: Image.Image) -> bool:
    """Return whether EXIF data say that an image is rotated. Pillow itself rotates TIFFs."""
    with suppress(Exception):  # damaged EXIF data
        # The ``getexif`` of some formats decodes the whole image first.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return image.format != "TIFF" and orientation in range(2, 9)
    return False


def read_image(
    file: str | Path | IO[bytes], path: str | Path, resolution: int | None = None, upright: bool = False
) -> Image.Image:
    """Return an image as 8-bit RGB.

    Args:
        file: its path, or the open file.
        path: its name in messages.
        resolution: resize and crop to a square of this resolution, as guided-diffusion does; None: do not.
        upright: rotate by the EXIF orientation.

    Raises UserError for a file that is not a readable image.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            image.load()
            pixels = to_rgb(ImageOps.exif_transpose(image) if upright and is_turned(image) else image)
            return centre_crop(pixels, resolution) if resolution else pixels
    except Exception as error:  # damaged files raise many kinds of errors in Pillow
        text = " ".join(str(error).replace(str(path), "").split())[:100] or type(error).__name__
        why = "no known format" if isinstance(error, UnidentifiedImageError) else text
        raise UserError(f"{path}: not a readable image ({why})") from None


class Folder:
    """The files of a folder, by their relative paths with ``/``; ``Archive`` has the same methods."""

    def __init__(self, root: Path):
        self.root = root

    def subfolder(self, name: str) -> "Folder | None":
        """Return a subfolder, or None if it does not exist."""
        return Folder(self.root / name) if os.path.isdir(self.root / name) else None

    def is_file(self, name: str) -> bool:
        return os.path.isfile(f"{self.root}/{name}")

    def size(self, name: str) -> int:
        """Return the size of a file in bytes. Raise OSError if it does not exist."""
        return os.stat(f"{self.root}/{name}").st_size

    def open(self, name: str) -> IO[bytes]:
        """Return the open file. Raise OSError if it does not exist."""
        return open(f"{self.root}/{name}", "rb")

    def list_files(self) -> tuple[list[str], list[str]]:
        """Return the unsorted names of the files below the folder, and of other entries such as broken links.

        Hidden entries are skipped. Links are followed. Each folder counts once: at its own path if that is
        below the root, else at the first link to it. Raise UserError for a folder that cannot be listed.
        """
        files, others, root = list[str](), list[str](), self.root
        visited: set[tuple[int, int]] = set()
        folders, links = [""], list[str]()  # links are followed after all real folders
        while folders or links:
            place = folders.pop() if folders else heapq.heappop(links)
            try:
                status = os.stat(root / place)
                if (status.st_dev, status.st_ino) in visited:
                    continue
                visited.add((status.st_dev, status.st_ino))
                with os.scandir(root / place) as listing:
                    entries = [entry for entry in listing if not entry.name.startswith(".")]
            except OSError as error:
                raise UserError(f"{root / place}: cannot be listed ({error.strerror})") from None
            for entry in entries:
                name = f"{place}/{entry.name}" if place else entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.is_symlink() and os.path.isdir(entry):
                    heapq.heappush(links, name)
                else:
                    is_file = entry.is_file(follow_symlinks=False) or os.path.isfile(entry)
                    (files if is_file else others).append(name)
        return files, others


def open_image_folder(path: Path) -> Folder | Archive | None:
    """Open a folder, an archive, or ``ARCHIVE/FOLDER`` (a folder in an archive); return None for other paths.

    Raises UserError for an archive that cannot be read.
    """
    if os.path.isdir(path):  # also False for an invalid name
        return Folder(path)
    location = find_archive(path)
    if not location:
        return None
    archive_path, inner = location
    archive = Archive(archive_path)
    folder = archive.subfolder(inner) if inner else archive
    if not folder:
        raise UserError(f"{archive.root}: holds no folder {inner}")
    return folder


def is_image_folder(path: Path) -> bool:
    """Return whether a path is a folder, an archive or in one. Raise UserError for unsupported archives."""
    return os.path.isdir(path) or find_archive(path) is not None


def find_images(folder: Folder | Archive) -> tuple[list[str], str | None]:
    """Return the names of the images, unsorted, and a note on what was left out (None: nothing).

    Other kinds of files are left out, and entries that are not files, such as pipes and broken links. Raise
    UserError for a folder that cannot be listed.
    """
    files, left_out = folder.list_files()
    images = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    left_out += [name for name in files if not name.lower().endswith(IMAGE_SUFFIXES)]
    first = min(left_out, default=None)
    note = first and printable(f"{folder.root}: {len(left_out):,} other files are left out, such as {first}")
    return images, note


class FileList:
    """Image files of a folder or archive in a fixed order.

    Args:
        folder: the folder or archive; its path does not change the fingerprint.
        names: paths below it, with ``/``.
        upright: whether images are rotated by their EXIF orientation.
    """

    def __init__(self, folder: Folder | Archive, names: Sequence[str], upright: bool = False):
        self.folder, self.names, self.upright = folder, names, upright
        self.root = folder.root
        self.keys = list(map(normalised_name, names))  # names of the files in records
        self.saved_records: dict[str, dict] = {}  # see ``resume``
        self.sizes = array("q")  # of all files, when the fingerprint was computed
        self.starts: dict[int, str] = {}  # hashes of the files in ``hashed_indices``, at the same time
        self.hashed_indices = {i * len(names) // OPENED_FILES for i in range(OPENED_FILES if names else 0)}

    def path(self, index: int) -> str:
        return f"{self.root}/{self.names[index]}"

    def open(self, index: int) -> IO[bytes]:
        """Return the open file. Raise OSError if it is missing, or damaged in its archive."""
        return self.folder.open(self.names[index])

    def size(self, index: int) -> int:
        """Return the size of a file in bytes. Raise UserError if it does not exist."""
        try:
            return self.folder.size(self.names[index])
        except OSError as error:
            raise UserError(f"{self.path(index)}: cannot be read ({error.strerror})") from None

    def start(self, index: int) -> str:
        """Return the SHA-256 of a file's first bytes; "" if it is unreadable or not in ``hashed_indices``."""
        if index in self.hashed_indices:
            with suppress(OSError), self.open(index) as file:
                return hashlib.sha256(file.read(OPENED_BYTES)).hexdigest()
        return ""

    def places(self) -> dict[str, int]:
        """Return the index of each existing file that has a saved record."""
        return {key: index for index, key in enumerate(self.keys) if key in self.saved_records}

    def resume(self, records: object) -> None:
        """Take over the records that a resumed run saved of unreadable files.

        The fingerprint uses these records instead of the present files, so the user may repair such a file,
        but not remove it. Raise UserError for damaged records or removed files.
        """
        if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
            raise UserError("--output: its records of unreadable images are damaged; choose another path")
        self.saved_records = records
        if removed := sorted(records.keys() - self.places().keys()):
            raise UserError(
                f"--data: {self.root}/{removed[0]} was removed after it could not be read; put it back "
                "(you may repair it), or choose another --output"
            )

    def record(self, index: int) -> dict:
        """Return the part of a file that enters the fingerprint: its size and the hash of its start.

        A saved record has priority, then the values from the last fingerprint on this rank.
        """
        if (key := self.keys[index]) in self.saved_records:
            return self.saved_records[key]
        if self.sizes:
            return {"size": self.sizes[index], "start": self.starts.get(index, "")}
        if not self.folder.is_file(self.names[index]):
            return {"size": -1, "start": ""}  # differs from the record of any file
        return {"size": self.size(index), "start": self.start(index)}

    def image(self, index: int, resolution: int | None = None) -> Image.Image:
        """Return an image; see ``read_image``. Raise UserError if it is unreadable."""
        try:
            with self.open(index) as file:
                return read_image(file, self.path(index), resolution, self.upright)
        except OSError as error:
            raise UserError(f"{self.path(index)}: cannot be read ({reason(error)})") from None

    def fingerprint(self, labels: Iterable[object] = itertools.repeat("")) -> str:
        """Return the SHA-256 of the names, sizes and ``labels`` of the files, and of the start of some files.

        It distinguishes datasets without reading them whole. Raise UserError for a missing file.
        """
        digest, count = hashlib.sha256(), len(self.names)
        self.sizes = array("q", map(self.size, range(count)))
        self.starts = {index: self.start(index) for index in self.hashed_indices}
        for index, label in zip(range(count), labels):
            record = self.record(index)
            line = f"{self.keys[index]}\0{record.get('size')}\0{record.get('start')}\0{label}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def notes(self) -> list[str]:
        """Return a note on how many of the checked files have an EXIF rotation, if any."""
        rotated = 0
        for index in self.hashed_indices:
            with suppress(Exception), warnings.catch_warnings(action="ignore"), self.open(index) as file:
                rotated += is_turned(Image.open(file))
        action = (
            "they are rotated" if self.upright else "they are not rotated (--exif-orientation rotates them)"
        )
        checked = f"{rotated:,} of {len(self.hashed_indices):,} checked images have an EXIF rotation"
        return [f"{self.root}: {checked}; {action}"] if rotated else []
