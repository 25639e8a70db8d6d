"""Sets of images, read piece by piece: .npz files of any size, folders and archives."""

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

LARGEST_STATISTIC = 1e100  # of features in float32, and their squares; beyond, distances overflow
DAMAGED = "arr_0 is cut off or damaged"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


def to_uint8_tensor(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] or grey [N, H, W] -> uint8 [N, 3, H, W]."""
    pixels = torch.from_numpy(images)
    return pixels[:, None].expand(-1, 3, -1, -1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


@contextmanager
def reading(path: Path, problem: str) -> Iterator[None]:
    """Turn whatever a reader of damaged, encrypted or unknown data raises into one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # zipfile, its decompressors and numpy raise some ten kinds
        raise UserError(f"{path}: {problem} ({reason(error)})") from None


def report_path(samples: Path) -> Path:
    """Where ``sample.py`` describes an .npz of samples, or the folder that it was unpacked to."""
    path = Path(os.path.abspath(samples))
    return path.with_name(f"{path.name.removesuffix('.npz')}.json")


def read_sampling_options(samples: Path) -> dict:
    """The options that samples were made with, as ``sample.py`` wrote them beside an .npz (or what was
    unpacked of it); empty where there is no such file, or another JSON."""
    options = (read_own_json(report_path(samples)) or {}).get("options", {})
    fits = isinstance(options.get("model", ""), str) and type(options.get("cfg_scale", 1)) in (int, float)
    return options if fits and "num_samples" in options and finite_or_none(options) == options else {}


