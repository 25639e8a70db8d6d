"""Sets of images to evaluate, read piece by piece: .npz files of any size, and folders."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cca.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


class NpzImages:
    """``arr_0`` uint8 [N, H, W, 3] (or grey [N, H, W]) of an .npz, compressed or not, never whole in memory."""

    def __init__(self, path: Path):
        self.path = path
        with self._open() as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" not in self.names and not set(STATISTICS[:2]) <= set(self.names):
                raise UserError(
                    f"{path}: holds {', '.join(self.names[:4]) or 'nothing'}; expected arr_0 (images) or mu and sigma"
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
                        f"{path}: arr_0 is {dtype} {list(self.shape)}; expected uint8 [N, H, W, 3] or [N, H, W]"
                    )

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.shape[1], self.shape[2]

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
        """Images of a range in file order, [n, H, W(, 3)] at a time."""
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
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zipfile.zlib.error):
            raise UserError(f"{self.path}: arr_0 is cut off or damaged") from None

    def labels(self) -> np.ndarray | None:
        """``arr_1``, the classes [N], if the file has it."""
        return self._array("arr_1").astype(np.int64) if "arr_1" in self.names else None

    def statistics(self) -> dict[str, np.ndarray]:
        """Those of mu, sigma, mu_s, sigma_s that the file has, float64."""
        return {name: self._array(name).astype(np.float64) for name in STATISTICS if name in self.names}

    def _array(self, name: str) -> np.ndarray:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return file[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            raise UserError(f"{self.path}: {name} is not readable") from None

    def sampling_report(self) -> dict:
        """What ``sample.py`` wrote beside the file, if it is there."""
        beside = self.path.with_suffix(".json")
        try:
            content = json.loads(beside.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) and "options" in content else {}

    def notes(self) -> list[str]:
        return []


def _array_header(file) -> tuple:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


class FolderOfImages:
    """All images below a folder, in the order of their paths."""

    names: list[str] = []

    def __init__(self, path: Path):
        self.path = path
        self.files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise UserError(f"{path}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        self.size = self._read(self.files[0]).shape[:2]

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, file: Path) -> np.ndarray:
        try:
            return np.asarray(Image.open(file).convert("RGB"))
        except (OSError, SyntaxError, ValueError):
            raise UserError(f"{file}: not a readable image") from None

    def batches(self, part: slice, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(part.start, part.stop, batch_size):
            images = [self._read(file) for file in self.files[start : min(start + batch_size, part.stop)]]
            odd = next((i for i, image in enumerate(images) if image.shape[:2] != self.size), None)
            if odd is not None:
                raise UserError(
                    f"{self.files[start + odd]}: is {images[odd].shape[0]} x {images[odd].shape[1]}, other images are {self.size[0]} x {self.size[1]}"
                )
            yield np.stack(images)

    def labels(self) -> np.ndarray | None:
        """Numbers of the subfolders in order, if all images lie in one."""
        parents = [file.parent for file in self.files]
        if self.path in parents:
            return None
        number = {parent: i for i, parent in enumerate(sorted(set(parents)))}
        return np.array([number[parent] for parent in parents])

    def statistics(self) -> dict[str, np.ndarray]:
        return {}

    def sampling_report(self) -> dict:
        return {}

    def notes(self) -> list[str]:
        jpeg = sum(file.suffix.lower() in (".jpg", ".jpeg", ".webp") for file in self.files)
        return (
            [
                f"{jpeg:,} of {len(self):,} images of {self.path} are JPEG or WebP: lossy compression changes FID"
            ]
            if jpeg
            else []
        )


def open_images(path: Path) -> NpzImages | FolderOfImages:
    """An .npz or a folder; raises UserError for what is neither."""
    if path.is_dir():
        return FolderOfImages(path)
    return NpzImages(path)
