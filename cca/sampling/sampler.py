"""The sampler of both backbones.

Image i depends only on the seed, i, its class, the model and the options.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor, nn

from cca.config import SampleRequest
from cca.random_streams import CLASSES, TOKENS, stream, uniform_numbers
from cca.sampling.cuda_graphs import ROUNDED_AS_EAGER, CompiledGenerate
from models import DTYPES, ARImageModel, autocast
from models.sampling import generate_tokens, require_finite
from models.utils.precision import (
    DECODED_PIXELS,
    DOES_NOT_FIT,
    TOO_MANY_IMAGES,
    allow_tf32,
    full_parts,
    oom_as_user_error,
)


def class_of(index: int, request: SampleRequest) -> int:
    """Return the class of image ``index``: the classes in turn (balanced), or sampled uniformly (random)."""
    if request.class_order == "balanced":
        return request.classes[index % len(request.classes)]
    return request.classes[int(stream(request.seed, CLASSES, index).integers(len(request.classes)))]


# (labels [n], uniforms [n, L]) -> tokens [n, L]; NOT_FINITE for images with non-finite logits.
Generate = Callable[[Tensor, Tensor], Tensor]


def eager_generate(model: ARImageModel, request: SampleRequest) -> Generate:
    """Return ``generate_tokens`` with the model and options of a request."""

    def generate(labels: Tensor, uniforms: Tensor) -> Tensor:
        with autocast(labels.device, request.dtype):
            return generate_tokens(model, labels, uniforms, request.sampling)

    return generate


def prepare(model: ARImageModel, dtype: str, device: torch.device, compile: bool = False) -> None:
    """Move a model to the device and prepare it for sampling only.

    Linear layers are stored in ``dtype``, with the same results as autocast. On a GPU so are the convolutions
    of decoders that were published in half precision. With ``compile``, the tokenizer gets the memory format
    channels_last, which is faster when compiled; eager normalisation would copy it.

    Raises:
        UserError: the model does not fit in GPU memory.
    """
    with oom_as_user_error(f"--model: the model {DOES_NOT_FIT}"):
        model.transformer.store_matrices(DTYPES[dtype])
        model.to(device)
        if device.type != "cuda":
            return
        allow_tf32(device)
        for part in model.tokenizer.modules():
            if isinstance(part, nn.Conv2d) and model.decodes_in_half_precision:
                part.to(DTYPES[dtype])
        if compile:
            model.transformer.join_matrices()
            model.tokenizer.to(memory_format=torch.channels_last)
            for child in model.tokenizer.children():
                child.compile(dynamic=False, options=ROUNDED_AS_EAGER)


def decoding_batch_size(model: ARImageModel, device: torch.device) -> int:
    """Return the number of images in every batch of the tokenizer's decoder."""
    return max(1, min(64, DECODED_PIXELS[device.type] // model.image_size**2))


@torch.inference_mode()
def to_pixels(model: ARImageModel, tokens: Tensor, dtype: str, size: int | None = None) -> np.ndarray:
    """Decode tokens [n, L] to uint8 images [n, H, W, 3], resized to ``size`` pixels if given.

    Decoding runs in batches of one fixed size, whatever n is; see ``full_parts``.
    """
    resolution = size or model.image_size
    images, done = torch.empty(len(tokens), resolution, resolution, 3, dtype=torch.uint8), 0
    for part, count in full_parts(tokens, decoding_batch_size(model, tokens.device)):
        with autocast(tokens.device, dtype):
            decoded = model.decode(part, size)
        images[done : done + count] = model.to_uint8(decoded[:count]).permute(0, 2, 3, 1)
        done += count
    return images.numpy()


class Sampler:
    """Sampler of the images of a request, by their indices. The model is already on ``device``.

    compile: decode with ``CompiledGenerate``.

    Raises:
        UserError: the model does not have one of the classes.
    """

    def __init__(
        self,
        model: ARImageModel,
        request: SampleRequest,
        batch_size: int,
        device: torch.device,
        compile: bool = False,
    ):
        request.check_classes(model.num_classes)
        self.model, self.request, self.batch_size, self.device = model, request, batch_size, device
        self.sequence_length = model.sequence_length
        self.batch_too_large = f"--batch-size: {batch_size} {TOO_MANY_IMAGES}"
        # Compiled decoding keeps the caches of a batch while the decoder runs.
        self.decoder_too_large = self.batch_too_large if compile else f"--model: decoding {DOES_NOT_FIT}"
        self.decoder_dtype = request.dtype if model.decodes_in_half_precision else "float32"
        self.generate = eager_generate(model, request)
        if compile:
            with oom_as_user_error(self.batch_too_large):
                self.generate = CompiledGenerate(model, request.sampling, request.dtype, batch_size, device)

    def tokens(self, indices: Sequence[int]) -> Tensor:
        """Sample the tokens [n, L] of n indices, at most the batch size.

        Raises:
            UserError: logits are not finite, or GPU memory runs out.
        """
        request = self.request
        labels = torch.tensor([class_of(i, request) for i in indices], device=self.device)
        noise = uniform_numbers(request.seed, TOKENS, indices, self.sequence_length)
        with oom_as_user_error(self.batch_too_large):
            tokens = self.generate(labels, torch.from_numpy(noise).to(self.device))
            return require_finite(tokens, DTYPES[request.dtype])

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Decode tokens [n, L] to uint8 images [n, H, W, 3]. Raises UserError if GPU memory runs out."""
        with oom_as_user_error(self.decoder_too_large):
            return to_pixels(self.model, tokens, self.decoder_dtype, self.request.eval_size)

    def images(self, ranges: Iterable[range]) -> Iterator[np.ndarray]:
        """Yield the uint8 images [n, H, W, 3] of these ranges of indices in order, in pieces of any length.

        An empty piece follows every batch of tokens, so that the caller may stop. No piece crosses the end of
        a range, and only at the end of a range is a batch of the decoder padded.
        """
        ranges, size = list(ranges), self.request.eval_size or self.model.image_size
        indices, at_once = chain.from_iterable(ranges), decoding_batch_size(self.model, self.device)
        tokens = torch.empty(0, self.sequence_length, dtype=torch.int64, device=self.device)
        for part in ranges:
            while part:
                ready = len(part) if len(tokens) >= len(part) else len(tokens) // at_once * at_once
                if ready:
                    yield self.decode(tokens[:ready])
                    tokens, part = tokens[ready:], part[ready:]
                else:
                    tokens = torch.cat([tokens, self.tokens(list(islice(indices, self.batch_size)))])
                    yield np.empty((0, size, size, 3), np.uint8)
