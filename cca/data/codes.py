"""Tokens extracted beforehand: packed codes, and the published folders of one file per image."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cca.data.classes import check_labels, class_folders
from cca.data.folders import fingerprint
from cca.data.sources import TokenSource
from cca.streams import CROPS, stream
from models import ARImageModel, UserError
from models.files import file_sha256, read_array, read_json
from models.weights import tensors_sha256

CHECKED_AT_ONCE = 4096  # images


class PackedCodes:
    """A folder that ``scripts/extract_codes.py`` wrote: memory-mapped uint16 tokens, labels, a header.

    Raises UserError for codes, labels or a header that do not fit each other or the model.
    """

    def __init__(self, path: Path, model: ARImageModel):
        self.path, self.model = path, model
        try:
            self.header = read_json(path / "header.json")
            self.classes = class_folders(self.header)
            self.codes = read_array(path / "codes.npy", "r")
            labels = read_array(path / "labels.npy")
        except UserError as error:
            raise UserError(
                f"--codes: {path} is not a folder of packed codes ({error}); "
                "scripts/extract_codes.py makes one"
            ) from None
        vocabulary = self.header.get("vocab_size")
        if (
            self.codes.dtype.kind not in "iu"
            or self.codes.ndim != 3
            or self.codes.shape[1] < 1
            or self.codes.shape[2] != model.sequence_length
            or vocabulary != model.vocab_size
        ):
            raise UserError(
                f"--codes: {path} holds {self.codes.dtype} codes {list(self.codes.shape)} "
                f"of a vocabulary of {vocabulary}, "
                f"the model takes {model.sequence_length} per image of {model.vocab_size}"
            )
        self.all_labels = check_labels(labels, model, f"--codes: {path}/labels.npy")
        if len(labels) != len(self.codes):
            raise UserError(
                f"--codes: {path} holds codes of {len(self.codes)} images and {len(labels)} labels"
            )
        for start in range(0, len(self.codes), CHECKED_AT_ONCE):
            part = self.codes[start : start + CHECKED_AT_ONCE]
            if part.min() < 0 or part.max() >= model.vocab_size:
                raise UserError(
                    f"--codes: {path}/codes.npy holds codes from {part.min()} to {part.max()}, "
                    f"the vocabulary is 0 … {model.vocab_size - 1}; extract them again"
                )

    def __len__(self) -> int:
        return len(self.codes)

    def crops(self, index: int) -> np.ndarray:
        """All crops of an image [crops, L]."""
        return self.codes[index]

    def labels(self, indices: np.ndarray) -> Tensor:
        return self.all_labels[torch.from_numpy(indices)]

    def check_tokenizer(self) -> None:
        own = self.header.get("tokenizer_tensors_sha256")
        if own is not None and own != tensors_sha256(self.model.tokenizer):
            raise UserError(
                f"--codes: {self.path} was made with other tokenizer weights than the model has; "
                "give those with --tokenizer-weights, or extract the codes again"
            )

    def notes(self) -> list[str]:
        if "tokenizer_tensors_sha256" in self.header:
            return []
        return [
            f"{self.path}/header.json does not tell the tokenizer's weights: that they fit is not checked"
        ]

    def fingerprint(self) -> str:
        return file_sha256(self.path / "codes.npy") + file_sha256(self.path / "labels.npy")


class NpyCodes:
    """The published layout: ``imagenet384_codes/N.npy`` [1, 10, L] and ``imagenet384_labels/N.npy`` [1]."""

    classes: dict[str, int] | None = None

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
        if not (self.labels_folder / f"{self.size - 1}.npy").exists():
            raise UserError(
                f"--codes: {self.labels_folder} does not hold a label for each of {self.size} codes"
            )

    def __len__(self) -> int:
        return self.size

    def crops(self, index: int) -> np.ndarray:
        codes = self._read(self.codes_folder / f"{index}.npy")
        if codes.dtype.kind not in "iu" or codes.ndim < 1 or codes.size == 0:
            raise UserError(
                f"--codes: {self.codes_folder}/{index}.npy holds {codes.dtype} {list(codes.shape)}; "
                f"expected whole numbers [1, 10, {self.model.sequence_length}]"
            )
        if (
            codes.shape[-1] != self.model.sequence_length
            or codes.min() < 0
            or codes.max() >= self.model.vocab_size
        ):
            raise UserError(
                f"--codes: {self.codes_folder}/{index}.npy holds {list(codes.shape)} codes "
                f"up to {codes.max()}, "
                f"the model takes {self.model.sequence_length} per image of {self.model.vocab_size}"
            )
        return codes.reshape(-1, self.model.sequence_length)

    def labels(self, indices: np.ndarray) -> Tensor:
        values = [self._read(self.labels_folder / f"{i}.npy") for i in indices]
        wrong = next((i for i, value in zip(indices, values) if value.size != 1), None)
        if wrong is not None:
            raise UserError(f"--codes: {self.labels_folder}/{wrong}.npy does not hold one label")
        return check_labels(np.array([value.item() for value in values]), self.model, self.labels_folder)

    def check_tokenizer(self) -> None:
        pass  # nothing tells whose codes they are

    def notes(self) -> list[str]:
        return []

    def fingerprint(self) -> str:
        self._read_odd_ones()
        folders = (self.codes_folder, self.labels_folder)
        files = [f"{folder.name}/{name}" for folder in folders for name in sorted(os.listdir(folder))]
        return fingerprint(self.codes_folder.parent, files)

    def _read_odd_ones(self) -> None:
        """Read the files of another size than the first: what was cut off is found before the work."""
        for folder, read in (
            (self.codes_folder, self.crops),
            (self.labels_folder, lambda index: self.labels(np.array([index]))),
        ):
            with os.scandir(folder) as entries:
                sizes = {entry.name: entry.stat().st_size for entry in entries}
            for index in range(self.size):
                if index == 0 or sizes.get(f"{index}.npy") != sizes["0.npy"]:
                    read(index)

    def _read(self, path: Path) -> np.ndarray:
        try:
            return read_array(path)
        except UserError as error:
            raise UserError(f"--codes: {error}") from None


class Codes(TokenSource):
    """Tokens extracted beforehand; one of the crops of an image is drawn each time.

    A sister folder whose name has ``_105`` after it (crops of range 1.05) is drawn half of the time.
    """

    def __init__(self, path: Path, model: ARImageModel, seed: int = 0):
        kind = NpyCodes if (path / f"imagenet{model.image_size}_codes").is_dir() else PackedCodes
        sister = Path(f"{os.path.abspath(path)}_105")
        self.readers = [kind(folder, model) for folder in (path, sister) if folder == path or folder.is_dir()]
        self.seed, self.classes = seed, self.readers[0].classes
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

    def check_tokenizer(self) -> None:
        for reader in self.readers:
            reader.check_tokenizer()

    def notes(self) -> list[str]:
        return [note for reader in self.readers for note in reader.notes()]

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(reader.fingerprint() for reader in self.readers).encode()).hexdigest()
