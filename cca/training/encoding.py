"""Encoding of images to tokens by a model's frozen tokenizer."""

import torch
from torch import Tensor

from models import ARImageModel
from models.utils.precision import ENCODED_PIXELS, full_parts, upload


def to_model_input(pixels: Tensor) -> Tensor:
    """Return uint8 [..., 3, H, W] as float32 in [-1, 1], rounded as torchvision's ToTensor and VAR do it."""
    return pixels.float().div_(255).mul_(2).sub_(1)


def encoding_batch_size(model: ARImageModel, device: torch.device) -> int:
    """Return the number of images to encode at a time, so that memory does not grow with the batch."""
    return max(1, ENCODED_PIXELS[device.type] // model.image_size**2)


def to_tokens(model: ARImageModel, images: Tensor, device: torch.device, alike: bool = False) -> Tensor:
    """Encode images uint8 [n, 3, H, W] to tokens [n, L] on the tokenizer's device, in batches that fit it.

    alike: use batches of one fixed size, so that an image's tokens do not depend on n; see ``full_parts``.
    """
    size = encoding_batch_size(model, device)
    parts = full_parts(images, size) if alike else ((part, len(part)) for part in images.split(size))
    with torch.inference_mode():
        tokens = [model.encode(to_model_input(upload(part, device)))[:count] for part, count in parts]
    return torch.cat(tokens)  # outside: inference tensors cannot be trained on
