"""From a photograph to the pixels that a model works on: crops of training, codes and references."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB; 16-bit grey is scaled by 1/257 and rounded.

    Raises ValueError for floating-point numbers, and for 32-bit grey outside 0 … 65,535.
    """
    if image.mode == "F":
        raise ValueError("floating-point grey; expected 8 or 16 bits")
    if image.mode.startswith("I"):  # the library's own conversion clips at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey levels from {grey.min()} to {grey.max()}; expected 0 … 65,535")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def check_sides(image: Image.Image, short: int) -> None:
    """Raise ValueError for a picture so long that it is too large once its short side is ``short``."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and short * short * max(image.size) > limit * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: too long for a short side of {short}")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: box-halve while the short side is at least 2 x size, bicubic to size, cut.

    Raises ValueError for a picture that is too long (``check_sides``).
    """
    check_sides(image, size)
    while min(image.size) >= 2 * size:  # box-halving keeps the bicubic step free of aliasing
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def square(image: Image.Image, left: int, top: int, size: int) -> Tensor:
    """Cut uint8 [3, size, size] out of an RGB image."""
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


class Transform(ABC):
    """An RGB photograph -> uint8 [3, size, size], or [crops, 3, size, size] where there are several."""

    crops: int = 1

    @abstractmethod
    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        """``generator`` is the image's own in this epoch; whatever is random is drawn from it alone."""


@dataclass(frozen=True)
class RandomCrop(Transform):
    """VAR's: shorter side to round(1.125 size) with Lanczos, random crop, no flip."""

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
    """LlamaGen's: ADM centre crop to crop_range x size, then four corners, the centre, and their mirrors."""

    size: int
    crop_range: float = 1.1
    crops = 10

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        image = centre_crop(image, int(self.size * self.crop_range))
        end = image.width - self.size
        places = ((0, 0), (end, 0), (0, end), (end, end), (round(end / 2), round(end / 2)))
        views = (image, ImageOps.mirror(image))
        return torch.stack([square(view, *place, self.size) for view in views for place in places])


class OneOfTenCrops(TenCrops):
    """One of them, drawn: what training on extracted codes sees of an image in one epoch."""

    crops = 1

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        return super().__call__(image, generator)[int(generator.integers(TenCrops.crops))]
