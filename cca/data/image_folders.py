"""Images in folders and archives: which there are, what tells them from others, the one way to read one."""

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
OPENED_FILES, OPENED_BYTES = 1000, 2**16  # that a fingerprint reads: so many files, so much of each


def add_orientation_option(group: argparse._ArgumentGroup) -> None:
    """Add --exif-orientation, for commands that read images from folders and archives."""
    group.add_argument(
        "--exif-orientation",
        action="store_true",
        help="rotate images as their EXIF orientation says (default: off, as in the published code)",
    )


def check_orientation_option(args: argparse.Namespace, *paths: Path) -> None:
    """Raise UserError for --exif-orientation where none of the inputs is a folder or an archive."""
    if args.exif_orientation and not any(is_image_folder(path) for path in paths):
        raise UserError(
            "--exif-orientation: turns pictures of folders; those of an .npz are taken as they are"
        )


def normalised_name(name: str) -> str:
    """The name with composed characters (NFC): file systems and archives differ in what they keep."""
    return unicodedata.normalize("NFC", name)


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF data say that a picture is not upright. Pillow itself turns TIFFs when it reads them."""
    with suppress(Exception):  # damaged EXIF data
        # The formats' own ``getexif`` decode the whole picture first.
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return image.format != "TIFF" and found in range(2, 9)
    return False


def read_image(
    file: str | Path | IO[bytes], path: str | Path, side: int | None = None, upright: bool = False
) -> Image.Image:
    """Return a picture, 8-bit RGB.

    Args:
        file: its path, or the open file.
        path: what errors call it.
        side: cut to a square of that side, as guided-diffusion does it.
        upright: turned as its EXIF orientation says.

    Raises UserError with the file and what is wrong with it.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            image.load()
            pixels = to_rgb(ImageOps.exif_transpose(image) if upright and is_turned(image) else image)
            return centre_crop(pixels, side) if side else pixels
    except Exception as error:  # damaged files raise whatever the library's readers stumble over
        text = " ".join(str(error).replace(str(path), "").split())[:100] or type(error).__name__
        why = "no known format" if isinstance(error, UnidentifiedImageError) else text
        raise UserError(f"{path}: not a readable image ({why})") from None


class Folder:
    """The files of a folder, by their paths relative to it with ``/``; ``Archive`` has the same methods."""

    def __init__(self, root: Path):
        self.root = root

    def subfolder(self, name: str) -> "Folder | None":
        """Return a folder of this one; None where there is none."""
        return Folder(self.root / name) if os.path.isdir(self.root / name) else None

    def is_file(self, name: str) -> bool:
        return os.path.isfile(f"{self.root}/{name}")

    def size(self, name: str) -> int:
        """Return the bytes of a file. Raises OSError where there is none."""
        return os.stat(f"{self.root}/{name}").st_size

    def open(self, name: str) -> IO[bytes]:
        """Raises OSError for a missing file."""
        return open(f"{self.root}/{name}", "rb")

    def list_files(self) -> tuple[list[str], list[str]]:
        """Return the files below the folder, in no order, and what is neither file nor folder (broken links).

        Hidden entries are skipped. Links are followed, and each folder counts once: at its own place, if that
        is below the root, else at the first link to it. Raises UserError for a folder that cannot be listed.
        """
        files, others, root = list[str](), list[str](), self.root
        seen: set[tuple[int, int]] = set()
        folders, links = [""], list[str]()  # links wait until all folders that need none have their place
        while folders or links:
            place = folders.pop() if folders else heapq.heappop(links)
            try:
                status = os.stat(root / place)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
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
    """Open a folder, an archive, or ``ARCHIVE/FOLDER``, a folder inside one; None for anything else.

    Raises UserError for an archive that cannot be read.
    """
    if os.path.isdir(path):  # False for a name that cannot be one, too
        return Folder(path)
    found = find_archive(path)
    if not found:
        return None
    archive = Archive(found[0])
    folder = archive.subfolder(found[1]) if found[1] else archive
    if not folder:
        raise UserError(f"{archive.root}: holds no folder {found[1]}")
    return folder


def is_image_folder(path: Path) -> bool:
    """Return whether a path is a folder, an archive or in one. Raises UserError for unsupported archives."""
    return os.path.isdir(path) or find_archive(path) is not None


def find_images(folder: Folder | Archive) -> tuple[list[str], str | None]:
    """Return the names of the images, in no order, and a note.

    The note says how much else was left out: files of other kinds, and what is no file (a pipe would be
    waited for, a broken link cannot be read). Raises UserError for a folder that cannot be listed.
    """
    found, left_out = folder.list_files()
    images = [name for name in found if name.lower().endswith(IMAGE_SUFFIXES)]
    left_out += [name for name in found if not name.lower().endswith(IMAGE_SUFFIXES)]
    such = min(left_out, default=None)
    note = such and printable(f"{folder.root}: left out, no image files: {len(left_out):,} (such as {such})")
    return images, note


