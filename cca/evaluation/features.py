"""Feature extractors for the evaluator: those of torch-fidelity, and a small one registered with it."""

import functools
import io
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from cca.cli.parser import Parser, add_workers_option, count
from cca.distributed import Ranks
from models import UserError
from models.utils.precision import (
    DOES_NOT_FIT,
    EXTRACTED_IMAGES,
    TOO_MANY_IMAGES,
    exact_matmuls,
    oom_as_user_error,
)
from models.zoo.checkpoint_formats import not_finite, read_state_dict, tensors_sha256
from models.zoo.hub import ASSETS, Download

MINI_WEIGHTS = ASSETS / "features-mini.safetensors"
INCEPTION = "inception-v3-compat"
INCEPTION_BYTES = 95_000_000  # approximate size of its weights file


class FeatureNetwork(nn.Module):
    """A small classifier of grey 32 x 32 images; its pooled activations are the features."""

    widths = (32, 64, 96)

    def __init__(self, num_classes: int = 10):
        super().__init__()
        stages = []
        for before, out in zip((1, *self.widths), self.widths):
            for stride, width in ((2, before), (1, out)):
                stages += [
                    nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(out),
                    nn.ReLU(),
                ]
        self.body = nn.Sequential(*stages)
        self.classifier = nn.Linear(self.widths[-1], num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, 96] >= 0 and class logits [B, 10] of images [B, 3, 32, 32] in [-1, 1]."""
        features = self.body(images.mean(1, keepdim=True)).mean((2, 3))
        return features, self.classifier(features)


class MiniFeatures(FeatureExtractorBase):
    """torch-fidelity extractor of "96" and "logits" from uint8 images [B, 3, H, W], resized to 32 x 32."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **_
    ):
        super().__init__(name, features_list)
        self.network = FeatureNetwork()
        self.network.load_state_dict(load_file(feature_extractor_weights_path or MINI_WEIGHTS))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "96", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "96"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pixels = F.interpolate(images.float() / 127.5 - 1, (32, 32), mode="area")
        values = dict(zip(self.get_provided_features_list(), self.network(pixels)))
        return tuple(values[name] for name in self.features_list)


register_feature_extractor("mini", MiniFeatures)


class Features(NamedTuple):
    """Features of N images: pooled [N, D], spatial [N, S] or None, class probabilities [N, C]."""

    pooled: Tensor
    spatial: Tensor | None
    probabilities: Tensor


class Extractor:
    """A network that computes all features for the metrics in one forward pass.

    Only Inception has ``spatial`` features (for sFID; Nash et al., 2021, arXiv 2103.03841): the first 7
    channels of the 1 x 1 branch of Mixed_6d, 17 x 17, flattened channels last to 2023 values as in
    guided-diffusion's evaluator.

    Args:
        name: "inception", "mini", another extractor of torch-fidelity, or a path of Inception weights.
        inception_weights: a file of Inception weights; None uses torch-fidelity's.

    Raises UserError for an unknown name, and for missing or damaged weights.
    """

    def __init__(self, name: str, inception_weights: Path | None, device: torch.device):
        self.name, weights = resolve_features(name, inception_weights)
        self.device = device
        kind = FEATURE_EXTRACTORS_REGISTRY[self.name]
        self.layer = kind.get_default_feature_layer_for_metric("fid")
        self.logits_layer = kind.get_default_feature_layer_for_metric("isc")
        layers = dict.fromkeys((self.layer, self.logits_layer))  # some networks use one layer for both
        self.module = build_network(self.name, list(layers), weights)
        with oom_as_user_error(f"--features: {self.name} {DOES_NOT_FIT}"):
            self.module.to(device)
        self.is_inception = self.name == INCEPTION
        if self.is_inception:
            self.module.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of images uint8 [B, 3, H, W], on the CPU, computed without TF32.

        Raise UserError if GPU memory runs out.
        """
        with oom_as_user_error(f"--batch-size: {len(images)} {TOO_MANY_IMAGES}"), exact_matmuls():
            outputs = self.module.convert_features_tuple_to_dict(self.module(images.to(self.device)))
        return Features(
            pooled=outputs[self.layer].float().cpu(),
            spatial=self.spatial.float().cpu() if self.is_inception else None,
            probabilities=outputs[self.logits_layer].softmax(-1).cpu(),
        )

    @functools.cached_property
    def weights_sha256(self) -> str:
        """The SHA-256 of all parameters and buffers; it does not depend on the format of the file."""
        return tensors_sha256(self.module)


def build_network(name: str, layers: list[str], inception_weights: Path | None) -> Any:
    """Return torch-fidelity's network that outputs these layers. Raise UserError if it has no weights."""
    copy = read_inception_weights(inception_weights) if inception_weights else None
    try:
        return create_feature_extractor(
            name, layers, cuda=False, verbose=False, feature_extractor_weights_path=copy
        )
    except Exception as error:  # downloading and unpickling raise many kinds of errors
        reason = " ".join(str(error).split())[:100]
    if inception_weights:
        raise UserError(
            f"--inception-weights: {inception_weights} does not hold "
            f"torch-fidelity's Inception weights ({reason})"
        )
    raise UserError(
        f"--features: the weights of {name} are not in the cache and cannot be downloaded ({reason}); "
        f"you can download Inception's from {URL_INCEPTION_V3} and pass them with --inception-weights"
    )


