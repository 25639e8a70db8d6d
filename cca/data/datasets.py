"""Datasets of labelled images: the interface of all datasets, and those that hold pixels.

An item belongs to (epoch, image index): its crop comes from that image's own random stream. So the number of
ranks and of data-loading workers does not change the training.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cca.data.archives import Archive
from cca.data.image_folders import FileList, Folder, find_images, normalised_name, open_image_folder
from cca.data.image_sets import NpzImages, to_uint8_tensor
from cca.data.labels import (
    LISTED,
    check_labels,
    class_folder,
    number_classes,
    numbering_notes,
    read_listed_classes,
)
from cca.random_streams import CROPS, stream
from models import ARImageModel, UserError
from models.transforms import Transform

DATA_HELP = (
    "images: a folder, .zip or .tar with one subfolder per class (ARCHIVE/FOLDER: a folder in an archive), "
    "or an .npz with arr_0 uint8 [N, H, W(, 3)] and arr_1 labels [N]"
)
LAYOUTS = "docs/data.md lists the supported layouts"


class LabelledDataset(Dataset):
    """Images with their classes, as pixels or as codes; subclasses define ``all_labels`` and ``item``."""

    all_labels: Tensor  # classes [N] int64, on the CPU
    crops: int = 1  # views per item; the trainer needs 1
    classes: dict[str, int] | None = None  # class of each class folder, if the data have class folders
    exif_orientation: bool = False  # whether images are rotated by their EXIF orientation
    source: FileList | None = None  # the image files, if images are files; some may be unreadable
    unreadable: set[int] | frozenset[int] = frozenset()  # indices of images that this process could not read

    @abstractmethod
    def item(self, epoch: int, index: int) -> Tensor:
        """Return pixels uint8 [3, H, W] ([crops, 3, H, W] if ``crops`` is above 1), or codes int64 [L].

        It runs in data-loading workers, so it uses no device and only the random stream of (seed, epoch,
        index).
        """

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, bool]:
        """Return the item of (epoch, index), and whether it replaces an image that cannot be read."""
        return self.item(*key), key[1] in self.unreadable

    def __len__(self) -> int:
        return len(self.all_labels)

    def labels(self, indices: np.ndarray) -> Tensor:
        """Return the classes [n] int64 of these images, on the CPU."""
        return self.all_labels[torch.from_numpy(indices)]

    def occurring_classes(self) -> list[int] | None:
        """Return the classes that occur, sorted; None if that would need reading one file per image."""
        return self.all_labels.unique().tolist()

    def notes(self) -> list[str]:
        """Return notes for the user, such as what was left out or could not be checked."""
        return []

    def check_tokenizer(self, model: ARImageModel) -> None:
        """Raise UserError if the items are codes of another tokenizer than the model's.

        It is called after the model's weights are loaded.
        """

    def fingerprint(self) -> str | None:
        """Return a SHA-256 that changes with images and labels but not with the path, or None.

        It may read all data, so it runs once per node (see ``Ranks.digest``).
        """
        return None


class ImageArray(LabelledDataset):
    """An ``.npz`` of labelled images at the model's resolution, memory-mapped or held in memory."""

    def __init__(self, path: Path, model: ARImageModel):
        self.file = file = NpzImages(path)
        labels = file.labels()
        if labels is None:
            raise UserError(f"{path}: holds {len(file)} images (arr_0) but no labels (arr_1)")
        if len(file) and file.size != (model.image_size, model.image_size):
            raise UserError(
                f"--data: {path} has images of {file.size[0]} x {file.size[1]}; "
                f"the model needs {model.image_size} x {model.image_size}"
            )
        self.all_labels = check_labels(labels, model.num_classes, path)
        self.images = file.array()

    def item(self, epoch: int, index: int) -> Tensor:
        return to_uint8_tensor(self.images[index : index + 1].copy())[0]

    def fingerprint(self) -> str:
        self.file.check_sum()
        return self.file.content_hash()


def find_labelled_images(
    folder: Folder | Archive,
) -> tuple[Folder | Archive, dict[str, int], list[str], str | None]:
    """Return the folder of the images, the classes in its dataset.json, and what ``find_images`` returns.

    It is ``train/`` if that has images with classes, and no dataset.json lies beside it.
    """
    listed, train = read_listed_classes(folder), folder.subfolder("train")
    if train and not listed:
        listed_below = read_listed_classes(train)
        files, left_out = find_images(train)
        if any(listed_below or "/" in file for file in files):
            return train, listed_below, files, left_out
    return folder, listed, *find_images(folder)


