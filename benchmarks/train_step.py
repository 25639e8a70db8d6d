"""One training step, side by side with the plain way.

    python -m benchmarks.train_step --model llamagen-b --image-size 384 --micro-batch-size 2
    python -m benchmarks.train_step --model var-d16 --micro-batch-size 2

The plain way: whole logits, log_softmax, gather, for policy and reference. Random weights of the
full size. Each way runs in a process of its own; peaks are above what was held before. "loss
part" is the output layer and the likelihoods alone, of random hidden states: the reference's
forward pass, then the policy's with its backward pass, positives and negatives.
"""

import json
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor

from benchmarks.load_memory import memory
from cca.distributed import Processes
from cca.training.batch import Batch
from cca.training.losses import pair_labels
from cca.training.schedule import TrainingConfig
from cca.training.trainer import Trainer
from models.base import ARTransformer
from models.errors import run_command
from models.loading import build_model
from models.logprob import linear_sequence_logprob
from models.options import Parser, count
from models.tables import markdown_table
from models.zoo import ZOO

CHILD = "from benchmarks import train_step; train_step.{}({!r}, {!r}, {!r}, {!r}, {!r})"
WAYS = ("plain", "chunked")


def plain_logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(1)


def plain_forward(self: ARTransformer, labels: Tensor, inputs: Tensor, tokens: Tensor) -> Tensor:
    """The published way: all logits at once, in float32."""
    return plain_logprob(self.logits(labels, inputs), tokens)


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM starts again from the resident size of now


def peak_and_base() -> tuple[int, int]:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    return memory("VmHWM"), memory("VmRSS")


def measure(name: str, image_size: int | None, way: str, micro_batch: int, rounds: int) -> None:
    """Run in a fresh process: peak bytes above the start of a step, and seconds, as JSON."""
    if way == "plain":
        ARTransformer.forward = plain_forward
    model = build_model(name, image_size, device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.tokenizer.requires_grad_(False)
    recipe = ZOO[name].recipes["cca"]
    config = TrainingConfig(
        loss="cca", beta=recipe.beta, lambda_=recipe.lambda_, uncond_ratio=0.1, batch_size=micro_batch,
        lr=recipe.lr, weight_decay=0.05, final_weight_decay=None, grad_clip=recipe.grad_clip, warmup=0.0,
        final_lr=1.0, schedule_accumulation=1, max_steps=rounds + 1, ema=0.0, seed=0,
        dtype=recipe.dtype if torch.cuda.is_available() else "float32",
    )  # fmt: skip
    trainer = Trainer(model, config, micro_batch, Processes())
    tokens = torch.randint(0, model.vocab_size, (micro_batch, model.sequence_length))
    uncond = torch.zeros(micro_batch, dtype=torch.bool)
    batch = Batch(tokens, *pair_labels(torch.arange(micro_batch), uncond, model.null_class), uncond)
    seconds, peaks = [], []
    for step in range(rounds + 1):
        reset_peak()
        base = peak_and_base()[1]
        began = time.perf_counter()
        trainer.optimizer_step(step, batch)
        seconds.append(time.perf_counter() - began)
        peaks.append(peak_and_base()[0] - base)
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "peak": statistics.median(peaks[1:])}))


def measure_loss_part(name: str, image_size: int | None, way: str, micro_batch: int, rounds: int) -> None:
    """As ``measure``, of the loss part alone; the first run counts for memory, later ones for time."""
    model, device = build_model(name, image_size), Processes().device
    layer = model.transformer.output_layer().to_empty(device=device).requires_grad_(True)
    hidden = torch.randn(
        2 * micro_batch, model.sequence_length, layer.in_features, device=device, requires_grad=True
    )
    tokens = torch.randint(0, model.vocab_size, hidden.shape[:2], device=device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    def logprob() -> Tensor:
        if way == "plain":
            return plain_logprob(layer(hidden), tokens)
        return linear_sequence_logprob(hidden, layer.weight, layer.bias, tokens)

    def run() -> float:
        hidden.grad = layer.weight.grad = None
        began = time.perf_counter()
        with torch.no_grad():
            reference = logprob()
        (logprob() - reference).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    reset_peak()
    base = peak_and_base()[1]
    run()
    peak = peak_and_base()[0] - base
    print(json.dumps({"seconds": statistics.median(run() for _ in range(rounds)), "peak": peak}))


def main() -> None:
    parser = Parser(__doc__, "benchmarks.train_step")
    parser.add_argument("--model", required=True, choices=sorted(ZOO), help="whose sizes")
    parser.add_argument("--image-size", type=count(), help="pixels (default: the model's)")
    parser.add_argument("--micro-batch-size", type=count(2), default=2, help="images per step (default 2)")
    parser.add_argument(
        "--rounds", type=count(), default=3, help="timed steps, after one to warm up (default 3)"
    )
    args = parser.parse_args()
    found = {}
    for part in ("measure", "measure_loss_part"):
        for way in WAYS:
            child = CHILD.format(part, args.model, args.image_size, way, args.micro_batch_size, args.rounds)
            found[part, way] = json.loads(
                subprocess.check_output([sys.executable, "-c", child], text=True).splitlines()[-1]
            )
    columns = [(part, key) for part in ("measure", "measure_loss_part") for key in ("seconds", "peak")]
    machine = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    size = build_model(args.model, args.image_size).image_size
    print(f"{args.model} at {size}, {args.micro_batch_size} images, {machine}, torch {torch.__version__}")
    rows = []
    for way in WAYS:
        values = [found[part, way][key] for part, key in columns]
        rows.append([way, *(f"{v / 1e6:,.0f}" if v > 1e4 else f"{v:.2f}" for v in values)])
    ratios = [found[part, "chunked"][key] / found[part, "plain"][key] for part, key in columns]
    rows.append(["ratio", *(f"{ratio:.2f}" for ratio in ratios)])
    titles = ["seconds per step", "its peak, MB", "seconds of the loss part", "its peak, MB"]
    print(markdown_table(["way", *titles], rows))


if __name__ == "__main__":
    run_command(main)