class FileList:
    """Files of a folder or archive in a fixed order: the one place that names, opens and compares them.

    Args:
        folder: where it lies does not count, nor whether it is an archive.
        names: paths below it, with ``/``.
        upright: whether pictures are turned as their EXIF orientation says.
    """

    def __init__(self, folder: Folder | Archive, names: Sequence[str], upright: bool = False):
        self.folder, self.names, self.upright = folder, names, upright
        self.root = folder.root
        self.keys = list(map(normalised_name, names))  # by which files are known elsewhere
        self.noted: dict[str, dict] = {}  # see ``resume``
        self.sizes = array("q")  # of all files, as the fingerprint saw them
        self.starts: dict[int, str] = {}  # hashes of those that it opened
        self.opened = {i * len(names) // OPENED_FILES for i in range(OPENED_FILES if names else 0)}

    def path(self, index: int) -> str:
        return f"{self.root}/{self.names[index]}"

    def open(self, index: int) -> IO[bytes]:
        """Raises OSError for a file that is missing, or damaged in its archive."""
        return self.folder.open(self.names[index])

    def size(self, index: int) -> int:
        """Return the bytes of a file. Raises UserError for a missing one."""
        try:
            return self.folder.size(self.names[index])
        except OSError as error:
            raise UserError(f"{self.path(index)}: cannot be read ({error.strerror})") from None

    def start(self, index: int) -> str:
        """SHA-256 of a file's first bytes; empty where it cannot be opened, or is not of ``opened``."""
        if index in self.opened:
            with suppress(OSError), self.open(index) as file:
                return hashlib.sha256(file.read(OPENED_BYTES)).hexdigest()
        return ""

    def places(self) -> dict[str, int]:
        """The index of each file of ``noted`` that is there."""
        return {key: index for index, key in enumerate(self.keys) if key in self.noted}

    def resume(self, noted: object) -> None:
        """Take what a run that is resumed notes of files that it could not read.

        The fingerprint has that in place of what is there now, so that such a file may be mended, but not
        removed. Raises UserError.
        """
        if not isinstance(noted, dict) or not all(isinstance(seen, dict) for seen in noted.values()):
            raise UserError("--output: what it notes of unreadable images is damaged; take another name")
        self.noted = noted
        if gone := sorted(noted.keys() - self.places().keys()):
            raise UserError(
                f"--data: {self.root}/{gone[0]} was removed after it could not be read; it may be mended, "
                "not removed: put it back, or take another --output"
            )

    def seen(self, index: int) -> dict:
        """What a fingerprint sees of a file; after it was taken on this rank, what it saw."""
        if (key := self.keys[index]) in self.noted:
            return self.noted[key]
        if self.sizes:
            return {"size": self.sizes[index], "start": self.starts.get(index, "")}
        if not self.folder.is_file(self.names[index]):
            return {"size": -1, "start": ""}  # as no fingerprint sees it
        return {"size": self.size(index), "start": self.start(index)}

    def image(self, index: int, side: int | None = None) -> Image.Image:
        """See ``read_image``. Raises UserError."""
        try:
            with self.open(index) as file:
                return read_image(file, self.path(index), side, self.upright)
        except OSError as error:
            raise UserError(f"{self.path(index)}: cannot be read ({reason(error)})") from None

    def fingerprint(self, labels: Iterable[object] = itertools.repeat("")) -> str:
        """SHA-256 of names, sizes and, if given, classes of the files, and of the start of some.

        It tells one data set from another without reading it. Raises UserError for a missing file.
        """
        digest, count = hashlib.sha256(), len(self.names)
        self.sizes = array("q", map(self.size, range(count)))
        self.starts = {index: self.start(index) for index in self.opened}
        for index, label in zip(range(count), labels):
            seen = self.seen(index)
            line = f"{self.keys[index]}\0{seen.get('size')}\0{seen.get('start')}\0{label}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def notes(self) -> list[str]:
        """What to tell of rotations: how many of the files that the fingerprint opens have one."""
        turned = 0
        for index in self.opened:
            with suppress(Exception), warnings.catch_warnings(action="ignore"), self.open(index) as file:
                turned += is_turned(Image.open(file))
        read = "turned upright" if self.upright else "read as they lie (--exif-orientation turns them)"
        note = f"{self.root}: {turned:,} of {len(self.opened):,} pictures looked at are turned (EXIF)"
        return [f"{note}; such are {read}"] if turned else []