class FolderImages(LabelledDataset):
    """An ImageNet-style folder or archive with one subfolder per class (see ``number_classes``).

    The class folders may be in ``train/``. If ``dataset.json`` lists the classes, folders do not count as
    classes. An unreadable image is replaced by the next readable one of its class and recorded.

    Args:
        user_classes: the user's class of each folder; None: see ``number_classes``.
        upright: see ``FileList``.

    Raises UserError if there are no images, or an image has no class.
    """

    source: FileList
    numbering: Sequence[str] = ()  # notes on how class folders are numbered

    def __init__(
        self,
        folder: Folder | Archive,
        model: ARImageModel,
        transform: Transform,
        seed: int = 0,
        user_classes: Mapping[str, int] | None = None,
        upright: bool = False,
    ):
        inner, listed, files, self.left_out = find_labelled_images(folder)
        used = [file for file in files if listed or "/" in file]
        if not used:
            problem = f"its {len(files):,} images are not in class folders, so their classes are unknown"
            raise UserError(f"--data: {folder.root}: {problem if files else 'holds no images'}; {LAYOUTS}")
        if listed and user_classes is not None:
            raise UserError(f"--classes-from: needs class folders; {inner.root} lists classes in {LISTED}")
        self.root, self.outside = inner.root, len(files) - len(used)
        if missing := [file for file in used if listed and normalised_name(file) not in listed]:
            raise UserError(f"--data: {inner.root / LISTED} lists no class for {missing[0]}")
        used.sort(key=lambda file: (listed.get(normalised_name(file), 0), place(file)))
        self.source, self.exif_orientation = FileList(inner, used, upright), upright
        if listed:
            labels = np.array([listed[key] for key in self.source.keys])
            self.all_labels = check_labels(labels, model.num_classes, f"--data: {inner.root / LISTED}")
        else:
            self.all_labels = self._number_folders(model, user_classes)
        self.transform, self.seed, self.crops = transform, seed, transform.crops
        self.unreadable: set[int] = set()

    def _number_folders(self, model: ARImageModel, user_classes: Mapping[str, int] | None) -> Tensor:
        """Return the class of each image from its class folder, [N]."""
        folders = [class_folder(file) for file in self.source.names]
        self.classes = number_classes(self.root, folders, model.num_classes, user_classes)
        self.numbering = numbering_notes(self.classes, model.num_classes, user_classes)
        return torch.tensor([self.classes[folder] for folder in folders])

    def item(self, epoch: int, index: int) -> Tensor:
        candidate = index
        for _ in range(100):
            try:
                image = self.source.image(candidate)
                return self.transform(image, stream(self.seed, CROPS, epoch, index))
            except (UserError, ValueError):
                self.unreadable.add(index)
                candidate = (candidate + 1) % len(self)
                if self.all_labels[candidate] != self.all_labels[index]:
                    candidate = int((self.all_labels == self.all_labels[index]).nonzero()[0])
        raise UserError(
            f"--data: {self.source.path(index)} and the next images of its class cannot be read; repair them"
        )

    def notes(self) -> list[str]:
        outside = f"{self.root}: {self.outside:,} images outside class folders are left out"
        notes = [note for note in (self.left_out, self.outside and outside) if note]
        return [*notes, *self.numbering, *self.source.notes()]

    def fingerprint(self) -> str:
        return self.source.fingerprint(self.all_labels.tolist())


def place(file: str) -> tuple[str, ...]:
    """Return the sort key of an image: class, folder, name. It must not change: it fixes image indices."""
    name = normalised_name(file)
    return (name.split("/")[0], *name.rsplit("/", 1), file)


def open_labelled_images(
    path: Path,
    model: ARImageModel,
    seed: int = 0,
    transform: Transform | None = None,
    classes: Mapping[str, int] | None = None,
    upright: bool = False,
) -> LabelledDataset:
    """Open ``--data``: a folder or archive of class folders, or an ``.npz`` at the model's resolution.

    Args:
        transform: crops images of a folder; default: the model's transform for training.
        classes: the user's class of each folder; None: see ``number_classes``.
        upright: see ``FileList``.
    """
    if folder := open_image_folder(path):
        return FolderImages(folder, model, transform or model.training_transform(), seed, classes, upright)
    if classes is not None:
        raise UserError(f"--classes-from: needs class folders; {path} has its labels in arr_1")
    return ImageArray(path, model)
