"""Training data: image folders, labelled image arrays, packed codes, published code folders.

An item belongs to (epoch, image index): its crop is drawn from that image's own random stream, so
neither the number of processes nor of loader workers changes what is trained.
"""

import json
import os
import zipfile
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as transforms

from cca.errors import UserError
from cca.image_geometry import centre_crop
from cca.random import CROPS, stream
from models.base import ARImageModel


def load_image_array(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of an ``.npz`` in the layout that ``sample.py`` writes.

    Returns ``arr_0`` uint8 [N, H, W, 3] (or [N, H, W], grey) and ``arr_1`` int64 [N].
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["arr_0"], file["arr_1"].astype(np.int64)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except KeyError as error:
        raise UserError(
            f"{path}: holds no array {error.args[0].split()[0]}; expected arr_0 (images) and arr_1 (labels)"
        ) from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path}: not a readable .npz file") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        raise UserError(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)} with {len(labels)} labels; expected uint8 [N, H, W, 3] or [N, H, W]"
        )
    return images, labels


def to_uint8_tensor(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] or grey [N, H, W] -> uint8 [N, 3, H, W]."""
    pixels = torch.from_numpy(images)
    return pixels[:, None].expand(-1, 3, -1, -1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


def to_model_input(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 in [-1, 1], rounded as torchvision's ToTensor and VAR do it."""
    return pixels.float().div_(255).mul_(2).sub_(1)


class TokenSource(Dataset):
    """What the trainer knows of a data set.

    Items are looked up by (epoch, index) and are (tensor, index of an unreadable image or -1);
    ``tokens`` turns a batch of item tensors into tokens [n, L] int64.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]: ...

    @abstractmethod
    def labels(self, indices: np.ndarray) -> Tensor:
        """Classes [n] int64 of these images."""

    @abstractmethod
    def tokens(self, batch: Tensor) -> Tensor: ...

    def name(self, index: int) -> str:
        """What to call image ``index`` in a message."""
        return f"image {index}"


class _Images(TokenSource):
    """Images that the model's frozen tokenizer encodes as they are needed."""

    def __init__(self, model: ARImageModel, labels: np.ndarray, path: str | Path):
        self.model, self.all_labels = model, check_labels(labels, model, path)

    def __len__(self) -> int:
        return len(self.all_labels)

    def labels(self, indices: np.ndarray) -> Tensor:
        return self.all_labels[torch.from_numpy(indices)]

    @torch.no_grad()
    def tokens(self, batch: Tensor) -> Tensor:
        device = next(self.model.tokenizer.parameters()).device
        return self.model.encode(to_model_input(batch.to(device)))


class ImageArray(_Images):
    """An ``.npz`` of images at the model's size."""

    def __init__(self, path: str | Path, model: ARImageModel):
        images, labels = load_image_array(path)
        if images.shape[1:3] != (model.image_size, model.image_size):
            raise UserError(
                f"--data: {path} has images of {images.shape[1]} x {images.shape[2]}, the model takes {model.image_size} x {model.image_size}"
            )
        self.images = images
        super().__init__(model, labels, path)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        return to_uint8_tensor(self.images[key[1] : key[1] + 1])[0], -1


# An image -> uint8 [..., 3, H, W]; the generator is the image's own in this epoch.
Transform = Callable[[Image.Image, np.random.Generator], Tensor]


def var_transform(size: int) -> Transform:
    """VAR's: shorter side to round(1.125 size) with Lanczos, random crop, no flip."""

    def apply(image: Image.Image, generator: np.random.Generator) -> Tensor:
        image = transforms.resize(image, round(1.125 * size), transforms.InterpolationMode.LANCZOS)
        top, left = (int(generator.integers(side - size + 1)) for side in (image.height, image.width))
        return transforms.pil_to_tensor(transforms.crop(image, top, left, size, size))

    return apply


def ten_crop_transform(size: int, crop_range: float) -> Transform:
    """LlamaGen's: ADM centre crop to crop_range x size, then the four corners, the centre, and their mirrors."""
    target = int(size * crop_range)

    def apply(image: Image.Image, generator: np.random.Generator) -> Tensor:
        return torch.stack(
            [transforms.pil_to_tensor(crop) for crop in transforms.ten_crop(centre_crop(image, target), size)]
        )

    return apply


class FolderImages(_Images):
    """An ImageNet-style folder, one subfolder per class (torchvision's ImageFolder), ``train/`` below it or not.

    An unreadable image is replaced by the next readable one of its class and reported.
    """

    def __init__(self, path: Path, model: ARImageModel, transform: Transform, seed: int = 0):
        root = path / "train" if (path / "train").is_dir() else path
        try:
            self.folder = ImageFolder(str(root))
        except (FileNotFoundError, OSError) as error:
            raise UserError(
                f"--data: {root} is not a folder of class folders with images ({str(error).splitlines()[0][:100]})"
            ) from None
        if len(self.folder.classes) > model.num_classes:
            raise UserError(
                f"--data: {root} has {len(self.folder.classes)} class folders, the model takes {model.num_classes} classes"
            )
        super().__init__(model, np.asarray(self.folder.targets), root)
        self.transform, self.seed = transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        candidate, bad = index, -1
        for _ in range(100):
            try:
                return self.transform(
                    self.folder.loader(self.folder.samples[candidate][0]),
                    stream(self.seed, CROPS, epoch, index),
                ), bad
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                bad = index
                following = (candidate + 1) % len(self)
                candidate = (
                    following
                    if self.folder.targets[following] == self.folder.targets[index]
                    else self.folder.targets.index(self.folder.targets[index])
                )
        raise UserError(f"--data: {self.name(index)} and the 99 images after it cannot be read")

    def name(self, index: int) -> str:
        return self.folder.samples[index][0]


