"""Make everything in ``assets/`` again, from Fashion-MNIST and a seed.

    python -m scripts.pretrain_mini data --raw /usr/share/datasets/fashion-mnist
    python -m scripts.pretrain_mini networks --raw ...
    python -m scripts.pretrain_mini tokenizer --model var-mini --raw ...
    python -m scripts.pretrain_mini transformer --model var-mini --raw ...
    python -m scripts.pretrain_mini decoder --model var-mini --raw ...
    python -m scripts.pretrain_mini cca --model var-mini --run runs/quickstart/var-mini-cca

``--raw`` is a folder with the four ``*-ubyte.gz`` files (Debian: package dataset-fashion-mnist).
Training images 0 to 49,999 train every network; 50,000 to 59,999 are for tuning. The 10,000 test images are
the evaluation reference, and no stage trains on them.
"""

import gzip
import math
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from cca.cli.main import run_command
from cca.cli.output import Output
from cca.cli.parser import Parser, count
from cca.config import TrainingConfig
from cca.data.datasets import LabelledDataset
from cca.data.image_sets import to_uint8_tensor
from cca.distributed import Ranks
from cca.evaluation.features import MINI_WEIGHTS, FeatureNetwork
from cca.progress import ProgressBar
from cca.training.encoding import to_model_input
from cca.training.loader import Loader
from cca.training.loop import train
from cca.training.run_folder import RunFolder
from cca.training.trainer import Trainer
from models import ARImageModel, UserError, load_model
from models.sampling import sample_tokens
from models.zoo.checkpoint_formats import is_constant, load_weights, save_safetensors
from models.zoo.hub import ASSETS
from models.zoo.loading import build_model

MODELS = ("llamagen-mini", "var-mini")
RAW = Path("/usr/share/datasets/fashion-mnist")  # folder of Debian's package
TRAINING, BUNDLED_TRAINING = slice(0, 50_000), slice(0, 10_000)
PERCEPTUAL_WEIGHTS = Path("runs/perceptual.safetensors")
STEPS = {"tokenizer": 3600, "transformer": 4000, "decoder": 1500}  # default optimizer steps
TRANSFORMER_LR = 3e-3
RESAMPLED_LEVELS = 2  # at most so many of VAR's last levels come from the transformer in decoder training


def read_raw(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images, padded to [N, 32, 32] uint8, and labels [N] int64 of split "train" or "t10k"."""
    try:
        images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())[8:]
    except FileNotFoundError as error:
        raise UserError(
            f"--raw: {error.filename} is missing; Debian's package dataset-fashion-mnist has it"
        ) from None
    pixels = np.frombuffer(images, np.uint8).reshape(-1, 28, 28)
    return np.pad(pixels, ((0, 0), (2, 2), (2, 2))), np.frombuffer(labels, np.uint8).astype(np.int64)


def write_images(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write an .npz that NumPy reads. LZMA makes it 15 % smaller than NumPy's own compression."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in (("arr_0", images), ("arr_1", labels)):
            member = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_LZMA
            with archive.open(member, "w") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array))


def fit(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor, int], Tensor],
    steps: int,
    batch: int,
    lr: float,
    name: str,
) -> None:
    """Train with AdamW on random batches of training images.

    The learning rate rises over the first 2 % of the steps, then falls along a cosine. ``loss`` takes the
    indices [batch] of a batch and the number of the step, which starts at 1.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    warm = max(steps // 50, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(i - warm, 0) / (steps - warm))),
    )
    bar = ProgressBar(range(steps), desc=name)
    for step in bar:
        place = step % (TRAINING.stop // batch)  # number of the batch in its epoch
        if place == 0:
            order = torch.randperm(TRAINING.stop)
        value = loss(order[place * batch : (place + 1) * batch], step + 1)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")


class PerceptualNetwork(nn.Module):
    """A classifier for the tokenizers' perceptual loss; its architecture is not that of the scoring one."""

    def __init__(self):
        super().__init__()
        widths = (1, 24, 48, 64, 80, 128)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, stride=1 + i % 2, padding=1, bias=False), nn.BatchNorm2d(b), nn.GELU()
            )
            for i, (a, b) in enumerate(zip(widths, widths[1:]))
        )
        self.classifier = nn.Linear(widths[-1], 10)

    def activations(self, images: Tensor) -> list[Tensor]:
        x, out = images.mean(1, keepdim=True), []
        for stage in self.stages:
            x = stage(x)
            out.append(x)
        return out

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.activations(images)[-1].mean((2, 3))
        return features, self.classifier(features)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the squared distance of two batches [B, 3, 32, 32], in two terms.

        The terms compare channel-normalised activations (as in LPIPS, arXiv 1801.03924) and pooled features.
        """
        with torch.no_grad():
            target = self.activations(b)
        source = self.activations(a)
        local = sum(
            (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()
            for x, y in zip(source, target)
        )
        return local + 3 * (source[-1].mean((2, 3)) - target[-1].mean((2, 3))).square().mean()


def augment(images: Tensor) -> Tensor:
    """Return a batch [B, 3, 32, 32] shifted by up to two pixels and perhaps mirrored, all images alike."""
    dy, dx = torch.randint(-2, 3, (2,)).tolist()
    images = images.roll((dy, dx), dims=(2, 3))
    return images.flip(3) if torch.rand(()) < 0.5 else images


def train_classifier(network: nn.Module, images: Tensor, labels: Tensor, epochs: int, name: str) -> nn.Module:
    """Train a classifier, and return it frozen, in evaluation mode."""

    def loss(index: Tensor, step: int) -> Tensor:
        return F.cross_entropy(network(augment(images[index]))[1], labels[index], label_smoothing=0.05)

    fit(network.train().parameters(), loss, epochs * TRAINING.stop // 128, 128, 2e-3, name)
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    batches = zip(images.split(500), labels.split(500))
    return sum((network(x)[1].argmax(1) == y).sum().item() for x, y in batches) / len(labels)


def is_multi_scale(model: ARImageModel) -> bool:
    """Return whether tokens are codes of residuals (VAR), not of the latents themselves (LlamaGen)."""
    return max(model.step_sizes) > 1


def straight_through(model: ARImageModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reconstruction, with a straight-through gradient, and the quantisation loss.

    The loss is equation 3 of van den Oord et al., 2017 (arXiv 1711.00937), averaged over the scales.
    """
    tokenizer: Any = model.tokenizer
    z = tokenizer.latents(images).float()
    if is_multi_scale(model):
        sums = tokenizer.quantize.partial_sums(tokenizer.quantize.quantise(z.detach()))
    else:
        z = F.normalize(z, dim=1)
        codes = F.embedding(tokenizer.quantise(z.detach()), tokenizer.quantize.vectors())
        sums = [codes.transpose(1, 2).unflatten(2, z.shape[2:])]
    losses = [
        (total - z.detach()).square().mean() + 0.25 * (total.detach() - z).square().mean() for total in sums
    ]
    return tokenizer.decode_latents(z + (sums[-1] - z).detach()), sum(losses) / len(sums)


