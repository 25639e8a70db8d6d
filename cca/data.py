"""Training data: labelled image arrays and packed token codes."""

import json
import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cca.errors import UserError
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
        raise UserError(f"{path}: holds no array {error.args[0].split()[0]}; expected arr_0 (images) and arr_1 (labels)") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path}: not a readable .npz file") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        raise UserError(f"{path}: arr_0 is {images.dtype} {list(images.shape)} with {len(labels)} labels; expected uint8 [N, H, W, 3] or [N, H, W]")
    return images, labels


def to_model_input(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] or [N, H, W] -> float32 [N, 3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(images).float() / 127.5 - 1
    if pixels.ndim == 3:
        return pixels[:, None].expand(-1, 3, -1, -1).contiguous()
    return pixels.permute(0, 3, 1, 2).contiguous()


class TokenSource(Protocol):
    """What the trainer knows of a data set."""

    labels: Tensor  # int64 [N]

    def tokens(self, indices: np.ndarray, epoch: int) -> Tensor:
        """Tokens [n, L] int64 of these images in this epoch (a random crop depends on both)."""


class ImageTokens:
    """An image array, encoded by the model's frozen tokenizer as it is needed."""

    def __init__(self, path: str | Path, model: ARImageModel):
        self.images, labels = load_image_array(path)
        if self.images.shape[1:3] != (model.image_size, model.image_size):
            raise UserError(f"--data: {path} has images of {self.images.shape[1]} x {self.images.shape[2]}, the model takes {model.image_size} x {model.image_size}")
        self.labels, self.model = check_labels(torch.from_numpy(labels), model, path), model

    @torch.no_grad()
    def tokens(self, indices: np.ndarray, epoch: int) -> Tensor:
        images = to_model_input(self.images[indices])
        device = next(self.model.tokenizer.parameters()).device
        return self.model.encode(images.to(device))


class PackedCodes:
    """A folder that ``scripts/extract_codes.py`` wrote: memory-mapped tokens, labels, a header."""

    def __init__(self, path: str | Path, model: ARImageModel, seed: int = 0):
        path = Path(path)
        try:
            self.header = json.loads((path / "header.json").read_text())
            self.codes = np.load(path / "codes.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(path / "labels.npy", allow_pickle=False).astype(np.int64)
        except (OSError, ValueError) as error:
            raise UserError(f"--codes: {path} is not a folder of packed codes ({error}); scripts/extract_codes.py makes one") from None
        if self.codes.ndim != 3 or self.codes.shape[2] != model.sequence_length or self.header.get("vocab_size") != model.vocab_size:
            raise UserError(
                f"--codes: {path} holds {list(self.codes.shape)} codes of a vocabulary of {self.header.get('vocab_size')}, "
                f"the model takes {model.sequence_length} per image of {model.vocab_size}"
            )
        self.labels, self.seed = check_labels(torch.from_numpy(labels), model, path), seed

    def tokens(self, indices: np.ndarray, epoch: int) -> Tensor:
        crops = [int(stream(self.seed, CROPS, epoch, i).integers(self.codes.shape[1])) for i in indices]
        return torch.from_numpy(self.codes[indices, crops].astype(np.int64))


def check_labels(labels: Tensor, model: ARImageModel, path: str | Path) -> Tensor:
    if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < model.num_classes:
        raise UserError(f"{path}: labels must lie in 0 … {model.num_classes - 1}")
    return labels
