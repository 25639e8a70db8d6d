"""The sampler of both backbones: images by index.

Image i is a function of (seed, i, its class, the model, the options) alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cca.sampling.compiled import ROUNDED_AS_EAGER
from cca.streams import CLASSES, TOKENS, stream
from models import DTYPES, ARImageModel, SamplingOptions, autocast
from models.decoding import generate_tokens, require_finite
from models.devices import DECODED_PIXELS, allow_tf32, full_parts


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


# Labels [n], uniforms [n, L] -> tokens [n, L], NOT_FINITE among them where logits were not.
Generate = Callable[[Tensor, Tensor], Tensor]


def eager_generate(model: ARImageModel, request: SampleRequest) -> Generate:
    def generate(labels: Tensor, uniforms: Tensor) -> Tensor:
        with autocast(labels.device, request.dtype):
            return generate_tokens(model, labels, uniforms, request.sampling)

    return generate


def sample_tokens(
    model: ARImageModel,
    indices: Sequence[int],
    request: SampleRequest,
    device: torch.device,
    generate: Generate,
) -> Tensor:
    """Tokens [n, L] of these indices, as one batch. Raises UserError where the logits are not finite."""
    labels = torch.tensor([class_of(i, request) for i in indices], device=device)
    noise = np.stack([token_noise(i, model.sequence_length, request.seed) for i in indices])
    tokens = generate(labels, torch.from_numpy(noise).to(device))
    return require_finite(tokens, DTYPES[request.dtype])


def prepare(model: ARImageModel, dtype: str, device: torch.device, compile: bool = False) -> None:
    """Put a model on the device for sampling alone: matrices in the run's precision, and on a GPU what
    its convolutions like, compiled if asked. Autocast gives the same numbers, at a cast for each use.
    """
    model.transformer.store_matrices(DTYPES[dtype])
    model.to(device)
    if device.type != "cuda":
        return
    allow_tf32(device)
    model.tokenizer.to(memory_format=torch.channels_last)
    for part in model.tokenizer.modules():
        if isinstance(part, nn.Conv2d) and model.decodes_in_half_precision:
            part.to(DTYPES[dtype])
    for child in model.tokenizer.children() if compile else ():
        child.compile(dynamic=False, options=ROUNDED_AS_EAGER)


def decoded_at_once(model: ARImageModel, device: torch.device) -> int:
    """Images of every batch of the tokenizer's decoder."""
    return max(1, min(64, DECODED_PIXELS[device.type] // model.image_size**2))


@torch.inference_mode()
def to_pixels(model: ARImageModel, tokens: Tensor, dtype: str, size: int | None = None) -> Tensor:
    """Tokens [n, L] -> uint8 images [n, H, W, 3] on the CPU, resized to side ``size`` if given.

    Decoding runs in batches of one fixed size, whatever n is; see ``full_parts``.
    """
    images = []
    for part, count in full_parts(tokens, decoded_at_once(model, tokens.device)):
        with autocast(tokens.device, dtype):
            decoded = model.decode(part, size)
        images.append(model.to_uint8(decoded[:count]).permute(0, 2, 3, 1).cpu())
    return torch.cat(images)


def decode_tokens(model: ARImageModel, tokens: Tensor, request: SampleRequest) -> Tensor:
    """``to_pixels`` as the request has it, in the precision of the published sampling."""
    dtype = request.dtype if model.decodes_in_half_precision else "float32"
    return to_pixels(model, tokens, dtype, request.eval_size)


def sample_images(
    model: ARImageModel, indices: range, request: SampleRequest, batch_size: int, device: torch.device
) -> Tensor:
    """uint8 images [n, H, W, 3] of these indices."""
    generate, tokens = eager_generate(model, request), []
    for start in range(0, len(indices), batch_size):
        tokens.append(sample_tokens(model, indices[start : start + batch_size], request, device, generate))
    return decode_tokens(model, torch.cat(tokens), request)
