"""The bundled feature network, as a torch-fidelity feature extractor named ``mini``."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor

MINI_WEIGHTS = Path(__file__).parent.parent / "assets" / "features-mini.safetensors"


class FeatureNetwork(nn.Module):
    """A small classifier of grey 32 x 32 images; its pooled activations are the features."""

    widths = (32, 64, 96)

    def __init__(self, num_classes: int = 10):
        super().__init__()
        stages, width = [], 1
        for out in self.widths:
            for stride, wide in ((2, width), (1, out)):
                stages += [nn.Conv2d(wide, out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        self.body = nn.Sequential(*stages)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, 32, 32] in [-1, 1] -> features [B, 96] >= 0, class logits [B, 10]."""
        features = self.body(images.mean(1, keepdim=True)).mean((2, 3))
        return features, self.classifier(features)


class MiniFeatures(FeatureExtractorBase):
    """Features "96" and "logits" of uint8 images [B, 3, 32, 32], for torch-fidelity's metrics."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_):
        super().__init__(name, features_list)
        self.network = FeatureNetwork()
        self.network.load_state_dict(load_file(feature_extractor_weights_path or MINI_WEIGHTS))
        self.eval().requires_grad_(False)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "96", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "96"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features, logits = self.network(images.float() / 127.5 - 1)
        values = {"96": features, "logits": logits}
        return tuple(values[name] for name in self.features_list)


register_feature_extractor("mini", MiniFeatures)
