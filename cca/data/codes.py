"""Codes (tokens extracted in advance): packed codes, and the published layout of one file per image."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cca.data.datasets import LabelledDataset
from cca.data.image_folders import FileList, Folder
from cca.data.labels import check_labels, class_folders
from cca.random_streams import CROPS, stream
from models import ARImageModel, UserError
from models.utils.files import file_sha256, read_array, read_json, reason
from models.zoo.checkpoint_formats import tensors_sha256

CHECKED_AT_ONCE = 4096  # images


def check_codes(codes: np.ndarray, path: Path, length: int, vocab_size: int) -> None:
    """Raise UserError unless codes [..., length] are integers in 0 … vocab_size - 1."""
    if codes.dtype.kind not in "iu" or codes.size == 0 or codes.shape[-1:] != (length,):
        raise UserError(
            f"--codes: {path} holds {codes.dtype} codes of shape {list(codes.shape)}; "
            f"expected integers, {length} per image"
        )
    for part in (codes[i : i + CHECKED_AT_ONCE] for i in range(0, len(codes), CHECKED_AT_ONCE)):
        if part.min() < 0 or part.max() >= vocab_size:
            raise UserError(
                f"--codes: {path} holds codes from {part.min()} to {part.max()}; "
                f"expected 0 … {vocab_size - 1}; extract them again"
            )


class PackedCodes:
    """A folder that ``scripts/extract_codes.py`` wrote: memory-mapped uint16 codes, labels and a header.

    Raises UserError if codes, labels and header do not match each other and the model.
    """

    def __init__(self, path: Path, model: ARImageModel):
        self.path = path
        try:
            header = read_json(path / "header.json")
            self.codes = read_array(path / "codes.npy", "r")
            labels = read_array(path / "labels.npy")
        except UserError as error:
            raise UserError(
                f"--codes: {path} is not a folder of packed codes ({error}); "
                "expected a folder that scripts/extract_codes.py wrote"
            ) from None
        self.classes, self.tokenizer = class_folders(header), header.get("tokenizer_tensors_sha256")
        if self.codes.ndim != 3 or header.get("vocab_size") != model.vocab_size:
            raise UserError(
                f"--codes: {path} holds codes of shape {list(self.codes.shape)} and vocabulary size "
                f"{header.get('vocab_size')}; "
                f"expected [images, crops, {model.sequence_length}] and {model.vocab_size}"
            )
        check_codes(self.codes, path / "codes.npy", model.sequence_length, model.vocab_size)
        self.all_labels = check_labels(labels, model.num_classes, f"--codes: {path}/labels.npy")
        if len(labels) != len(self.codes):
            raise UserError(
                f"--codes: {path} holds codes of {len(self.codes)} images but {len(labels)} labels"
            )

    def __len__(self) -> int:
        return len(self.codes)

    def crops(self, index: int) -> np.ndarray:
        """Return the codes of all crops of an image, [crops, L]."""
        return self.codes[index]

    def labels(self, indices: np.ndarray) -> Tensor:
        return self.all_labels[torch.from_numpy(indices)]

    def fingerprint(self) -> str:
        return file_sha256(self.path / "codes.npy") + file_sha256(self.path / "labels.npy")


class NpyCodes:
    """The published layout: ``imagenet384_codes/N.npy`` [1, 10, L] and ``imagenet384_labels/N.npy`` [1].

    There are 1.28 million files, so each is checked only when it is read. The files do not say which
    tokenizer made the codes.
    """

    classes = tokenizer = all_labels = None

    def __init__(self, path: Path, model: ARImageModel):
        self.path, stem = path, f"imagenet{model.image_size}"
        self.codes_folder, self.labels_folder = path / f"{stem}_codes", path / f"{stem}_labels"
        self.length, self.vocab_size = model.sequence_length, model.vocab_size
        self.num_classes = model.num_classes
        try:
            names = {name for name in os.listdir(self.codes_folder) if name.endswith(".npy")}
        except OSError as error:
            raise UserError(f"--codes: {self.codes_folder}: cannot be listed ({error.strerror})") from None
        self.size, last = len(names), f"{len(names) - 1}.npy"
        if last not in names or not (self.labels_folder / last).exists():
            raise UserError(
                f"--codes: {path}: expected files 0.npy, 1.npy, … in {stem}_codes and {stem}_labels, "
                f"a label for each of the {self.size} codes"
            )

    def __len__(self) -> int:
        return self.size

    def crops(self, index: int) -> np.ndarray:
        path = self.codes_folder / f"{index}.npy"
        codes = _read(path)
        check_codes(codes, path, self.length, self.vocab_size)
        return codes.reshape(-1, self.length)

    def label(self, index: int) -> object:
        """Return the value in the file of a label, not yet checked to be a class (see ``labels``)."""
        path = self.labels_folder / f"{index}.npy"
        label = _read(path)
        if label.size != 1:
            raise UserError(f"--codes: {path} holds {label.size} labels; expected one")
        return label.item()

    def labels(self, indices: np.ndarray) -> Tensor:
        labels = np.array([self.label(index) for index in indices])
        return check_labels(labels, self.num_classes, f"--codes: {self.labels_folder}")

    def fingerprint(self) -> str:
        """Return the fingerprint of the files (see ``FileList``).

        A file whose size differs from that of the first file is read, which checks it.
        """
        files = []
        for folder, read in ((self.codes_folder, self.crops), (self.labels_folder, self.label)):
            try:
                with os.scandir(folder) as entries:
                    sizes = {entry.name: entry.stat().st_size for entry in entries}
            except OSError as error:  # such as a broken link
                raise UserError(f"--codes: {folder}: cannot be read ({reason(error)})") from None
            for index in range(self.size):
                if index == 0 or sizes.get(f"{index}.npy") != sizes["0.npy"]:
                    read(index)
            files += [f"{folder.name}/{name}" for name in sorted(sizes)]
        return FileList(Folder(self.path), files).fingerprint()


def _read(path: Path) -> np.ndarray:
    try:
        return read_array(path)
    except UserError as error:
        raise UserError(f"--codes: {error}") from None


class Codes(LabelledDataset):
    """Codes of images; each item is one crop of an image, sampled at random.

    If a second folder with the suffix ``_105`` exists (crops of range 1.05), half of the crops come from it.
    """

    def __init__(self, path: Path, model: ARImageModel, seed: int = 0):
        kind = NpyCodes if (path / f"imagenet{model.image_size}_codes").is_dir() else PackedCodes
        second = Path(f"{os.path.abspath(path)}_105")
        self.readers = [kind(folder, model) for folder in (path, second) if folder == path or folder.is_dir()]
        self.seed, self.classes = seed, self.readers[0].classes
        if len({len(reader) for reader in self.readers}) > 1:
            raise UserError(
                f"--codes: {path} has {len(self.readers[0])} images, but {second} has {len(self.readers[1])}"
            )
        all_labels = [reader.all_labels for reader in self.readers if reader.all_labels is not None]
        if not all(torch.equal(labels, all_labels[0]) for labels in all_labels):
            raise UserError(f"--codes: {path} and {second} have different labels")

    def __len__(self) -> int:
        return len(self.readers[0])

    def item(self, epoch: int, index: int) -> Tensor:
        generator = stream(self.seed, CROPS, epoch, index)
        crops = self.readers[int(generator.integers(len(self.readers)))].crops(index)
        return torch.from_numpy(crops[int(generator.integers(len(crops)))].astype(np.int64))

    def labels(self, indices: np.ndarray) -> Tensor:
        return self.readers[0].labels(indices)

    def occurring_classes(self) -> list[int] | None:
        labels = self.readers[0].all_labels
        return None if labels is None else labels.unique().tolist()

    def check_tokenizer(self, model: ARImageModel) -> None:
        for reader in self.readers:
            if reader.tokenizer is not None and reader.tokenizer != tensors_sha256(model.tokenizer):
                raise UserError(
                    f"--codes: {reader.path} was made with other tokenizer weights than the model has; "
                    "pass those weights with --tokenizer-weights, or extract the codes again"
                )

    def notes(self) -> list[str]:
        return [
            f"{reader.path} does not record its tokenizer weights: whether they match is not checked"
            for reader in self.readers
            if reader.tokenizer is None
        ]

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(reader.fingerprint() for reader in self.readers).encode()).hexdigest()
