"""What a GPU must at least read and compute for a batch, from a model's sizes, and how fast this one is.

Bytes are those that cannot stay in a cache between steps: weights, keys and values, the inputs and outputs of
convolutions. FLOPs are those of the products. The limits are what a batch would take if all else were
free: a share of one of them near 1 leaves nothing to gain.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pretended.gpu import fake_model
from models import ARImageModel, SamplingOptions

# Linear layers that see a class, once per image; all others of the blocks see every token.
OF_THE_CLASS = ("ada_lin",)
HALF = 2  # bytes of a number under autocast
# Of a parameter in an optimizer step, float32: it and two moments read and written, the gradient too.
OPTIMIZER_BYTES = 4 * (3 * 2 + 2)


@dataclass(frozen=True)
class Work:
    """Of one batch."""

    bytes: float
    flops: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Card:
    """bandwidth: bytes/s; rate: FLOP/s of bfloat16 products (float32 on a CPU)."""

    bandwidth: float
    rate: float

    def shares(self, work: Work, seconds: float) -> tuple[float, float]:
        """The least time by bytes and by FLOPs, over the time that it took."""
        return work.bytes / self.bandwidth / seconds, work.flops / self.rate / seconds


def _fastest(run: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    found = []
    for _ in range(rounds):
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        found.append(time.perf_counter() - began)
    return min(found)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_card(device: torch.device) -> Card:
    """A copy of 4 GB and a product of 8192 x 8192 matrices; small ones on a CPU."""
    gpu = device.type == "cuda"
    source = torch.ones(2**30 if gpu else 2**22, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copying = _fastest(lambda: target.copy_(source), device)
    size = 8192 if gpu else 512
    matrix = torch.ones(size, size, dtype=torch.bfloat16 if gpu else torch.float32, device=device)
    product = torch.empty_like(matrix)
    multiplying = _fastest(lambda: torch.mm(matrix, matrix, out=product), device)
    return Card(2 * source.nbytes / copying, 2 * size**3 / multiplying)


def _linears(model: ARImageModel) -> tuple[list[Tensor], list[Tensor]]:
    """Weights that see every token, and those that see the class."""
    layers = [
        (name, layer.weight)
        for name, layer in model.transformer.transformer_blocks().named_modules()
        if isinstance(layer, nn.Linear)
    ]
    of_class = [weight for name, weight in layers if any(part in name for part in OF_THE_CLASS)]
    of_token = [weight for name, weight in layers if not any(part in name for part in OF_THE_CLASS)]
    return [*of_token, model.transformer.output_layer().weight], of_class


def _numbers(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _attended(model: ARImageModel) -> list[tuple[int, int]]:
    """New tokens of each decoding step, and those that they attend to."""
    sizes = model.step_sizes
    return [(size, sum(sizes[: step + 1])) for step, size in enumerate(sizes)]


def _width(model: ARImageModel) -> int:
    """Of all layers together."""
    return model.transformer.output_layer().in_features * len(model.transformer.transformer_blocks())


def sampling(model: ARImageModel, images: int, options: SamplingOptions, cache_bytes: int = HALF) -> Work:
    """Tokens of a batch: every step reads the weights, as they are stored, and what the cache holds."""
    of_token, of_class = _linears(model)
    steps, width = _attended(model), _width(model)
    guided = [i + 1 for i in range(len(steps)) if options.scale_at(i, len(steps)) != 1]
    rows = images * 2 if guided else images
    total = Work(_nbytes(of_class), 2 * rows * _numbers(of_class))
    for step, (new, seen) in enumerate(steps):
        rows = images * 2 if step < max(guided, default=0) else images
        total += Work(
            _nbytes(of_token) + rows * 2 * width * seen * cache_bytes,
            rows * new * (2 * _numbers(of_token) + 4 * width * seen),
        )
    return total


def training(model: ARImageModel, images: int, micro_batches: int) -> Work:
    """An optimizer step of a loss with a reference: two rows per image, the policy's backward pass twice a
    forward pass. Activations, which may be computed again, are not among the bytes."""
    of_token, of_class = _linears(model)
    forward = 2 * model.sequence_length * _numbers(of_token) + 2 * _numbers(of_class)
    forward += 4 * _width(model) * sum(new * seen for new, seen in _attended(model))
    parameters = sum(p.numel() for p in model.transformer.parameters())
    read = 3 * micro_batches * HALF * (_numbers(of_token) + _numbers(of_class))
    return Work(read + OPTIMIZER_BYTES * parameters, 2 * images * (1 + 3) * forward)


def tokenizer(name: str, tokenizer: str | None, encode: bool, images: int, number_bytes: int) -> Work:
    """Pixels to tokens or back, of that model of the zoo; every convolution reads and writes once."""
    moved, weights = 0, 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved, weights
        moved += inputs[0].numel() + output.numel()
        weights += layer.weight.numel()

    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    with shapes, torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = fake_model(name, tokenizer=tokenizer)
        for layer in model.tokenizer.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(count)
        if encode:
            model.encode(torch.zeros(1, 3, model.image_size, model.image_size))
        else:
            model.decode(torch.zeros(1, model.sequence_length, dtype=torch.int64))
    return Work(number_bytes * (images * moved + weights), images * counter.get_total_flops())
