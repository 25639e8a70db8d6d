"""Models with random weights, a training batch, roofline limits of the work, and the speed of this device.

The bytes are those that cannot stay in a cache between steps: weights, keys and values, inputs and outputs of
convolutions. The FLOPs are those of matmuls and convolutions. Each gives the shortest possible time of a
batch. If that time is nearly all of the measured time, nothing can be gained.
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

# Per parameter and step, in float32: the parameter, two moments and the gradient are read and written.
OPTIMIZER_BYTES = 4 * (3 * 2 + 2)


def random_model(
    name: str, device: torch.device, image_size: int | None = None, tokenizer: str | None = None
) -> ARImageModel:
    """Return a model of the zoo with random weights (none is zero) and a frozen tokenizer."""
    torch.manual_seed(0)
    model = build_model(name, image_size, tokenizer, device=str(device)).to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.tokenizer.requires_grad_(False)
    return model.eval()


def recipe_config(name: str, batch_size: int, dtype: str, **changes) -> TrainingConfig:
    """Return the configuration of CCA with the model's recipe and a constant learning rate."""
    recipe = ZOO[name].recipes["cca"]
    config = TrainingConfig(
        loss="cca", beta=recipe.beta, lambda_=recipe.lambda_, uncond_ratio=0.1, batch_size=batch_size,
        lr=recipe.lr, weight_decay=0.05, final_weight_decay=None, grad_clip=recipe.grad_clip, warmup=0.0,
        final_lr=1.0, schedule_accumulation=1, max_steps=1000, ema=0.0, seed=0, dtype=dtype,
    )  # fmt: skip
    return replace(config, **changes)


def random_batch(model: ARImageModel, uncond: Tensor) -> Batch:
    """Return a batch of random tokens; ``uncond`` (bool [B]) marks images trained without their class."""
    tokens = torch.randint(0, model.vocab_size, (len(uncond), model.sequence_length))
    labels = torch.arange(len(uncond)) % model.num_classes
    return Batch(tokens, *pair_labels(labels, uncond, model.null_class), uncond)


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of one call, including the wait for the GPU."""
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
    """Measured rates of a device.

    bandwidth: bytes/s of copies.
    half, single: FLOP/s of matmuls in bfloat16, and in float32, which a GPU rounds to TF32.
    """

    bandwidth: float
    half: float
    single: float

    def shares(self, works: Sequence[Work], seconds: float) -> tuple[float, float]:
        """Return the shortest possible times, by bytes and by FLOPs, as shares of ``seconds``."""
        copy_seconds = sum(work.bytes for work in works) / self.bandwidth
        rates = [self.single if work.dtype == torch.float32 else self.half for work in works]
        return copy_seconds / seconds, sum(work.flops / rate for work, rate in zip(works, rates)) / seconds


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    size = 8192 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    product = torch.empty_like(matrix)
    seconds = min(timed(lambda: torch.mm(matrix, matrix, out=product)) for _ in range(10))
    return 2 * size**3 / seconds


def measure_card(device: torch.device) -> Card:
    """Measure the rates of copies of 4 GB and of matmuls of 8192 x 8192; on a CPU both are smaller."""
    allow_tf32(device)
    source = torch.ones(2**30 if device.type == "cuda" else 2**22, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source)) for _ in range(10))
    rates = (_matmul_rate(dtype, device) for dtype in (torch.bfloat16, torch.float32))
    return Card(2 * source.nbytes / seconds, *rates)


def _linears(model: ARImageModel) -> tuple[list[Tensor], list[Tensor]]:
    """Return (weights of linear layers that run on every token, those that run once per image)."""
    net = model.transformer
    per_token, per_image = [net.output_layer().weight], []
    for name, layer in net.transformer_blocks().named_modules():
        if isinstance(layer, nn.Linear):
            once = any(part in name for part in net.once_per_image)
            (per_image if once else per_token).append(layer.weight)
    return per_token, per_image


def _elements(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def sampling_work(
    model: ARImageModel, images: int, options: SamplingOptions, dtype: torch.dtype = torch.bfloat16
) -> Work:
    """Return the work of sampling the tokens of a batch: every step reads the stored weights and the cache.

    dtype: the precision of the matmuls and of the cache.
    """
    per_token, per_image = _linears(model)
    steps = len(model.step_sizes)
    width = model.transformer.output_layer().in_features * len(model.transformer.transformer_blocks())
    guided = max((i + 1 for i in range(steps) if options.scale_at(i, steps) != 1), default=0)
    weights = sum(tensor.nbytes for tensor in per_token)
    read = sum(tensor.nbytes for tensor in per_image)
    flops, context = 2 * images * (2 if guided else 1) * _elements(per_image), 0
    for step, new in enumerate(model.step_sizes):
        entries = images * 2 if step < guided else images
        context += new  # the number of tokens that the new ones attend to
        read += weights + entries * 2 * width * context * dtype.itemsize
        flops += entries * new * (2 * _elements(per_token) + 4 * width * context)
    return Work(read, flops, dtype)


def training_work(model: ARImageModel, images: int, micro_batches: int, dtype: torch.dtype) -> Work:
    """Return the work of an optimizer step of a loss with a reference model.

    Each image has two sequences. The backward pass of the trained model counts as two forward passes. The
    bytes do not include activations, which may be recomputed.
    """
    per_token, per_image = _linears(model)
    parameters = sum(p.numel() for p in model.transformer.parameters())
    read = 3 * micro_batches * dtype.itemsize * (_elements(per_token) + _elements(per_image))
    flops = 2 * images * (1 + 3) * model.forward_flops()
    return Work(read + OPTIMIZER_BYTES * parameters, flops, dtype)


def tokenizer_work(name: str, tokenizer: str | None, encode: bool, images: int, dtype: torch.dtype) -> Work:
    """Return the work of encoding or decoding a batch; a convolution reads and writes its tensors once."""
    sizes = []  # for each convolution: elements of inputs and outputs, elements of weights

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
    activations, weights = map(sum, zip(*sizes))
    return Work(dtype.itemsize * (images * activations + weights), images * counter.get_total_flops(), dtype)
