"""Sets of images, read piece by piece: .npz files of any size, and folders."""

import hashlib
import json
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models import UserError
from models.files import file_sha256
from models.image_transforms import centre_crop

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


def to_uint8_tensor(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] or grey [N, H, W] -> uint8 [N, 3, H, W]."""
    pixels = torch.from_numpy(images)
    return pixels[:, None].expand(-1, 3, -1, -1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


class ImageSet(ABC):
    """Images of one size in a fixed order, with what else is known of them."""

    path: Path
    size: tuple[int, int]  # height and width in pixels

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, part: slice, batch_size: int) -> Iterator[np.ndarray]:
        """Images of a range in order, uint8 [n, H, W, 3] or grey [n, H, W], n <= batch_size at a time.

        Raises UserError for images that cannot be read or are of another size.
        """

    @abstractmethod
    def content_hash(self) -> str:
        """SHA-256 of the images as they lie on disk; the name of the set does not count."""

    def labels(self) -> np.ndarray | None:
        """Classes [N] int64 if they are known."""
        return None

    def statistics(self) -> dict[str, np.ndarray]:
        """Those of mu, sigma, mu_s, sigma_s that come with the set, float64."""
        return {}

    def sampling_report(self) -> dict:
        """What ``sample.py`` wrote of the images; empty where it did not make them."""
        return {}

    def notes(self) -> list[str]:
        """What of these images makes figures not comparable with published ones."""
        return []


class NpzImages(ImageSet):
    """``arr_0`` uint8 [N, H, W, 3] (or grey [N, H, W]) of an .npz, compressed or not, never whole in memory.

    ``arr_1`` holds the classes, ``mu`` and the like statistics; one without ``arr_0`` has length 0.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._open() as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" not in self.names and not set(STATISTICS[:2]) <= set(self.names):
                raise UserError(
                    f"{path}: holds {', '.join(self.names[:4]) or 'nothing'}; "
                    "expected arr_0 (images) or mu and sigma"
                )
            self.shape: tuple[int, ...] = (0,)
            if "arr_0" in self.names:
                self.shape, fortran, dtype = self._header(archive)
                if (
                    dtype != np.uint8
                    or len(self.shape) not in (3, 4)
                    or (len(self.shape) == 4 and self.shape[3] != 3)
                    or fortran
                ):
                    raise UserError(
                        f"{path}: arr_0 is {dtype} {list(self.shape)}; "
                        "expected uint8 [N, H, W, 3] or [N, H, W]"
                    )
                self.size = (self.shape[1], self.shape[2])

    def __len__(self) -> int:
        return self.shape[0]

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except (OSError, zipfile.BadZipFile):
            raise UserError(f"{self.path}: not a readable .npz file") from None

    def _header(self, archive: zipfile.ZipFile) -> tuple:
        try:
            with archive.open("arr_0.npy") as file:
                return _array_header(file)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile):
            raise UserError(f"{self.path}: not a readable .npz file") from None

    def batches(self, part: slice, batch_size: int) -> Iterator[np.ndarray]:
        row = int(np.prod(self.shape[1:]))
        try:
            with self._open() as archive, archive.open("arr_0.npy") as file:
                _array_header(file)
                file.seek(part.start * row, 1)
                for start in range(part.start, part.stop, batch_size):
                    count = min(batch_size, part.stop - start)
                    data = file.read(count * row)
                    if len(data) != count * row:
                        raise EOFError
                    yield np.frombuffer(bytearray(data), np.uint8).reshape(count, *self.shape[1:])
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
            raise UserError(f"{self.path}: arr_0 is cut off or damaged") from None

    def labels(self) -> np.ndarray | None:
        return self._array("arr_1").astype(np.int64) if "arr_1" in self.names else None

    def statistics(self) -> dict[str, np.ndarray]:
        return {name: self._array(name).astype(np.float64) for name in STATISTICS if name in self.names}

    def _array(self, name: str) -> np.ndarray:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return file[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            raise UserError(f"{self.path}: {name} is not readable") from None

    def sampling_report(self) -> dict:
        beside = self.path.with_suffix(".json")
        try:
            content = json.loads(beside.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) and "options" in content else {}

    def content_hash(self) -> str:
        return file_sha256(self.path)


def _array_header(file) -> tuple:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


class FolderOfImages(ImageSet):
    """All images below a folder, in the order of their paths.

    side: cut each to a square of that side as guided-diffusion does it; None takes them as they are.
    """

    def __init__(self, path: Path, side: int | None = None):
        self.path, self.side = path, side
        self.files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise UserError(f"{path}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        height, width = self._read(self.files[0]).shape[:2]
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, file: Path) -> np.ndarray:
        try:
            image = Image.open(file).convert("RGB")
            return np.asarray(centre_crop(image, self.side) if self.side else image)
        except (OSError, SyntaxError, ValueError):
            raise UserError(f"{file}: not a readable image") from None

    def batches(self, part: slice, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(part.start, part.stop, batch_size):
            images = [self._read(file) for file in self.files[start : min(start + batch_size, part.stop)]]
            for file, image in zip(self.files[start:], images):
                if image.shape[:2] != self.size:
                    found, expected = (f"{side[0]} x {side[1]}" for side in (image.shape, self.size))
                    raise UserError(f"{file}: is {found}, other images are {expected}")
            yield np.stack(images)

    def content_hash(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

    def labels(self) -> np.ndarray | None:
        """Numbers of the subfolders in order, if all images lie in one."""
        parents = [file.parent for file in self.files]
        if self.path in parents:
            return None
        number = {parent: i for i, parent in enumerate(sorted(set(parents)))}
        return np.array([number[parent] for parent in parents])

    def notes(self) -> list[str]:
        lossy = sum(file.suffix.lower() in (".jpg", ".jpeg", ".webp") for file in self.files)
        if not lossy:
            return []
        return [
            f"{lossy:,} of {len(self):,} images of {self.path} are JPEG or WebP: "
            "lossy compression changes FID"
        ]


def open_image_set(path: Path, side: int | None = None) -> ImageSet:
    """An .npz, or a folder, whose images are cut to ``side`` if given. Raises UserError for anything else."""
    return FolderOfImages(path, side) if path.is_dir() else NpzImages(path)
