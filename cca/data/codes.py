"""Tokens extracted beforehand: packed codes, and the published folders of one file per image."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cca.data.sources import TokenSource, check_labels
from cca.streams import CROPS, stream
from models import ARImageModel, UserError


class PackedCodes:
    """A folder that ``scripts/extract_codes.py`` wrote: memory-mapped uint16 tokens, labels, a header."""

    def __init__(self, path: Path, model: ARImageModel):
        try:
            self.header = json.loads((path / "header.json").read_text())
            self.codes = np.load(path / "codes.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(path / "labels.npy", allow_pickle=False).astype(np.int64)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--codes: {path} is not a folder of packed codes ({error}); "
                "scripts/extract_codes.py makes one"
            ) from None
        if (
            self.codes.ndim != 3
            or self.codes.shape[2] != model.sequence_length
            or self.header.get("vocab_size") != model.vocab_size
        ):
            raise UserError(
                f"--codes: {path} holds {list(self.codes.shape)} codes "
                f"of a vocabulary of {self.header.get('vocab_size')}, "
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
                f"--codes: {self.codes_folder}/{index}.npy holds {list(codes.shape)} codes "
                f"up to {codes.max()}, "
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
