"""Images that are all black, for what does not depend on them."""

import numpy as np
import torch
from torch import Tensor

from cca.data.sources import LabelledImages
from models import ARImageModel


class Blank(LabelledImages):
    """In so many crops as extraction makes of a photograph."""

    def __init__(self, model: ARImageModel, images: int, crops: int = 1):
        super().__init__(model, np.arange(images), "blank")
        self.crops = crops

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        size = self.model.image_size
        return torch.zeros(self.crops, 3, size, size, dtype=torch.uint8), -1
