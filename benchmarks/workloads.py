"""Models of random weights, a batch to train on, the least that batches take, and how fast this device is.

The limits are roofline limits: bytes are those that cannot stay in a cache between steps (weights, keys and
values, the inputs and outputs of convolutions), FLOPs those of matmuls and convolutions. They are the times
that a batch would take if all else were free: a share of one of them near 1 leaves nothing to gain.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cca.config import TrainingConfig
from cca.losses import pair_labels
from cca.training.batch import Batch
from models import ZOO, ARImageModel, SamplingOptions
from models.utils.precision import allow_tf32
from models.zoo.loading import build_model

# Of a parameter in an optimizer step, float32: it and two moments read and written, the gradient too.
OPTIMIZER_BYTES = 4 * (3 * 2 + 2)


def random_model(
    name: str, device: torch.device, image_size: int | None = None, tokenizer: str | None = None
) -> ARImageModel:
    """A model of the zoo on the device, its tokenizer frozen; no weight is zero, so all of it counts."""
    torch.manual_seed(0)
    model = build_model(name, image_size, tokenizer, device=str(device)).to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.tokenizer.requires_grad_(False)
    return model.eval()


def recipe_config(name: str, batch_size: int, dtype: str, **changes) -> TrainingConfig:
    """CCA as the model's recipe says, at a constant rate."""
    recipe = ZOO[name].recipes["cca"]
    config = TrainingConfig(
        loss="cca", beta=recipe.beta, lambda_=recipe.lambda_, uncond_ratio=0.1, batch_size=batch_size,
        lr=recipe.lr, weight_decay=0.05, final_weight_decay=None, grad_clip=recipe.grad_clip, warmup=0.0,
        final_lr=1.0, schedule_accumulation=1, max_steps=1000, ema=0.0, seed=0, dtype=dtype,
    )  # fmt: skip
    return replace(config, **changes)


def random_batch(model: ARImageModel, uncond: Tensor) -> Batch:
    """Random tokens; ``uncond``: which of the images are trained without their class, bool [B]."""
    tokens = torch.randint(0, model.vocab_size, (len(uncond), model.sequence_length))
    labels = torch.arange(len(uncond)) % model.num_classes
    return Batch(tokens, *pair_labels(labels, uncond, model.null_class), uncond)


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call; the wait for a GPU is included."""
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Work:
    """Bytes and FLOPs of one batch, and the precision of its matmuls."""

    bytes: float
    flops: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Card:
    """Measured rates of a device: bytes/s of copying, FLOP/s of matmuls in bfloat16 and in float32, which
    a GPU rounds to TF32."""

    bandwidth: float
    half: float
    single: float

    def shares(self, works: Sequence[Work], seconds: float) -> tuple[float, float]:
        """The least time of all by bytes and by FLOPs, over the time that they took."""
        moving = sum(work.bytes for work in works) / self.bandwidth
        rates = [self.single if work.dtype == torch.float32 else self.half for work in works]
        return moving / seconds, sum(work.flops / rate for work, rate in zip(works, rates)) / seconds


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    size = 8192 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    product = torch.empty_like(matrix)
    seconds = min(timed(lambda: torch.mm(matrix, matrix, out=product)) for _ in range(10))
    return 2 * size**3 / seconds


def measure_card(device: torch.device) -> Card:
    """Rates of copying 4 GB and of matmuls of 8192 x 8192; of smaller ones on a CPU."""
    allow_tf32(device)
    source = torch.ones(2**30 if device.type == "cuda" else 2**22, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copying = min(timed(lambda: target.copy_(source)) for _ in range(10))
    rates = (_matmul_rate(dtype, device) for dtype in (torch.bfloat16, torch.float32))
    return Card(2 * source.nbytes / copying, *rates)


def _linears(model: ARImageModel) -> tuple[list[Tensor], list[Tensor]]:
    """Weights that see every token, and those that run once for an image."""
    net = model.transformer
    of_token, of_image = [net.output_layer().weight], []
    for name, layer in net.transformer_blocks().named_modules():
        if isinstance(layer, nn.Linear):
            once = any(part in name for part in net.once_per_image)
            (of_image if once else of_token).append(layer.weight)
    return of_token, of_image


def _elements(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def sampling_work(
    model: ARImageModel, images: int, options: SamplingOptions, dtype: torch.dtype = torch.bfloat16
) -> Work:
    """Tokens of a batch: every step reads the weights, as they are stored, and what the cache holds.

    dtype: the precision of the matmuls and of the cache.
    """
    of_token, of_image = _linears(model)
    steps = len(model.step_sizes)
    width = model.transformer.output_layer().in_features * len(model.transformer.transformer_blocks())
    guided = max((i + 1 for i in range(steps) if options.scale_at(i, steps) != 1), default=0)
    weights = sum(tensor.nbytes for tensor in of_token)
    read = sum(tensor.nbytes for tensor in of_image)
    flops, seen = 2 * images * (2 if guided else 1) * _elements(of_image), 0
    for step, new in enumerate(model.step_sizes):
        entries = images * 2 if step < guided else images
        seen += new  # tokens that the new ones attend to
        read += weights + entries * 2 * width * seen * dtype.itemsize
        flops += entries * new * (2 * _elements(of_token) + 4 * width * seen)
    return Work(read, flops, dtype)


def training_work(model: ARImageModel, images: int, micro_batches: int, dtype: torch.dtype) -> Work:
    """An optimizer step of a loss with a reference: two sequences per image, the policy's backward pass
    twice a forward pass. Activations, which may be computed again, are not among the bytes."""
    of_token, of_image = _linears(model)
    parameters = sum(p.numel() for p in model.transformer.parameters())
    read = 3 * micro_batches * dtype.itemsize * (_elements(of_token) + _elements(of_image))
    flops = 2 * images * (1 + 3) * model.forward_flops()
    return Work(read + OPTIMIZER_BYTES * parameters, flops, dtype)


def tokenizer_work(name: str, tokenizer: str | None, encode: bool, images: int, dtype: torch.dtype) -> Work:
    """Pixels to tokens or back, of that model of the zoo; every convolution reads and writes once."""
    sizes = []  # of each convolution: inputs and outputs, weights

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append((inputs[0].numel() + output.numel(), layer.weight.numel()))

    model = build_model(name, tokenizer=tokenizer).to("meta")
    for layer in model.tokenizer.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if encode:
            model.encode(torch.zeros(1, 3, model.image_size, model.image_size, device="meta"))
        else:
            model.decode(torch.zeros(1, model.sequence_length, dtype=torch.int64, device="meta"))
    moved, weights = map(sum, zip(*sizes))
    return Work(dtype.itemsize * (images * moved + weights), images * counter.get_total_flops(), dtype)
