"""Sets of images that are read in batches: .npz files of any size, folders and archives."""

import hashlib
import math
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor
from torch.utils.data import Dataset

from cca.data.archives import Archive
from cca.data.image_folders import (
    IMAGE_SUFFIXES,
    FileList,
    Folder,
    find_images,
    normalised_name,
    open_image_folder,
)
from cca.data.labels import class_folder, number_classes, numbering_notes, whole_numbers
from cca.data.reading import read_items
from models import ZOO, UserError
from models.utils.files import file_sha256, finite_or_none, read_own_json, reason
from models.zoo.loading import build_model

LARGEST_STATISTIC = (
    1e100  # float32 features and their squares are smaller; larger values overflow in distances
)
DAMAGED = "arr_0 is cut off or damaged"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


def to_uint8_tensor(images: np.ndarray) -> Tensor:
    """Return images uint8 [N, H, W, 3] or grey [N, H, W] as a tensor uint8 [N, 3, H, W]."""
    pixels = torch.from_numpy(images)
    return pixels[:, None].expand(-1, 3, -1, -1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


@contextmanager
def read_errors_as_user_error(path: Path, problem: str) -> Iterator[None]:
    """Context manager that turns any error of reading a damaged, encrypted or unknown file into UserError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # zipfile, its decompressors and numpy raise some ten kinds of errors
        raise UserError(f"{path}: {problem} ({reason(error)})") from None


def report_path(samples: Path) -> Path:
    """Return the path of the JSON that ``sample.py`` writes beside an .npz of samples.

    ``samples`` may also be the folder that the .npz was unpacked to.
    """
    path = Path(os.path.abspath(samples))
    return path.with_name(f"{path.name.removesuffix('.npz')}.json")


def read_sampling_options(samples: Path) -> dict:
    """Return the options that ``sample.py`` wrote beside the samples (see ``report_path``).

    The result is empty if there is no such file, or another program wrote it.
    """
    options = (read_own_json(report_path(samples)) or {}).get("options", {})
    fits = isinstance(options.get("model", ""), str) and type(options.get("cfg_scale", 1)) in (int, float)
    return options if fits and "num_samples" in options and finite_or_none(options) == options else {}


class NpzImages:
    """Images of an .npz: ``arr_0`` uint8 [N, H, W, 3] or grey [N, H, W], compressed or not, read in batches.

    ``arr_1`` holds the classes, ``mu``, ``sigma``, ``mu_s`` and ``sigma_s`` hold statistics. A file without
    ``arr_0`` has length 0. Raises UserError if the file is damaged or holds something else.
    """

    # An .npz has no class folders.
    classes = why_unlabelled = None

    def __init__(self, path: Path):
        self.path = path
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: is not a file")  # opening a pipe would wait forever
        self.shape: tuple[int, ...] = (0, 0, 0)
        with read_errors_as_user_error(path, "not a readable .npz file"), zipfile.ZipFile(path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" in self.names:
                with archive.open("arr_0.npy") as file:
                    self.shape = self._read_header(file)
                    self.header_bytes = file.tell()
                size = archive.getinfo("arr_0.npy").file_size - self.header_bytes
                if self.shape[0] < 0 or math.prod(self.shape) > size:
                    raise UserError(f"{path}: {DAMAGED}: {list(self.shape)} in {size:,} bytes")
        if "arr_0" not in self.names and not set(STATISTICS[:2]) <= set(self.names):
            names = ", ".join(self.names[:4]) or "nothing"
            raise UserError(f"{path}: holds {names}; expected arr_0 (images) or mu and sigma")
        self.size = self.shape[1:3]  # height and width in pixels

    @contextmanager
    def _open(self, name: str, problem: str) -> Iterator[IO[bytes]]:
        """Context manager that opens an array; any error in the block becomes UserError(problem)."""
        with (
            read_errors_as_user_error(self.path, problem),
            zipfile.ZipFile(self.path) as archive,
            archive.open(f"{name}.npy") as file,
        ):
            yield file

    def _read_header(self, file: IO[bytes]) -> tuple[int, ...]:
        is_first = npy.read_magic(file) == (1, 0)
        read = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        fits = len(shape) in (3, 4) and shape[3:] in ((), (3,)) and 0 not in shape[1:]
        if dtype != np.uint8 or not fits or fortran:
            order = " in Fortran order" if fortran else ""
            raise UserError(
                f"{self.path}: arr_0 is {dtype} {list(shape)}{order}; "
                "expected uint8 [N, H, W, 3] or [N, H, W]"
            )
        return shape

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, part: slice, batch_size: int) -> Iterator[np.ndarray]:
        """Yield the images of a range in order, uint8 [n, H, W, 3] or grey [n, H, W] with n <= batch_size."""
        image_bytes = int(np.prod(self.shape[1:]))
        with self._open("arr_0", DAMAGED) as file:
            file.seek(self.header_bytes + part.start * image_bytes)
            for start in range(part.start, part.stop, batch_size):
                count = min(batch_size, part.stop - start)
                data = file.read(count * image_bytes)
                if len(data) != count * image_bytes:
                    raise EOFError
                yield np.frombuffer(bytearray(data), np.uint8).reshape(count, *self.shape[1:])

    def array(self) -> np.ndarray:
        """Return all images, read-only: uint8 [N, H, W, 3] or grey [N, H, W].

        Uncompressed images are memory-mapped, so that all ranks and workers of a machine share them;
        ``check_sum`` then finds damage. Compressed images are read and checked.
        """
        with read_errors_as_user_error(self.path, DAMAGED), zipfile.ZipFile(self.path) as archive:
            entry = archive.getinfo("arr_0.npy")
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:  # encrypted
                return self._array("arr_0")
            with open(self.path, "rb") as file:  # the local header: 30 bytes, the name, an extra field
                file.seek(entry.header_offset + 26)
                start = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4))) + self.header_bytes
            return np.memmap(self.path, np.uint8, "r", start, self.shape)

    def check_sum(self) -> None:
        """Read ``arr_0`` whole, which compares its checksum. Raise UserError if it is damaged."""
        with self._open("arr_0", DAMAGED) as file:
            while file.read(1 << 20):
                pass

    def labels(self) -> np.ndarray | None:
        """Return the classes int64 [N], or None if the file holds none."""
        if "arr_1" not in self.names:
            return None
        labels = whole_numbers(self._array("arr_1"), f"{self.path} (arr_1)")
        if len(labels) != self.shape[0]:
            raise UserError(f"{self.path}: holds {len(self)} images (arr_0) but {len(labels)} labels (arr_1)")
        return labels

    @cached_property
    def statistics(self) -> dict[str, np.ndarray]:
        """The statistics in the file, float64: some of mu [D], sigma [D, D], mu_s and sigma_s."""
        arrays = {name: self._array(name) for name in STATISTICS if name in self.names}
        for name, values in arrays.items():
            covariance, mean = name.startswith("sigma"), arrays.get(name.replace("sigma", "mu"), values)
            fits = values.ndim == 1 + covariance and values.shape == mean.shape[:1] * values.ndim
            if values.dtype.kind not in "fiu" or not values.size or not fits:
                raise UserError(
                    f"{self.path}: {name} is {values.dtype} {list(values.shape)}; "
                    "expected a mean [D] and a covariance [D, D] of real numbers"
                )
            largest = np.abs(values.astype(np.float64)).max()
            if not np.isfinite(largest):
                raise UserError(f"{self.path}: {name} holds values that are not finite")
            symmetric = np.allclose(values, values.T, rtol=1e-4, atol=1e-6 * largest)
            problems = {
                f"holds {largest:g}; expected at most {LARGEST_STATISTIC:g}": largest > LARGEST_STATISTIC,
                "is not symmetric, so it is not a covariance": not symmetric,
                "has negative variances": covariance and values.diagonal().min() < -1e-6 * largest,
            }
            for problem, is_so in problems.items():
                if is_so:
                    raise UserError(f"{self.path}: {name} {problem}")
        return {name: values.astype(np.float64) for name, values in arrays.items()}

    def notes(self) -> list[str]:
        """Return notes on why metrics of these images are not comparable with published ones."""
        pairs = [("mu", "sigma"), ("sigma", "mu"), ("mu_s", "sigma_s"), ("sigma_s", "mu_s")]
        return [
            f"{self.path} holds {own} but no {other}, so {own} is not used"
            for own, other in pairs
            if own in self.names and other not in self.names
        ]

    def _array(self, name: str) -> np.ndarray:
        with self._open(name, f"{name} is not readable") as file:
            return npy.read_array(file, allow_pickle=False)

    def content_hash(self) -> str:
        """Return the SHA-256 of the file's content."""
        return file_sha256(self.path)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the checksums of the arrays, which the file stores; this is fast."""
        problem = "not a readable .npz file"
        with read_errors_as_user_error(self.path, problem), zipfile.ZipFile(self.path) as archive:
            entries = [(entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist()]
        return hashlib.sha256(repr(entries).encode()).hexdigest()


class FolderOfImages(Dataset):
    """All images of a folder or an archive, sorted by path; item i is uint8 [H, W, 3].

    Args:
        resolution: resize and crop to a square of this resolution, as guided-diffusion does; None: do not.
        workers: number of data-loading workers; 0 reads each image when it is needed.
        user_classes: the user's class of each class folder; None: see ``number_classes``, for the model that
            the JSON beside the folder names (see ``report_path``).
        upright: whether images are rotated by their EXIF orientation.

    Raises UserError if there are no images, or ``user_classes`` lacks a class folder.
    """

    def __init__(
        self,
        folder: Folder | Archive,
        resolution: int | None = None,
        workers: int = 0,
        user_classes: Mapping[str, int] | None = None,
        upright: bool = False,
    ):
        self.path = path = folder.root
        self.resolution, self.workers = resolution, workers
        files, self.left_out = find_images(folder)
        in_order = sorted(files, key=lambda file: (normalised_name(file).split("/"), file))
        self.source = FileList(folder, in_order, upright)
        if not files:
            left_out = f"; {self.left_out}" if self.left_out else ""
            raise UserError(f"{path}: holds no images ({', '.join(IMAGE_SUFFIXES)}){left_out}")
        self.folders = list(
            map(class_folder, in_order)
        )  # class folder of each image, if there are class folders
        self.size = self._read(0).shape[:2]  # height and width in pixels
        self.statistics: dict[str, np.ndarray] = {}  # only an .npz may hold statistics
        self.classes, self.why_unlabelled = self._number_classes(user_classes)

    def __len__(self) -> int:
        return len(self.source.names)

    def _read(self, index: int) -> np.ndarray:
        return np.array(self.source.image(index, self.resolution))

    def __getitem__(self, index: int) -> Tensor:
        """Return an image. Raise UserError if it is unreadable or its size differs from the first image's."""
        image = self._read(index)
        if image.shape[:2] != self.size:
            own, other = (f"{size[0]} x {size[1]}" for size in (image.shape, self.size))
            raise UserError(
                f"{self.source.path(index)}: is {own}, but other images are {other}; "
                "make all one size with --resize (in make_reference: --image-size)"
            )
        return torch.from_numpy(image)

    def batches(self, part: slice, batch_size: int) -> Iterator[np.ndarray]:
        """Yield the images of a range in order, uint8 [n, H, W, 3] with n <= batch_size."""
        for images in read_items(self, range(part.start, part.stop), self.workers, batch_size):
            yield images.numpy()

    def content_hash(self) -> str:
        """Return the SHA-256 of the image files, their names, and how they are resized and rotated."""
        digest = hashlib.sha256(b"" if self.resolution is None else b"side %d" % self.resolution)
        digest.update(b"upright" * self.source.upright)
        for index, name in enumerate(self.source.names):
            path = Path(self.source.path(index))
            with read_errors_as_user_error(path, "cannot be read"), self.source.open(index) as file:
                digest.update(os.fsencode(normalised_name(Path(name).name)) + file.read())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Return a SHA-256 that changes with the images, without reading all of them (see ``FileList``)."""
        return self.source.fingerprint()

    def _number_classes(
        self, user_classes: Mapping[str, int] | None
    ) -> tuple[dict[str, int] | None, str | None]:
        """Return (class of each class folder, why they are unknown); both None without class folders."""
        self.numbering: list[str] = []
        if user_classes is None and not all("/" in file for file in self.source.names):
            return None, None
        model = read_sampling_options(self.path).get("model")
        num_classes = build_model(model).num_classes if model in ZOO and user_classes is None else None
        try:
            classes = number_classes(self.path, self.folders, num_classes, user_classes)
        except UserError as error:
            if user_classes is not None:
                raise
            return None, str(error)
        self.numbering = numbering_notes(classes, num_classes, user_classes)
        return classes, None

    def labels(self) -> np.ndarray | None:
        """Return the classes int64 [N], or None if they are unknown."""
        if self.classes is None:
            return None
        return np.array([self.classes[folder] for folder in self.folders], np.int64)

    def notes(self) -> list[str]:
        """Return notes on why metrics of these images are not comparable with published ones."""
        lossy = sum(file.lower().endswith((".jpg", ".jpeg", ".webp")) for file in self.source.names)
        resized = (
            f"{self.path}: images are resized and cropped to {self.resolution} x {self.resolution} (centre)"
        )
        compressed = (
            f"{lossy:,} of {len(self):,} images of {self.path} are JPEG or WebP: "
            "lossy compression changes FID"
        )
        notes = [note for note in (self.left_out, self.resolution and resized, lossy and compressed) if note]
        return notes + self.numbering + self.source.notes()


ImageSet = NpzImages | FolderOfImages


def open_image_set(
    path: Path,
    resolution: int | None = None,
    workers: int = 0,
    user_classes: Mapping[str, int] | None = None,
    upright: bool = False,
) -> ImageSet:
    """Open a folder, an archive or an .npz (without options). Raise UserError for other files."""
    folder = open_image_folder(path)
    return FolderOfImages(folder, resolution, workers, user_classes, upright) if folder else NpzImages(path)
