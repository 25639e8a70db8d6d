"""What the trainer reads: the interface of all training data, and labelled images.

An item belongs to (epoch, image index): its crop is drawn from that image's own random stream, so
neither the number of processes nor of loader workers changes what is trained.
"""

import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cca.data.classes import check_labels, number_classes
from cca.data.folders import find_images, fingerprint, read_image, shown, subfolders
from cca.data.image_sets import NpzImages, to_uint8_tensor
from cca.streams import CROPS, stream
from models import ARImageModel, UserError
from models.devices import ENCODED_PIXELS, full_parts, upload
from models.image_transforms import Transform


def to_model_input(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 in [-1, 1], rounded as torchvision's ToTensor and VAR do it."""
    return pixels.float().div_(255).mul_(2).sub_(1)


def encoded_at_once(model: ARImageModel, device: torch.device) -> int:
    """Images that a tokenizer encodes at a time, so that memory does not grow with the batch."""
    return max(1, ENCODED_PIXELS[device.type] // model.image_size**2)


def to_tokens(model: ARImageModel, images: Tensor, device: torch.device, alike: bool = False) -> Tensor:
    """uint8 images [n, 3, H, W] -> tokens [n, L] on the tokenizer's device, ``encoded_at_once`` at a time.

    alike: all parts are of one size, so that an image's tokens depend on n in no case; see ``full_parts``.
    """
    size = encoded_at_once(model, device)
    parts = full_parts(images, size) if alike else ((part, len(part)) for part in images.split(size))
    with torch.inference_mode():
        tokens = [model.encode(to_model_input(upload(part, device)))[:count] for part, count in parts]
    return torch.cat(tokens)  # out here: what was made in there could not be trained on


class TokenSource(Dataset):
    """What the trainer knows of a data set: labels by index, items by (epoch, index), tokens of items."""

    crops: int = 1  # views that an item holds; the trainer takes sources of one
    classes: dict[str, int] | None = None  # class of each class folder, where there are such

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

    def notes(self) -> list[str]:
        """What to tell the user of the data: what was left out, what could not be checked."""
        return []

    def check_tokenizer(self) -> None:
        """Raise UserError where the items were made by another tokenizer than the model's.

        Called when the model has its weights, which it may not have before.
        """

    def fingerprint(self) -> str | None:
        """SHA-256 that changes with images or labels and not with the path; None: not known.

        It may read all of the data: one process takes it.
        """
        return None

    def same_class(self) -> bool:
        """Whether all images are of one class; looks at no more labels than it has to."""
        first = self.labels(np.arange(1))
        parts = (np.arange(i, min(i + 1024, len(self))) for i in range(0, len(self), 1024))
        return all(bool((self.labels(part) == first).all()) for part in parts)


class LabelledImages(TokenSource):
    """Images that the model's frozen tokenizer encodes as they are needed."""

    def __init__(self, model: ARImageModel, labels: np.ndarray, path: str | Path):
        self.model, self.all_labels = model, check_labels(labels, model, path)

    def __len__(self) -> int:
        return len(self.all_labels)

    def labels(self, indices: np.ndarray) -> Tensor:
        return self.all_labels[torch.from_numpy(indices)]

    def tokens(self, batch: Tensor) -> Tensor:
        device = next((p.device for p in self.model.tokenizer.parameters()), batch.device)
        return to_tokens(self.model, batch, device)


class ImageArray(LabelledImages):
    """An ``.npz`` of labelled images at the model's size, held in memory."""

    def __init__(self, path: Path, model: ARImageModel):
        self.file = file = NpzImages(path)
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

    def fingerprint(self) -> str:
        return self.file.content_hash()


class FolderImages(LabelledImages):
    """An ImageNet-style folder, one subfolder per class (``number_classes`` has the rules).

    The class folders may lie in ``train/`` below it. An unreadable image is replaced by the next
    readable one of its class and reported. ``given``: the user's own class of each folder.
    """

    def __init__(
        self,
        path: Path,
        model: ARImageModel,
        transform: Transform,
        seed: int = 0,
        given: Mapping[str, int] | None = None,
    ):
        inner = path / "train"
        self.root = root = inner if inner.is_dir() and subfolders(inner) else path
        files, self.left_out = find_images(root)
        self.outside = sum("/" not in file for file in files)
        # Class by class, then by folder and name: an image keeps its index from version to version.
        self.files = sorted(
            (file for file in files if "/" in file),
            key=lambda file: (file.split("/")[0], *file.rsplit("/", 1)),
        )
        if not self.files:
            raise UserError(f"--data: {shown(root)} is not a folder of class folders with images")
        self.classes = number_classes(root, subfolders(root), model.num_classes, given)
        super().__init__(model, np.array([self.classes[file.split("/")[0]] for file in self.files]), root)
        self.transform, self.seed, self.crops = transform, seed, transform.crops

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        candidate, bad = index, -1
        for _ in range(100):
            try:
                image = read_image(self.name(candidate))
                return self.transform(image, stream(self.seed, CROPS, epoch, index)), bad
            except (UserError, ValueError):
                bad, candidate = index, (candidate + 1) % len(self)
                if self.all_labels[candidate] != self.all_labels[index]:
                    candidate = int((self.all_labels == self.all_labels[index]).nonzero()[0])
        raise UserError(f"--data: {shown(self.name(index))} and the 99 images after it cannot be read")

    def name(self, index: int) -> str:
        return f"{self.root}/{self.files[index]}"

    def notes(self) -> list[str]:
        assert self.classes is not None
        present = {file.split("/")[0] for file in self.files}
        empty = [name for name in self.classes if name not in present]
        return [
            *([self.left_out] if self.left_out else []),
            *(
                [f"{self.root}: {self.outside:,} images in no class folder are left out"]
                if self.outside
                else []
            ),
            *(
                [f"{self.root}: {len(empty)} class folders hold no images ({shown(empty[0])})"]
                if empty
                else []
            ),
        ]

    def fingerprint(self) -> str:
        return fingerprint(self.root, self.files, self.all_labels.tolist())


def open_labelled_images(
    path: Path,
    model: ARImageModel,
    seed: int = 0,
    transform: Transform | None = None,
    classes: Mapping[str, int] | None = None,
) -> TokenSource:
    """``--data``: an ``.npz`` of images at the model's size, or a folder of class folders.

    Photographs of a folder go through ``transform``, by default the model's own of training;
    ``classes`` is the user's own class of each folder.
    """
    if os.path.isdir(path):  # False for a name that cannot be one, too
        return FolderImages(path, model, transform or model.training_transform(), seed, classes)
    if classes is not None:
        raise UserError(f"--classes-from: goes with class folders; the labels of {path} are its arr_1")
    return ImageArray(path, model)
