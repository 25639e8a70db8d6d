"""What `python -m benchmarks.gpu` measures: its rows, and what each of them runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import limits
from benchmarks.limits import Work
from cca.distributed import Processes
from cca.sampling.compiled import CompiledGenerate
from cca.sampling.sampler import (
    Generate,
    SampleRequest,
    decode_tokens,
    eager_generate,
    prepare,
    sample_tokens,
)
from cca.training.batch import Batch
from cca.training.encoding import to_tokens
from cca.training.losses import pair_labels
from cca.training.schedule import TrainingConfig
from cca.training.trainer import Trainer, make_optimizer, shard
from models import DTYPES, ZOO, ARImageModel, SamplingOptions
from models.loading import build_model


@dataclass(frozen=True)
class Row:
    """``kind``: sample, train, decode or encode; ``images`` at once, in training per micro-batch."""

    name: str
    kind: str
    model: str
    images: int
    tokenizer: str | None = None
    guided: bool = False
    compiled: bool = False
    fsdp: bool = False
    rounds: int = 20  # timed at most


def rows(small: bool) -> list[Row]:
    """All rows in the order in which they run; those that compile, which takes longest, come last."""
    found = []
    sampled = ("llamagen-b", "llamagen-xl", "var-d16", "var-d30")
    for compiled in (False, True):
        for model in ("llamagen-mini", "var-mini") if small else sampled:
            for guided in (False, True):
                way = f"{'guided' if guided else 'free'}-{'compiled' if compiled else 'eager'}"
                images = 2 if small else 64
                found.append(
                    Row(f"sample-{model}-{way}", "sample", model, images, guided=guided, compiled=compiled)
                )
    trained = ("llamagen-mini", "var-mini") if small else ("llamagen-l", "var-d16")
    images = 2 if small else 16
    training = [Row(f"train-{model}", "train", model, images) for model in trained]
    training.append(Row(f"train-{trained[0]}-fsdp", "train", trained[0], images, fsdp=True))
    training += [Row(f"train-{model}-compiled", "train", model, images, compiled=True) for model in trained]
    tokenizers = (  # with so many images that the decoder's batches are full
        {"llamagen": ("llamagen-mini", None, 2), "var": ("var-mini", None, 2)}
        if small
        else {
            "llamagen-384": ("llamagen-b", None, 56),
            "llamagen-384-finer": ("llamagen-b", "vq_ds8_c2i", 56),
            "var-256": ("var-d16", None, 64),
            "var-512": ("var-d36", None, 32),
        }
    )
    coding = [
        Row(f"{kind}-{name}", kind, model, images, tokenizer)
        for kind in ("decode", "encode")
        for name, (model, tokenizer, images) in tokenizers.items()
    ]
    for name in ("llamagen", "var") if small else ("llamagen-384", "var-256"):
        model, tokenizer, images = tokenizers[name]
        coding.append(Row(f"decode-{name}-compiled", "decode", model, images, tokenizer, compiled=True))
    ordered = sorted([*training, *found, *coding], key=lambda row: row.compiled)
    return [replace(row, rounds=1) for row in ordered] if small else ordered


def generator(model: ARImageModel, request: SampleRequest, row: Row, device: torch.device) -> Generate:
    """How tokens are made: the only place that knows of the compile switch."""
    prepare(model, request.dtype, device, row.compiled)
    if row.compiled:
        return CompiledGenerate(model, request.sampling, request.dtype, row.images, device)
    return eager_generate(model, request)


@dataclass(frozen=True)
class Prepared:
    """What a row runs, which may leave work queued, of how many images, and what they need at least."""

    run: Callable[[], object]
    images: int
    work: Work


def random_model(row: Row, device: torch.device) -> ARImageModel:
    model = build_model(row.model, tokenizer=row.tokenizer, device=str(device)).to(device)
    model.transformer.init_weights()
    model.tokenizer.requires_grad_(False)
    return model.eval()


def precision(row: Row, device: torch.device) -> str:
    return ZOO[row.model].recipes["cca"].dtype if device.type == "cuda" else "float32"


def request_of(row: Row, model: ARImageModel, device: torch.device) -> SampleRequest:
    """With the settings of the published samples, guided or not."""
    settings, options = ZOO[row.model].published, SamplingOptions(2.0)
    if settings:
        options = SamplingOptions(settings.cfg_scale, top_k=settings.top_k, top_p=settings.top_p)
    scale = options.cfg_scale if row.guided else 1.0
    options = replace(options, cfg_scale=scale, cfg_schedule=model.default_cfg_schedule)
    size = settings.eval_size if settings else None
    classes = tuple(range(model.num_classes))
    return SampleRequest(row.images, classes, "balanced", 0, size, precision(row, device), options)


def sampling(row: Row, device: torch.device) -> Prepared:
    model = random_model(row, device)
    request = request_of(row, model, device)
    generate = generator(model, request, row, device)
    work = limits.sampling(model, row.images, request.sampling, DTYPES[request.dtype].itemsize)

    def run() -> Tensor:
        return sample_tokens(model, range(row.images), request, device, generate)

    return Prepared(run, row.images, work)


def split(trainer: Trainer, processes: Processes) -> None:
    """What the trainer does with --parallel fsdp, which it leaves out where there is one process."""
    if not dist.is_initialized():
        backend = "nccl" if processes.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    trainer.sharded = True
    for net in filter(None, (trainer.net, trainer.reference)):
        shard(net, processes, DTYPES[trainer.config.dtype])
    trainer.optimizer = make_optimizer(trainer.model, trainer.config)


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


def training(row: Row, device: torch.device) -> Prepared:
    """An optimizer step of CCA on two micro-batches."""
    model, images = random_model(row, device), 2 * row.images
    config = recipe_config(row.model, images, precision(row, device))
    processes = Processes()
    trainer = Trainer(model, config, row.images, processes, compile=row.compiled)
    if row.fsdp:
        split(trainer, processes)
    batch = random_batch(model, torch.zeros(images, dtype=torch.bool))
    work = limits.training(model, images, micro_batches=2)
    return Prepared(lambda: trainer.optimizer_step(0, batch), images, work)


def decoding(row: Row, device: torch.device) -> Prepared:
    model = random_model(row, device)
    request = request_of(row, model, device)
    tokens = torch.randint(0, model.vocab_size, (row.images, model.sequence_length), device=device)
    prepare(model, request.dtype, device, row.compiled)
    dtype = DTYPES[request.dtype if model.decodes_in_half_precision else "float32"]
    work = limits.tokenizer(row.model, row.tokenizer, False, row.images, dtype.itemsize)
    return Prepared(lambda: decode_tokens(model, tokens, request), row.images, work)


def encoding(row: Row, device: torch.device) -> Prepared:
    model = random_model(row, device)
    shape = (row.images, 3, model.image_size, model.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    work = limits.tokenizer(row.model, row.tokenizer, True, row.images, torch.float32.itemsize)
    return Prepared(lambda: to_tokens(model, pixels, device), row.images, work)


KINDS = {"sample": sampling, "train": training, "decode": decoding, "encode": encoding}
