"""Images that are all black, for what does not depend on them."""

import torch
from torch import Tensor

from cca.data.sources import LabelledDataset
from models import ARImageModel


class Blank(LabelledDataset):
    """In so many crops as extraction makes of a photograph."""

    def __init__(self, model: ARImageModel, images: int, crops: int = 1):
        self.all_labels, self.size, self.crops = torch.arange(images), model.image_size, crops

    def item(self, epoch: int, index: int) -> Tensor:
        return torch.zeros(self.crops, 3, self.size, self.size, dtype=torch.uint8)