@torch.no_grad()
def flat_latents(model: ARImageModel, images: Tensor) -> Tensor:
    """Return all latents of images, [n, code_dim]."""
    return model.tokenizer.latents(images).permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def start_codebook(model: ARImageModel, images: Tensor) -> None:
    """Set the codes to latents of real images, so that each code is in use at the first step."""
    latents = flat_latents(model, images)
    codes = latents[torch.randperm(len(latents))[: model.vocab_size]]
    if is_multi_scale(model):  # residuals shrink from level to level
        codes = codes * torch.logspace(0, -1, len(codes))[:, None]
    model.tokenizer.quantize.embedding.weight.copy_(codes)


@torch.no_grad()
def revive_codes(model: ARImageModel, used: Tensor, images: Tensor) -> int:
    """Replace the codes that no recent image used, and return their number.

    used: how often each code was used, [vocab_size]. With one scale, latents of these images replace the
    codes; with several scales, other codes with noise do.
    """
    weight = model.tokenizer.quantize.embedding.weight
    dead = (used == 0).nonzero().flatten()
    if is_multi_scale(model):
        source = weight[used.multinomial(max(len(dead), 1), replacement=True)]
        source = source * (1 + 0.1 * torch.randn_like(source))
    else:
        source = flat_latents(model, images)
    weight[dead] = source[torch.randperm(len(source))[: len(dead)]]
    return len(dead)


def load_perceptual() -> PerceptualNetwork:
    if not PERCEPTUAL_WEIGHTS.exists():
        raise UserError(f"{PERCEPTUAL_WEIGHTS}: no such file; run the stage networks first")
    network = PerceptualNetwork()
    network.load_state_dict(load_file(PERCEPTUAL_WEIGHTS))
    return network.eval().requires_grad_(False)


def pixel_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean() + (a - b).square().mean()


@torch.no_grad()
def encode_all(model: ARImageModel, images: Tensor) -> Tensor:
    return torch.cat([model.encode(part) for part in ProgressBar(images.split(250), desc="encoding")])


