"""Folders of images: which files are in them, and the one way to read a picture."""

import hashlib
import heapq
import itertools
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from models import UserError
from models.transforms import centre_crop, to_rgb
from models.utils.errors import printable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def read_image(path: str | Path, side: int | None = None) -> Image.Image:
    """A picture, 8-bit RGB; ``side``: cut to a square of that side, as guided-diffusion does it.

    Raises UserError with the file and what is wrong with it.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return centre_crop(to_rgb(image), side) if side else to_rgb(image)
    except Exception as error:  # damaged files raise whatever the library's readers stumble over
        reason = " ".join(str(error).replace(str(path), "").split())[:100] or type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason})") from None


def find_images(root: Path) -> tuple[list[str], str | None]:
    """Return the images below a folder, in no order, as paths relative to it with ``/``; and a note.

    Hidden entries are skipped. The note says how much else was left out: files of other kinds, and what is
    named like an image and is no file. Links are followed, and each folder counts once: at its own place, if
    that is below ``root``, else at the first link to it. Raises UserError for a folder that cannot be listed.
    """
    files, left_out = list[str](), list[str]()
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
            elif name.lower().endswith(IMAGE_SUFFIXES) and (
                entry.is_file(follow_symlinks=False) or os.path.isfile(entry)
            ):
                files.append(name)
            else:  # a pipe would be waited for, a broken link cannot be read
                left_out.append(name)
    such = min(left_out, default=None)
    note = such and printable(f"{root}: left out, no image files: {len(left_out):,} (such as {such})")
    return files, note


def fingerprint(root: Path, files: Iterable[str], labels: Iterable[object] = itertools.repeat("")) -> str:
    """SHA-256 of names, sizes and, if given, classes of files: what tells one data set from another
    without reading it. Where the folder lies does not count. Raises UserError for a missing file."""
    digest = hashlib.sha256()
    try:
        for file, label in zip(files, labels):
            digest.update(
                b"%s\0%d\0%s\n" % (os.fsencode(file), os.stat(root / file).st_size, str(label).encode())
            )
    except OSError as error:
        raise UserError(f"{root / file}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
