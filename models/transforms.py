"""Crops of photographs, for training, for extracted codes and for references."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8-bit RGB; 16-bit grey is scaled by 1/257 and rounded.

    Raises ValueError for floating-point grey, and for 32-bit grey outside 0 … 65,535.
    """
    if image.mode == "F":
        raise ValueError("floating-point grey levels; expected 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey levels from {grey.min()} to {grey.max()}; expected 0 … 65,535")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def check_sides(image: Image.Image, short: int) -> None:
    """Raise ValueError if the picture has too many pixels after resizing its short side to ``short``."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and short * short * max(image.size) > limit * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: too long for a short side of {short}")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Return ADM's centre crop [size x size]: box-halve, resize with bicubic interpolation, and crop.

    The picture is halved while its short side is at least 2 x size. Raises ValueError for a picture that is
    too long (see ``check_sides``).
    """
    check_sides(image, size)
    while min(image.size) >= 2 * size:  # halving first avoids aliasing in the bicubic step
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def square(image: Image.Image, left: int, top: int, size: int) -> Tensor:
    """Return a square crop of an RGB image, uint8 [3, size, size]."""
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


class Transform(ABC):
    """A map from an RGB photograph to uint8 [3, size, size], or [crops, 3, size, size] for several crops."""

    crops: int = 1

    @abstractmethod
    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        """Return the pixels. ``generator``, for this image and epoch, is the only source of randomness."""


@dataclass(frozen=True)
class RandomCrop(Transform):
    """VAR's transform: resize the short side to round(1.125 size) with Lanczos, crop at random, no flip."""

    size: int

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        short = round(1.125 * self.size)
        check_sides(image, short)
        width, height = (short * side // min(image.size) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        top, left = (int(generator.integers(side - self.size + 1)) for side in (height, width))
        return square(image, left, top, self.size)


@dataclass(frozen=True)
class TenCrops(Transform):
    """LlamaGen's transform: the ten crops of ADM's centre crop to crop_range x size.

    They are the four corners, the centre, and the mirror images of these five.
    """

    size: int
    crop_range: float = 1.1
    crops = 10

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        image = centre_crop(image, int(self.size * self.crop_range))
        end = image.width - self.size
        offsets = ((0, 0), (end, 0), (0, end), (end, end), (round(end / 2), round(end / 2)))
        views = (image, ImageOps.mirror(image))
        return torch.stack([square(view, *offset, self.size) for view in views for offset in offsets])


class OneOfTenCrops(TenCrops):
    """One of the ten crops, chosen at random. Training on extracted codes uses one per image and epoch."""

    crops = 1

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        return super().__call__(image, generator)[int(generator.integers(TenCrops.crops))]