def open_images(
    path: Path, model: ARImageModel, seed: int = 0, transform: Transform | None = None
) -> TokenSource:
    """``--data``: an ``.npz`` of images at the model's size, or a folder of class folders."""
    if path.is_dir():
        return FolderImages(path, model, transform or var_transform(model.image_size), seed)
    return ImageArray(path, model)


class PackedCodes:
    """A folder that ``scripts/extract_codes.py`` wrote: memory-mapped uint16 tokens, labels, a header."""

    def __init__(self, path: Path, model: ARImageModel):
        try:
            self.header = json.loads((path / "header.json").read_text())
            self.codes = np.load(path / "codes.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(path / "labels.npy", allow_pickle=False).astype(np.int64)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--codes: {path} is not a folder of packed codes ({error}); scripts/extract_codes.py makes one"
            ) from None
        if (
            self.codes.ndim != 3
            or self.codes.shape[2] != model.sequence_length
            or self.header.get("vocab_size") != model.vocab_size
        ):
            raise UserError(
                f"--codes: {path} holds {list(self.codes.shape)} codes of a vocabulary of {self.header.get('vocab_size')}, "
                f"the model takes {model.sequence_length} per image of {model.vocab_size}"
            )
        self.all_labels = check_labels(labels, model, path)

    def __len__(self) -> int:
        return len(self.codes)

    def crops(self, index: int) -> np.ndarray:
        """All crops of an image [crops, L]."""
        return self.codes[index]

    def labels(self, indices: np.ndarray) -> Tensor:
        return self.all_labels[torch.from_numpy(indices)]


class NpyCodes:
    """The published layout: ``imagenet384_codes/N.npy`` [1, 10, L] and ``imagenet384_labels/N.npy`` [1]."""

    def __init__(self, path: Path, model: ARImageModel):
        stem = f"imagenet{model.image_size}"
        self.codes_folder, self.labels_folder, self.model = (
            path / f"{stem}_codes",
            path / f"{stem}_labels",
            model,
        )
        names = {name for name in os.listdir(self.codes_folder) if name.endswith(".npy")}
        self.size = len(names)
        if not self.size or f"{self.size - 1}.npy" not in names:
            raise UserError(
                f"--codes: {self.codes_folder} has {self.size} .npy files that are not numbered from 0"
            )

    def __len__(self) -> int:
        return self.size

    def crops(self, index: int) -> np.ndarray:
        codes = self._read(self.codes_folder / f"{index}.npy")
        if (
            codes.shape[-1] != self.model.sequence_length
            or codes.min() < 0
            or codes.max() >= self.model.vocab_size
        ):
            raise UserError(
                f"--codes: {self.codes_folder}/{index}.npy holds {list(codes.shape)} codes up to {codes.max()}, "
                f"the model takes {self.model.sequence_length} per image of {self.model.vocab_size}"
            )
        return codes.reshape(-1, self.model.sequence_length)

    def labels(self, indices: np.ndarray) -> Tensor:
        values = np.array([self._read(self.labels_folder / f"{i}.npy").item() for i in indices])
        return check_labels(values, self.model, self.labels_folder)

    def _read(self, path: Path) -> np.ndarray:
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise UserError(f"--codes: {path} is missing or not a readable .npy file") from None


class Codes(TokenSource):
    """Tokens extracted beforehand; one of the crops of an image is drawn each time.

    A sister folder whose name has ``_105`` after it (crops of range 1.05) is drawn half of the time.
    """

    def __init__(self, path: Path, model: ARImageModel, seed: int = 0):
        kind = NpyCodes if (path / f"imagenet{model.image_size}_codes").is_dir() else PackedCodes
        sister = path.with_name(path.name + "_105")
        self.readers = [kind(folder, model) for folder in (path, sister) if folder == path or folder.is_dir()]
        self.seed = seed
        if len({len(reader) for reader in self.readers}) > 1:
            raise UserError(
                f"--codes: {path} has {len(self.readers[0])} images, {sister} has {len(self.readers[1])}"
            )

    def __len__(self) -> int:
        return len(self.readers[0])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        generator = stream(self.seed, CROPS, epoch, index)
        crops = self.readers[int(generator.integers(len(self.readers)))].crops(index)
        return torch.from_numpy(crops[int(generator.integers(len(crops)))].astype(np.int64)), -1

    def labels(self, indices: np.ndarray) -> Tensor:
        return self.readers[0].labels(indices)

    def tokens(self, batch: Tensor) -> Tensor:
        return batch


def check_labels(labels: np.ndarray, model: ARImageModel, path: str | Path) -> Tensor:
    if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < model.num_classes:
        raise UserError(f"{path}: labels must lie in 0 … {model.num_classes - 1}")
    return torch.from_numpy(np.ascontiguousarray(labels, np.int64))
