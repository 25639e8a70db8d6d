"""What the trainer reads: the interface of all training data, and labelled images.

An item belongs to (epoch, image index): its crop is drawn from that image's own random stream, so
neither the number of processes nor of loader workers changes what is trained.
"""

from abc import abstractmethod
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from cca.data.image_sets import NpzImages, to_uint8_tensor
from cca.streams import CROPS, stream
from models import ARImageModel, UserError
from models.image_transforms import Transform


def to_model_input(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 in [-1, 1], rounded as torchvision's ToTensor and VAR do it."""
    return pixels.float().div_(255).mul_(2).sub_(1)


class TokenSource(Dataset):
    """What the trainer knows of a data set: labels by index, items by (epoch, index), tokens of items."""

    crops: int = 1  # views that an item holds; the trainer takes sources of one

    @abstractmethod
    def __len__(self) -> int:
        """Images."""

    @abstractmethod
    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """The item of (epoch, index): a tensor that ``tokens`` takes a batch of, and an index.

        Images are uint8 [3, H, W], or [crops, 3, H, W] where ``crops`` is above 1; codes are int64
        [L]. The index is that of an image that could not be read and was replaced, or -1. Runs in
        the loader's processes: no device, and no random numbers but those of (seed, epoch, index).
        """

    @abstractmethod
    def labels(self, indices: np.ndarray) -> Tensor:
        """Classes [n] int64 of these images, on the CPU."""

    @abstractmethod
    def tokens(self, batch: Tensor) -> Tensor:
        """Tokens [n, L] int64 of n stacked views; images are encoded on the model's device."""

    def name(self, index: int) -> str:
        """What to call image ``index`` in a message."""
        return f"image {index}"


class LabelledImages(TokenSource):
    """Images that the model's frozen tokenizer encodes as they are needed."""

    def __init__(self, model: ARImageModel, labels: np.ndarray, path: str | Path):
        self.model, self.all_labels = model, check_labels(labels, model, path)

    def __len__(self) -> int:
        return len(self.all_labels)

    def labels(self, indices: np.ndarray) -> Tensor:
        return self.all_labels[torch.from_numpy(indices)]

    @torch.no_grad()
    def tokens(self, batch: Tensor) -> Tensor:
        device = next((p.device for p in self.model.tokenizer.parameters()), batch.device)
        return self.model.encode(to_model_input(batch.to(device)))


class ImageArray(LabelledImages):
    """An ``.npz`` of labelled images at the model's size, held in memory."""

    def __init__(self, path: Path, model: ARImageModel):
        file = NpzImages(path)
        labels = file.labels()
        if labels is None or len(labels) != len(file):
            found = "no labels" if labels is None else f"{len(labels)} labels"
            raise UserError(f"{path}: holds {len(file)} images (arr_0) and {found} (arr_1)")
        if len(file) and file.size != (model.image_size, model.image_size):
            raise UserError(
                f"--data: {path} has images of {file.size[0]} x {file.size[1]}, "
                f"the model takes {model.image_size} x {model.image_size}"
            )
        super().__init__(model, labels, path)
        (self.images,) = file.batches(slice(0, len(file)), len(file))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        return to_uint8_tensor(self.images[key[1] : key[1] + 1])[0], -1


class FolderImages(LabelledImages):
    """An ImageNet-style folder, one subfolder per class (torchvision's ImageFolder).

    The class folders may lie in ``train/`` below it. An unreadable image is replaced by the next
    readable one of its class and reported.
    """

    def __init__(self, path: Path, model: ARImageModel, transform: Transform, seed: int = 0):
        root = path / "train" if (path / "train").is_dir() else path
        try:
            self.folder = ImageFolder(str(root))
        except (FileNotFoundError, OSError) as error:
            raise UserError(
                f"--data: {root} is not a folder of class folders with images "
                f"({str(error).splitlines()[0][:100]})"
            ) from None
        if len(self.folder.classes) > model.num_classes:
            raise UserError(
                f"--data: {root} has {len(self.folder.classes)} class folders, "
                f"the model takes {model.num_classes} classes"
            )
        super().__init__(model, np.asarray(self.folder.targets), root)
        self.transform, self.seed, self.crops = transform, seed, transform.crops

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        files, targets = self.folder.samples, self.folder.targets
        candidate, bad = index, -1
        for _ in range(100):
            try:
                image = self.folder.loader(files[candidate][0])
                return self.transform(image, stream(self.seed, CROPS, epoch, index)), bad
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                bad, candidate = index, (candidate + 1) % len(self)
                if targets[candidate] != targets[index]:
                    candidate = targets.index(targets[index])
        raise UserError(f"--data: {self.name(index)} and the 99 images after it cannot be read")

    def name(self, index: int) -> str:
        return self.folder.samples[index][0]


def open_labelled_images(
    path: Path, model: ARImageModel, seed: int = 0, transform: Transform | None = None
) -> TokenSource:
    """``--data``: an ``.npz`` of images at the model's size, or a folder of class folders.

    Photographs of a folder go through ``transform``, by default the model's own of training.
    """
    if path.is_dir():
        return FolderImages(path, model, transform or model.training_transform(), seed)
    return ImageArray(path, model)


def check_labels(labels: np.ndarray, model: ARImageModel, path: str | Path) -> Tensor:
    if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < model.num_classes:
        raise UserError(f"{path}: labels must lie in 0 … {model.num_classes - 1}")
    return torch.from_numpy(np.ascontiguousarray(labels, np.int64))
