"""Image geometry that training data and references share."""

from PIL import Image


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: box-halve while the short side is at least 2 x size, bicubic to size, cut the centre."""
    while min(image.size) >= 2 * size:  # box-halving keeps the bicubic step free of aliasing
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
