"""Grids of samples as PNG files."""

import functools
import unicodedata
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models.utils.files import atomic_write

MISSING = "\U0010ffff"  # a character that no font has


@functools.cache
def caption_font() -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which has most alphabets (Pillow's font has ASCII alone)."""
    # The file comes with matplotlib, which takes long to import.
    return ImageFont.truetype(
        str(distribution("matplotlib").locate_file("matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf")), 10
    )


def draw_grid(
    images: np.ndarray,
    columns: int,
    captions: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
) -> Image.Image:
    """Return a grid of uint8 images [n, H, W, 3] in rows of ``columns``, with captions if given.

    If the font lacks a character of a caption, "class" and the image's number in ``classes`` replace it.
    """
    height, width = images.shape[1:3]
    scale = max(1, 96 // width)  # enlarges small images by a whole number
    cell, strip = (width * scale, height * scale), 14 if captions else 0
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell[0] + 2), rows * (cell[1] + strip + 2)), "white")
    draw, font = ImageDraw.Draw(sheet), caption_font()
    missing = bytes(font.getmask(MISSING))
    for i, image in enumerate(images):
        left, top = i % columns * (cell[0] + 2), i // columns * (cell[1] + strip + 2)
        sheet.paste(Image.fromarray(image).resize(cell, Image.Resampling.NEAREST), (left, top))
        if captions:
            name = unicodedata.normalize("NFC", captions[i])
            if classes and any(bytes(font.getmask(character)) == missing for character in name):
                name = f"class {classes[i]}"
            while font.getlength(name) > cell[0] and len(name) > 1:
                name = name[:-2] + "…"
            draw.text((left + 1, top + cell[1]), name, "black", font)
    return sheet


def write_grid(
    images: np.ndarray,
    path: Path,
    columns: int,
    captions: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
) -> None:
    """Write the grid of ``draw_grid`` as a PNG. Raises UserError if it cannot be written."""
    sheet = draw_grid(images, columns, captions, classes)
    atomic_write(path, lambda temporary: sheet.save(temporary, format="PNG"))


def side_by_side(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    """Return a picture with all panels (title, picture) in a row, each under its title."""
    gap, strip = 24, 32
    width = sum(picture.width for _, picture in panels) + gap * (len(panels) + 1)
    sheet = Image.new("RGB", (width, max(picture.height for _, picture in panels) + strip + gap), "white")
    draw, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(size=16), gap
    for title, picture in panels:
        draw.text((left, 6), title, "black", font)
        sheet.paste(picture, (left, strip))
        left += picture.width + gap
    return sheet
