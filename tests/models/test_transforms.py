"""Crops of training images against those of torchvision, which the published trainers use."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as torchvision

from models.transforms import RandomCrop, TenCrops, centre_crop


@pytest.mark.parametrize("width, height, size", [(60, 47, 32), (33, 120, 17), (50, 50, 23), (301, 200, 64)])
def test_crops_match_torchvision(width, height, size):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image, generator = Image.fromarray(pixels), np.random.default_rng(1)
    resized = torchvision.resize(image, round(1.125 * size), torchvision.InterpolationMode.LANCZOS)
    top, left = (int(generator.integers(side - size + 1)) for side in (resized.height, resized.width))
    expected = torchvision.pil_to_tensor(torchvision.crop(resized, top, left, size, size))
    assert torch.equal(RandomCrop(size)(image, np.random.default_rng(1)), expected)
    crops = torchvision.ten_crop(centre_crop(image, int(1.1 * size)), size)
    expected = torch.stack([torchvision.pil_to_tensor(crop) for crop in crops])
    assert torch.equal(TenCrops(size)(image, generator), expected)