def read_inception_weights(path: Path) -> io.BytesIO:
    """Return a file in memory with only the tensors of ``path``: torch-fidelity unpickles what it loads.

    Raise UserError for damaged weights.
    """
    weights = read_state_dict(path)
    if wrong := not_finite(weights):
        raise UserError(f"{path}: holds weights that are not finite: {wrong}")
    file = io.BytesIO()
    torch.save(weights, file)
    file.seek(0)
    return file


def add_features_options(parser: Parser) -> None:
    """Add the options of commands that extract features: the network, its weights and the batch size."""
    add = parser.group("method").add_argument
    add(
        "--features",
        default="inception",
        metavar="inception|mini|NAME|PATH",
        help="feature extractor: inception, mini, another name of torch-fidelity, or a file of Inception "
        "weights (default: inception)",
    )
    add(
        "--inception-weights",
        type=Path,
        metavar="PATH",
        help="file of torch-fidelity's Inception weights (default: its cache, or a download)",
    )
    parser.group("performance").add_argument(
        "--batch-size",
        type=count(),
        default=EXTRACTED_IMAGES,
        help="images per forward pass and rank (default: %(default)s)",
    )
    add_workers_option(parser)


def make_extractor(features: str, inception_weights: Path | None, ranks: Ranks) -> Extractor:
    """Return the extractor on this rank's device; see ``Extractor``. Raise UserError if it cannot be built.

    On each node one rank builds it first and downloads the weights. The other ranks build it after that.
    """
    extractors: list[Extractor] = []

    def build(is_first: bool) -> None:
        if (ranks.local_rank == 0) == is_first:
            extractors.append(Extractor(features, inception_weights, ranks.device))

    ranks.run_or_abort_all(partial(build, True))
    ranks.run_or_abort_all(partial(build, False))
    return extractors[0]


def resolve_features(name: str, inception_weights: Path | None) -> tuple[str, Path | None]:
    """Return torch-fidelity's name of an extractor and the user's weights. Raise UserError."""
    if inception_weights and name != "inception":
        raise UserError(f"--inception-weights: needs --features inception, not {name}")
    name = INCEPTION if name == "inception" else name
    if name not in FEATURE_EXTRACTORS_REGISTRY and Path(name).exists():
        name, inception_weights = INCEPTION, Path(name)
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        raise UserError(
            f"--features: {name!r} is neither a file of Inception weights nor one of inception, "
            f"{', '.join(sorted(FEATURE_EXTRACTORS_REGISTRY))}"
        )
    if inception_weights and not inception_weights.exists():
        raise UserError(f"--inception-weights: {inception_weights}: no such file")
    return name, inception_weights


def features_plan(name: str, inception_weights: Path | None) -> tuple[str, list[Download]]:
    """Return the plan's text on an extractor, and its downloads. Raise UserError if it is invalid."""
    name, weights = resolve_features(name, inception_weights)
    if name != INCEPTION:
        return name, []
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if weights or cached.exists():
        return f"{name}, {weights or cached}", []
    return f"{name}, to be downloaded", [
        Download(URL_INCEPTION_V3, INCEPTION_BYTES, cached.parent, "--inception-weights")
    ]