def train_tokenizer(name: str, images: Tensor, steps: int) -> ARImageModel:
    """Train a tokenizer from random weights, and return its model."""
    perceptual, model = load_perceptual(), build_model(name, device="cpu")
    for module in model.tokenizer.train().modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    start_codebook(model, images[:256])
    used = torch.zeros(model.vocab_size)

    def loss(index: Tensor, step: int) -> Tensor:
        batch = images[index]
        if step % 20 == 0:
            used.add_(torch.bincount(model.encode(batch).flatten(), minlength=model.vocab_size))
        if step % 100 == 0 and step < 0.7 * steps:
            dead = revive_codes(model, used, batch)
            tqdm.write(f"{name}: step {step}, {dead} unused codes moved")
            used.zero_()
        with torch.autocast("cpu", torch.bfloat16):
            reconstruction, quantisation = straight_through(model, batch)
            perceptual_loss = perceptual.distance(reconstruction, batch).float()
        return pixel_distance(reconstruction, batch) + perceptual_loss + quantisation

    fit(model.tokenizer.parameters(), loss, steps, 32, 1.5e-3, f"{name} tokenizer")
    return model.eval()


@torch.no_grad()
def resample_last_levels(model: ARImageModel, tokens: Tensor, labels: Tensor, levels: int) -> Tensor:
    """Return tokens [B, L] whose last ``levels`` are sampled again from the model, in order."""
    tokens, sizes = tokens.clone(), model.step_sizes
    for step in range(len(sizes) - levels, len(sizes)):
        span = slice(sum(sizes[:step]), sum(sizes[: step + 1]))
        tokens[:, span] = sample_tokens(
            model.logits(labels, tokens)[:, span], torch.rand(len(tokens), sizes[step])
        )
    return tokens


def train_decoder(name: str, images: Tensor, labels: Tensor, steps: int) -> ARImageModel:
    """Fine-tune VAR's decoder on noisy tokens, and return the model.

    VAR samples the tokens of a level independently of each other. Here up to RESAMPLED_LEVELS of the last
    levels come from the trained transformer, and the others from the image to be reconstructed (similar to
    RobustTok, arXiv 2503.08354). Encoder and codebook do not change, so all tokens stay valid.
    """
    perceptual, model = load_perceptual(), load_model(name)
    tokens = encode_all(model, images)
    model.tokenizer.decoder.compile()
    parts = nn.ModuleList([model.tokenizer.decoder, model.tokenizer.post_quant_conv]).requires_grad_(True)

    def loss(index: Tensor, step: int) -> Tensor:
        batch, levels = images[index], int(torch.randint(RESAMPLED_LEVELS + 1, ()))
        with torch.autocast("cpu", torch.bfloat16):
            noisy_tokens = resample_last_levels(model, tokens[index], labels[index], levels)
        with torch.no_grad():
            latents = model.tokenizer.quantize.partial_sums(noisy_tokens)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            reconstruction = model.tokenizer.decode_latents(latents)
            perceptual_loss = perceptual.distance(reconstruction, batch).float()
        return pixel_distance(reconstruction.float(), batch) + perceptual_loss

    fit(parts.parameters(), loss, steps, 32, 7e-4, f"{name} decoder")
    return model


class TokenArray(LabelledDataset):
    """The tokens of all training images, in memory."""

    def __init__(self, model: ARImageModel, images: Tensor, labels: Tensor):
        self.all_labels, self.tokens = labels, encode_all(model, images)

    def item(self, epoch: int, index: int) -> Tensor:
        return self.tokens[index]


def train_transformer(name: str, images: Tensor, labels: Tensor, steps: int, seed: int) -> ARImageModel:
    """Train a transformer from random weights, and return its model. Raises UserError if a signal stops it.

    The loss is maximum likelihood with 10 % label dropout: the trainer's ``sft``.
    """
    model = build_model(name, device="cpu")
    load_weights(model.tokenizer, ASSETS / f"{name}-tokenizer.safetensors", f"the tokenizer of {name}")
    model.tokenizer.requires_grad_(False)
    model.transformer.init_weights()
    config = TrainingConfig(
        loss="sft", beta=1.0, lambda_=0.0, uncond_ratio=0.1, batch_size=64, lr=TRANSFORMER_LR, warmup=0.02,
        final_lr=0.01, weight_decay=0.05, final_weight_decay=None, grad_clip=1.0, schedule_accumulation=1,
        max_steps=steps, ema=0.0, seed=seed, dtype="bfloat16",
    )  # fmt: skip
    ranks = Ranks()
    output = Output.run(Path(f"runs/pretrain-{name}-{seed}"), model.checkpoint_name)
    options = {**config.options(), "model": name}
    output.check(output.look(), options)
    output.begin({"options": options})
    folder = RunFolder(output.path, ranks, options)
    trainer = Trainer(model, config, config.batch_size, ranks, compile=True)
    loader = Loader(TokenArray(model, images, labels), config, ranks, model.null_class)
    if not train(trainer, loader, folder, save_every=500, log_every=20):  # a signal stopped it
        raise UserError("pretraining was stopped; run the same command again to resume")
    return model


