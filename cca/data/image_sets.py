"""Sets of images, read piece by piece: .npz files of any size, and folders."""

import hashlib
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cca.data.classes import number_classes, whole_numbers
from cca.data.folders import IMAGE_SUFFIXES, find_images, fingerprint, read_image, reading, shown, subfolders
from cca.data.sampling_report import read_sampling_report
from models import ZOO, UserError
from models.files import file_sha256
from models.image_transforms import centre_crop
from models.loading import build_model

LARGEST_STATISTIC = 1e100  # of features in float32, and their squares; beyond, distances overflow
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

    def fingerprint(self) -> str:
        """SHA-256 that tells other images from these, without reading them all where that can be had."""
        return self.content_hash()

    def labels(self) -> np.ndarray | None:
        """Classes [N] int64 if they are known."""
        return None

    def classes(self) -> dict[str, int] | None:
        """Class of each class folder, where labels come from such."""
        return None

    def why_unlabelled(self) -> str | None:
        """What class folders lack to say the classes of their images."""
        return None

    def statistics(self) -> dict[str, np.ndarray]:
        """Those of mu, sigma, mu_s, sigma_s that come with the set, float64."""
        return {}

    def sampling_report(self) -> dict:
        """What ``sample.py`` wrote of the images; empty where it did not make them."""
        return read_sampling_report(self.path)

    def notes(self) -> list[str]:
        """What of these images makes figures not comparable with published ones."""
        return []


