"""The sampler of both backbones: images by index.

Image i is a function of (seed, i, its class, the model, the options) alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cca.streams import CLASSES, TOKENS, stream
from models import DTYPES, ARImageModel, SamplingOptions, autocast
from models.decoding import generate_tokens, require_finite
from models.devices import DECODED_PIXELS


@dataclass(frozen=True)
class SampleRequest:
    """What is to be sampled; ``classes`` lists the classes in use, ``eval_size`` resizes (bicubic)."""

    num_samples: int
    classes: tuple[int, ...]
    class_order: str
    seed: int
    eval_size: int | None
    dtype: str
    sampling: SamplingOptions


def class_of(index: int, request: SampleRequest) -> int:
    """Class of image ``index``: in turn (balanced and interleaved), or drawn uniformly."""
    if request.class_order == "balanced":
        return request.classes[index % len(request.classes)]
    return request.classes[int(stream(request.seed, CLASSES, index).integers(len(request.classes)))]


def token_noise(index: int, length: int, seed: int) -> np.ndarray:
    """The uniform numbers [length] that decide the tokens of image ``index``."""
    return stream(seed, TOKENS, index).random(length)


def compile_blocks(model: ARImageModel) -> None:
    """torch.compile the transformer blocks, once for all lengths of the cache."""
    for block in model.transformer.transformer_blocks():
        block.compile(dynamic=True)


# Labels [n], uniforms [n, L] -> tokens [n, L], NOT_FINITE among them where logits were not.
Generate = Callable[[Tensor, Tensor], Tensor]


def eager_generate(model: ARImageModel, request: SampleRequest) -> Generate:
    def generate(labels: Tensor, uniforms: Tensor) -> Tensor:
        with autocast(labels.device, request.dtype):
            return generate_tokens(model, labels, uniforms, request.sampling)

    return generate


class GraphedGenerate:
    """All decoding steps of one batch as a single CUDA graph; a smaller batch is filled up.

    At these batch sizes launching the kernels takes longer than running them; a graph launches once.
    """

    def __init__(self, model: ARImageModel, request: SampleRequest, batch_size: int, device: torch.device):
        generate = eager_generate(model, request)
        self.labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(batch_size, model.sequence_length, dtype=torch.float64, device=device)
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            warm_up
        ):  # libraries set themselves up, and blocks compile, before the capture
            generate(self.labels, self.uniforms)
        torch.cuda.current_stream().wait_stream(warm_up)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.tokens = generate(self.labels, self.uniforms)

    def __call__(self, labels: Tensor, uniforms: Tensor) -> Tensor:
        rows = len(labels)
        self.labels[:rows].copy_(labels)
        self.uniforms[:rows].copy_(uniforms)
        self.graph.replay()
        return self.tokens[:rows].clone()


def sample_tokens(
    model: ARImageModel, indices: range, request: SampleRequest, device: torch.device, generate: Generate
) -> Tensor:
    """Tokens [n, L] of these indices, as one batch. Raises UserError where the logits are not finite."""
    labels = torch.tensor([class_of(i, request) for i in indices], device=device)
    noise = np.stack([token_noise(i, model.sequence_length, request.seed) for i in indices])
    tokens = generate(labels, torch.from_numpy(noise).to(device))
    return require_finite(tokens, DTYPES[request.dtype])


@torch.inference_mode()
def decode_tokens(model: ARImageModel, tokens: Tensor, request: SampleRequest) -> Tensor:
    """Tokens [n, L] -> uint8 images [n, H, W, 3] on the CPU.

    Decoding runs in batches of one fixed size, the last one filled up: convolutions round
    differently from one batch size to another, and a pixel must not.
    """
    size = max(1, min(64, DECODED_PIXELS[tokens.device.type] // model.image_size**2))
    images = []
    for part in tokens.split(size):
        full = torch.cat([part, part[:1].expand(size - len(part), -1)])
        with autocast(tokens.device, request.dtype if model.decodes_in_half_precision else "float32"):
            decoded = model.decode(full, request.eval_size)
        images.append(model.to_uint8(decoded[: len(part)]).permute(0, 2, 3, 1).cpu())
    return torch.cat(images)


def sample_images(
    model: ARImageModel,
    indices: range,
    request: SampleRequest,
    batch_size: int,
    device: torch.device,
    generate: Generate | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """uint8 images [n, H, W, 3] of these indices; ``progress`` hears of each finished batch."""
    generate, tokens = generate or eager_generate(model, request), []
    for start in range(indices.start, indices.stop, batch_size):
        batch = range(start, min(start + batch_size, indices.stop))
        tokens.append(sample_tokens(model, batch, request, device, generate))
        progress(len(batch))
    return decode_tokens(model, torch.cat(tokens), request)