def save(path: Path, module: nn.Module, key: str = "") -> None:
    """Write a half-precision .safetensors without constant buffers. The base model is what this rounds to."""
    weights = {k: v for k, v in module.state_dict().items() if not is_constant(k)}
    save_safetensors({k: v.half() if v.is_floating_point() else v for k, v in weights.items()}, path, key)


@torch.no_grad()
def save_tokenizer(name: str, model: ARImageModel) -> None:
    """Average the decoder's three output channels, then save: reconstructions become exactly grey.

    The training images are grey, so this cannot increase the pixel losses.
    """
    for parameter in model.tokenizer.decoder.conv_out.parameters():
        parameter.copy_(parameter.mean(0, keepdim=True).expand_as(parameter))
    save(ASSETS / f"{name}-tokenizer.safetensors", model.tokenizer, model.checkpoint_key)


def make_parser() -> Parser:
    parser = Parser(__doc__, "scripts.pretrain_mini")
    add = parser.group("model").add_argument
    add("--model", choices=MODELS, help="model name (required for all stages except data and networks)")
    add(
        "--run",
        type=Path,
        metavar="RUN",
        help="run folder whose weights are bundled (required for stage cca)",
    )

    add = parser.group("data").add_argument
    add("--raw", type=Path, default=RAW, help="folder with the four *-ubyte.gz files (default: %(default)s)")

    add = parser.group("method").add_argument
    add(
        "stage", choices=("data", "networks", *STEPS, "cca"), help="what to make; the examples show the order"
    )

    add = parser.group("optimisation").add_argument
    steps = ", ".join(f"{stage} {number}" for stage, number in STEPS.items())
    add("--steps", type=count(2), help=f"optimizer steps (default: {steps})")
    add("--seed", type=count(0), default=0, help="random seed of weights and data order (default: 0)")

    add = parser.group("performance").add_argument
    add("--threads", type=count(), default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")

    add = parser.group("output").add_argument
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write in stage transformer (default: assets/MODEL.safetensors)",
    )
    return parser


def train_networks(raw: Path, images: Tensor, labels: Tensor, seed: int) -> None:
    """Train and save the two classifiers, and print their accuracies on the test images."""
    test_images, test_labels = read_raw(raw, "t10k")
    PERCEPTUAL_WEIGHTS.parent.mkdir(exist_ok=True)
    for build, path in ((PerceptualNetwork, PERCEPTUAL_WEIGHTS), (FeatureNetwork, MINI_WEIGHTS)):
        torch.manual_seed(seed)
        network = build()
        train_classifier(network, images, labels, 8, path.stem)
        save(path, network)
        share = accuracy(network, to_model_input(to_uint8_tensor(test_images)), torch.from_numpy(test_labels))
        print(f"{path.stem}: accuracy {share:.4f} on the test images")


def main() -> None:
    args = make_parser().parse_args()
    if args.stage not in ("data", "networks") and not args.model:
        raise UserError(f"--model: is required for stage {args.stage}, one of {', '.join(MODELS)}")
    if args.stage == "cca":
        if not args.run:
            raise UserError(
                "--run: is required for stage cca: the folder of the run whose weights are bundled"
            )
        model = load_model(args.model, str(args.run))
        save(ASSETS / f"{args.model}-cca.safetensors", model.transformer, model.checkpoint_key)
        return
    if args.stage == "decoder" and not is_multi_scale(build_model(args.model)):
        raise UserError(
            f"--model: stage decoder needs a model with several tokens per step, and {args.model} samples "
            "one at a time"
        )
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    raw_images, raw_labels = read_raw(args.raw, "train")
    if args.stage == "data":
        write_images(
            ASSETS / "fashion-mnist-train-10k.npz", raw_images[BUNDLED_TRAINING], raw_labels[BUNDLED_TRAINING]
        )
        write_images(ASSETS / "fashion-mnist-test-10k.npz", *read_raw(args.raw, "t10k"))
        return
    images = to_model_input(to_uint8_tensor(raw_images[TRAINING]))
    labels = torch.from_numpy(raw_labels[TRAINING])
    if args.stage == "networks":
        train_networks(args.raw, images, labels, args.seed)
        return
    steps = args.steps or STEPS[args.stage]
    if args.stage == "transformer":
        model = train_transformer(args.model, images, labels, steps, args.seed)
        path = args.output or ASSETS / f"{args.model}.safetensors"
        save(path, model.transformer, model.checkpoint_key)
    elif args.stage == "tokenizer":
        save_tokenizer(args.model, train_tokenizer(args.model, images, steps))
    else:
        save_tokenizer(args.model, train_decoder(args.model, images, labels, steps))


if __name__ == "__main__":
    run_command(main)