class NpzImages(ImageSet):
    """``arr_0`` uint8 [N, H, W, 3] (or grey [N, H, W]) of an .npz, compressed or not, never whole in memory.

    ``arr_1`` holds the classes, ``mu`` and the like statistics; one without ``arr_0`` has length 0.
    """

    def __init__(self, path: Path):
        self.path = path
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{shown(path)}: is not a file")  # opening a pipe would wait for ever
        with reading(path, "not a readable .npz file"), zipfile.ZipFile(path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist()]
            self.shape: tuple[int, ...] = (0,)
            if "arr_0" in self.names:
                with archive.open("arr_0.npy") as file:
                    self.shape, fortran, dtype = _array_header(file)
        if "arr_0" not in self.names and not set(STATISTICS[:2]) <= set(self.names):
            held = shown(", ".join(self.names[:4])) or "nothing"
            raise UserError(f"{path}: holds {held}; expected arr_0 (images) or mu and sigma")
        if "arr_0" in self.names:
            fits = len(self.shape) in (3, 4) and self.shape[3:] in ((), (3,)) and 0 not in self.shape[1:]
            if dtype != np.uint8 or not fits or fortran:
                order = " in Fortran order" if fortran else ""
                raise UserError(
                    f"{path}: arr_0 is {dtype} {list(self.shape)}{order}; "
                    "expected uint8 [N, H, W, 3] or [N, H, W]"
                )
            self.size = (self.shape[1], self.shape[2])

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, part: slice, batch_size: int) -> Iterator[np.ndarray]:
        row = int(np.prod(self.shape[1:]))
        with (
            reading(self.path, "arr_0 is cut off or damaged"),
            zipfile.ZipFile(self.path) as archive,
            archive.open("arr_0.npy") as file,
        ):
            _array_header(file)
            file.seek(part.start * row, 1)
            for start in range(part.start, part.stop, batch_size):
                count = min(batch_size, part.stop - start)
                data = file.read(count * row)
                if len(data) != count * row:
                    raise EOFError
                yield np.frombuffer(bytearray(data), np.uint8).reshape(count, *self.shape[1:])

    def labels(self) -> np.ndarray | None:
        if "arr_1" not in self.names:
            return None
        return whole_numbers(self._array("arr_1"), f"{self.path} (arr_1)")

    def statistics(self) -> dict[str, np.ndarray]:
        """Raises UserError for a mean or covariance that cannot be one."""
        found = {name: self._array(name) for name in STATISTICS if name in self.names}
        for name, values in found.items():
            shape = f"{name} is {values.dtype} {list(values.shape)}"
            if values.dtype.kind not in "fiu" or values.ndim != (2 if name.startswith("sigma") else 1):
                expected = "[D, D]" if name.startswith("sigma") else "[D]"
                raise UserError(f"{self.path}: {shape}; expected real numbers {expected}")
            mean = found.get(name.replace("sigma", "mu"), values)
            square = values.ndim == 1 or values.shape == (len(values),) * 2
            if not len(values) or not square or len(mean) != len(values):
                raise UserError(f"{self.path}: {shape}, its mean {list(mean.shape)}; they do not fit")
            if not np.isfinite(values).all():
                raise UserError(f"{self.path}: {name} holds numbers that are not finite")
            if (largest := np.abs(values.astype(np.float64)).max()) > LARGEST_STATISTIC:
                raise UserError(f"{self.path}: {name} holds {largest:g}, which is out of all proportion")
            close = 1e-6 * np.abs(values).max()
            if values.ndim == 2 and not np.allclose(values, values.T, rtol=1e-4, atol=close):
                raise UserError(f"{self.path}: {name} is not symmetric, so it is no covariance")
            if values.ndim == 2 and values.diagonal().min() < -close:
                raise UserError(f"{self.path}: {name} has negative variances, so it is no covariance")
        return {name: values.astype(np.float64) for name, values in found.items()}

    def notes(self) -> list[str]:
        pairs = [("mu", "sigma"), ("sigma", "mu"), ("mu_s", "sigma_s"), ("sigma_s", "mu_s")]
        return [
            f"{self.path} holds {own} and no {other}: it is not used"
            for own, other in pairs
            if own in self.names and other not in self.names
        ]

    def _array(self, name: str) -> np.ndarray:
        with (
            reading(self.path, f"{name} is not readable"),
            zipfile.ZipFile(self.path) as archive,
            archive.open(f"{name}.npy") as file,
        ):
            return np.lib.format.read_array(file, allow_pickle=False)

    def content_hash(self) -> str:
        with reading(self.path, "not a readable .npz file"):
            return file_sha256(self.path)

    def fingerprint(self) -> str:
        """Of the checksums that the file holds of its arrays."""
        with reading(self.path, "not a readable .npz file"), zipfile.ZipFile(self.path) as archive:
            noted = [(entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist()]
        return hashlib.sha256(repr(noted).encode()).hexdigest()


def _array_header(file) -> tuple:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


class FolderOfImages(ImageSet):
    """All images below a folder, in the order of their paths.

    Args:
        side: cut each to a square of that side as guided-diffusion does it; None takes them as they are.
        workers: processes that read images ahead; 0 reads them as they are needed.
        given: the user's own class of each class folder; None: as ``number_classes`` for the record's model.
    """

    def __init__(
        self, path: Path, side: int | None = None, workers: int = 0, given: Mapping[str, int] | None = None
    ):
        self.path, self.side, self.workers, self.given = path, side, workers, given
        files, self.left_out = find_images(path)
        self.files = sorted(files, key=lambda file: file.split("/"))
        if not self.files:
            left_out = f"; {self.left_out}" if self.left_out else ""
            raise UserError(f"{shown(path)}: holds no images ({', '.join(IMAGE_SUFFIXES)}){left_out}")
        height, width = self.read(self.files[0]).shape[:2]
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, file: str) -> np.ndarray:
        """An image as uint8 [H, W, 3]; ``file`` is one of ``files``."""
        image = read_image(self.path / file)
        try:
            return np.asarray(centre_crop(image, self.side) if self.side else image)
        except ValueError as error:
            raise UserError(f"{shown(self.path / file)}: {error}") from None

    def batches(self, part: slice, batch_size: int) -> Iterator[np.ndarray]:
        starts = range(part.start, part.stop, batch_size)
        ranges = [range(start, min(start + batch_size, part.stop)) for start in starts]
        loader = DataLoader(
            _Batches(self),
            batch_size=None,
            sampler=ranges,
            num_workers=min(self.workers, len(ranges)),
            multiprocessing_context="fork" if self.workers and ranges else None,
        )
        for images in loader:
            yield images.numpy()

    def content_hash(self) -> str:
        digest = hashlib.sha256(b"" if self.side is None else b"side %d" % self.side)
        for file in self.files:
            with reading(self.path / file, "cannot be read"):
                digest.update(file.split("/")[-1].encode(errors="surrogateescape"))
                digest.update((self.path / file).read_bytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        return fingerprint(self.path, self.files)

    @cached_property
    def _numbered(self) -> tuple[dict[str, int] | None, str | None]:
        """Class of each class folder, or why it is not known."""
        names = subfolders(self.path)
        if not names or not all("/" in file for file in self.files):
            if self.given is not None:
                raise UserError(f"--classes-from: not all images of {shown(self.path)} lie in class folders")
            return None, None
        if self.given is not None:
            return number_classes(self.path, names, None, self.given), None
        model = self.sampling_report().get("options", {}).get("model")
        try:
            num_classes = build_model(model).num_classes if model in ZOO else None
            return number_classes(self.path, names, num_classes), None
        except UserError as error:
            return None, str(error)

    def labels(self) -> np.ndarray | None:
        numbers = self.classes()
        if numbers is None:
            return None
        return np.array([numbers[file.split("/")[0]] for file in self.files], np.int64)

    def classes(self) -> dict[str, int] | None:
        return self._numbered[0]

    def why_unlabelled(self) -> str | None:
        return self._numbered[1]

    def notes(self) -> list[str]:
        lossy = sum(file.lower().endswith((".jpg", ".jpeg", ".webp")) for file in self.files)
        said = [self.left_out]
        if self.side:
            said.append(
                f"{shown(self.path)}: images are resized and cut to {self.side} x {self.side} (centre)"
            )
        if lossy:
            said.append(
                f"{lossy:,} of {len(self):,} images of {self.path} are JPEG or WebP: "
                "lossy compression changes FID"
            )
        return [note for note in said if note]


class _Batches(Dataset):
    """Ranges of a folder's images, each uint8 [n, H, W, 3], for the loader's processes."""

    def __init__(self, images: FolderOfImages):
        self.images = images

    def __getitem__(self, part: range) -> Tensor:
        found = []
        for file in self.images.files[part.start : part.stop]:
            found.append(self.images.read(file))
            if found[-1].shape[:2] != self.images.size:
                own, other = (f"{side[0]} x {side[1]}" for side in (found[-1].shape, self.images.size))
                raise UserError(
                    f"{shown(self.images.path / file)}: is {own}, other images are {other}; "
                    "--resize (of make_reference: --image-size) cuts all to one size"
                )
        return torch.from_numpy(np.stack(found))


def open_image_set(
    path: Path, side: int | None = None, workers: int = 0, given: Mapping[str, int] | None = None
) -> ImageSet:
    """An .npz, or a folder: what ``FolderOfImages`` takes is for one. Raises UserError for anything else."""
    return FolderOfImages(path, side, workers, given) if os.path.isdir(path) else NpzImages(path)