class NpzImages:
    """``arr_0`` uint8 [N, H, W, 3] (or grey [N, H, W]) of an .npz, compressed or not, never whole in memory.

    ``arr_1`` holds the classes, ``mu`` and the like statistics; a file without ``arr_0`` has length 0.
    Raises UserError where the file is damaged or holds something else.
    """

    # Of class folders, which an .npz does not have.
    classes = why_unlabelled = None

    def __init__(self, path: Path):
        self.path = path
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: is not a file")  # opening a pipe would wait for ever
        self.shape: tuple[int, ...] = (0, 0, 0)
        with reading(path, "not a readable .npz file"), zipfile.ZipFile(path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" in self.names:
                with archive.open("arr_0.npy") as file:
                    self.shape = self._read_header(file)
                    self.header_bytes = file.tell()
                size = archive.getinfo("arr_0.npy").file_size - self.header_bytes
                if self.shape[0] < 0 or math.prod(self.shape) > size:
                    raise UserError(f"{path}: {DAMAGED}: {list(self.shape)} in {size:,} bytes")
        if "arr_0" not in self.names and not set(STATISTICS[:2]) <= set(self.names):
            held = ", ".join(self.names[:4]) or "nothing"
            raise UserError(f"{path}: holds {held}; expected arr_0 (images) or mu and sigma")
        self.size = self.shape[1:3]  # height and width in pixels

    @contextmanager
    def _opened(self, name: str, problem: str) -> Iterator[IO[bytes]]:
        """The bytes of an array; whatever is wrong with them, also inside the block, is that problem."""
        with (
            reading(self.path, problem),
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
        """Images of a range in order, uint8 [n, H, W, 3] or grey [n, H, W], n <= batch_size at a time."""
        image_bytes = int(np.prod(self.shape[1:]))
        with self._opened("arr_0", DAMAGED) as file:
            file.seek(self.header_bytes + part.start * image_bytes)
            for start in range(part.start, part.stop, batch_size):
                count = min(batch_size, part.stop - start)
                data = file.read(count * image_bytes)
                if len(data) != count * image_bytes:
                    raise EOFError
                yield np.frombuffer(bytearray(data), np.uint8).reshape(count, *self.shape[1:])

    def array(self) -> np.ndarray:
        """Return all images, uint8 [N, H, W, 3] or grey [N, H, W], which may not be written to.

        They are mapped into memory where the file holds them uncompressed, so that all ranks and workers of
        a machine share them (``check_sum`` finds damage); else they are read, and checked.
        """
        with reading(self.path, DAMAGED), zipfile.ZipFile(self.path) as archive:
            entry = archive.getinfo("arr_0.npy")
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:  # encrypted
                return self._array("arr_0")
            with open(self.path, "rb") as file:  # the entry's own header: 30 bytes, its name, an extra field
                file.seek(entry.header_offset + 26)
                start = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4))) + self.header_bytes
            return np.memmap(self.path, np.uint8, "r", start, self.shape)

    def check_sum(self) -> None:
        """Read ``arr_0`` to its end, where its checksum is compared. Raises UserError."""
        with self._opened("arr_0", DAMAGED) as file:
            while file.read(1 << 20):
                pass

    def labels(self) -> np.ndarray | None:
        """Classes [N] int64 if the file holds them."""
        if "arr_1" not in self.names:
            return None
        labels = whole_numbers(self._array("arr_1"), f"{self.path} (arr_1)")
        if len(labels) != self.shape[0]:
            raise UserError(f"{self.path}: holds {len(self)} images (arr_0) and {len(labels)} labels (arr_1)")
        return labels

    @cached_property
    def statistics(self) -> dict[str, np.ndarray]:
        """Those of mu [D], sigma [D, D], mu_s and sigma_s that the file holds, float64."""
        found = {name: self._array(name) for name in STATISTICS if name in self.names}
        for name, values in found.items():
            covariance, mean = name.startswith("sigma"), found.get(name.replace("sigma", "mu"), values)
            fits = values.ndim == 1 + covariance and values.shape == mean.shape[:1] * values.ndim
            if values.dtype.kind not in "fiu" or not values.size or not fits:
                raise UserError(
                    f"{self.path}: {name} is {values.dtype} {list(values.shape)}: mean and covariance do not "
                    "fit; expected real numbers [D] and [D, D]"
                )
            largest = np.abs(values.astype(np.float64)).max()
            if not np.isfinite(largest):
                raise UserError(f"{self.path}: {name} holds numbers that are not finite")
            symmetric = np.allclose(values, values.T, rtol=1e-4, atol=1e-6 * largest)
            problems = {
                f"holds {largest:g}, which is out of all proportion": largest > LARGEST_STATISTIC,
                "is not symmetric, so it is no covariance": not symmetric,
                "has negative variances": covariance and values.diagonal().min() < -1e-6 * largest,
            }
            for problem, is_so in problems.items():
                if is_so:
                    raise UserError(f"{self.path}: {name} {problem}")
        return {name: values.astype(np.float64) for name, values in found.items()}

    def notes(self) -> list[str]:
        """What of these images makes figures not comparable with published ones."""
        pairs = [("mu", "sigma"), ("sigma", "mu"), ("mu_s", "sigma_s"), ("sigma_s", "mu_s")]
        return [
            f"{self.path} holds {own} and no {other}: it is not used"
            for own, other in pairs
            if own in self.names and other not in self.names
        ]

    def _array(self, name: str) -> np.ndarray:
        with self._opened(name, f"{name} is not readable") as file:
            return npy.read_array(file, allow_pickle=False)

    def content_hash(self) -> str:
        """SHA-256 of the file; its name does not count."""
        return file_sha256(self.path)

    def fingerprint(self) -> str:
        """SHA-256 of the checksums that the file holds of its arrays, which takes no time."""
        with reading(self.path, "not a readable .npz file"), zipfile.ZipFile(self.path) as archive:
            noted = [(entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist()]
        return hashlib.sha256(repr(noted).encode()).hexdigest()


class FolderOfImages(Dataset):
    """All images of a folder or an archive, in the order of their paths; item i is uint8 [H, W, 3].

    Args:
        side: cut each to a square of that side as guided-diffusion does it; None takes them as they are.
        workers: processes that read images ahead; 0 reads them as they are needed.
        given: the user's own class of each class folder; None: as ``number_classes`` says for the model that
            made the images, where a description beside the folder names it.
        upright: whether pictures are turned as their EXIF orientation says.

    Raises UserError where there are no images, or ``given`` does not name the class folders.
    """

    def __init__(
        self,
        folder: Folder | Archive,
        side: int | None = None,
        workers: int = 0,
        given: Mapping[str, int] | None = None,
        upright: bool = False,
    ):
        self.path = path = folder.root
        self.side, self.workers = side, workers
        files, self.left_out = find_images(folder)
        in_order = sorted(files, key=lambda file: (normalised_name(file).split("/"), file))
        self.source = FileList(folder, in_order, upright)
        if not files:
            left_out = f"; {self.left_out}" if self.left_out else ""
            raise UserError(f"{path}: holds no images ({', '.join(IMAGE_SUFFIXES)}){left_out}")
        self.folders = list(map(class_folder, in_order))  # of the classes, where there are such
        self.size = self._read(0).shape[:2]  # height and width in pixels
        self.statistics: dict[str, np.ndarray] = {}  # which a folder does not hold
        self.classes, self.why_unlabelled = self._number_classes(given)

    def __len__(self) -> int:
        return len(self.source.names)

    def _read(self, index: int) -> np.ndarray:
        return np.array(self.source.image(index, self.side))

    def __getitem__(self, index: int) -> Tensor:
        """Raises UserError for an image that cannot be read, or is of another size than the first."""
        image = self._read(index)
        if image.shape[:2] != self.size:
            own, other = (f"{side[0]} x {side[1]}" for side in (image.shape, self.size))
            raise UserError(
                f"{self.source.path(index)}: is {own}, other images are {other}; "
                "--resize (of make_reference: --image-size) cuts all to one size"
            )
        return torch.from_numpy(image)

    def batches(self, part: slice, batch_size: int) -> Iterator[np.ndarray]:
        """Images of a range in order, uint8 [n, H, W, 3], n <= batch_size at a time."""
        for images in read_items(self, range(part.start, part.stop), self.workers, batch_size):
            yield images.numpy()

    def content_hash(self) -> str:
        """SHA-256 of the images as they lie on disk, wherever that is, and of how they are cut and turned."""
        digest = hashlib.sha256(b"" if self.side is None else b"side %d" % self.side)
        digest.update(b"upright" * self.source.upright)
        for index, name in enumerate(self.source.names):
            with reading(Path(self.source.path(index)), "cannot be read"), self.source.open(index) as file:
                digest.update(os.fsencode(normalised_name(Path(name).name)) + file.read())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 that tells other images from these without reading them."""
        return self.source.fingerprint()

    def _number_classes(self, given: Mapping[str, int] | None) -> tuple[dict[str, int] | None, str | None]:
        """The class of each class folder, or why it is not known; neither without class folders."""
        self.numbering: list[str] = []
        if given is None and not all("/" in file for file in self.source.names):
            return None, None
        model = read_sampling_options(self.path).get("model")
        num_classes = build_model(model).num_classes if model in ZOO and given is None else None
        try:
            classes = number_classes(self.path, self.folders, num_classes, given)
        except UserError as error:
            if given is not None:
                raise
            return None, str(error)
        self.numbering = numbering_notes(classes, num_classes, given)
        return classes, None

    def labels(self) -> np.ndarray | None:
        """Classes [N] int64 if those of the class folders are known."""
        if self.classes is None:
            return None
        return np.array([self.classes[folder] for folder in self.folders], np.int64)

    def notes(self) -> list[str]:
        """What of these images makes figures not comparable with published ones."""
        lossy = sum(file.lower().endswith((".jpg", ".jpeg", ".webp")) for file in self.source.names)
        cut = f"{self.path}: images are resized and cut to {self.side} x {self.side} (centre)"
        compressed = (
            f"{lossy:,} of {len(self):,} images of {self.path} are JPEG or WebP: "
            "lossy compression changes FID"
        )
        found = [note for note in (self.left_out, self.side and cut, lossy and compressed) if note]
        return found + self.numbering + self.source.notes()


ImageSet = NpzImages | FolderOfImages


def open_image_set(
    path: Path,
    side: int | None = None,
    workers: int = 0,
    given: Mapping[str, int] | None = None,
    upright: bool = False,
) -> ImageSet:
    """Open a folder, an archive, or an .npz, which takes no option. Raises UserError for anything else."""
    folder = open_image_folder(path)
    return FolderOfImages(folder, side, workers, given, upright) if folder else NpzImages(path)
