"""Sampling speed, side by side with a plain implementation of the published procedure.

    python -m benchmarks.sampling --model llamagen-b --image-size 256 --batch-size 16
    python -m benchmarks.sampling --model var-d16 --batch-size 8

The plain way is eager and as published: LlamaGen attends to a cache of full length behind a mask;
VAR grows its cache by concatenation, computes each block's adaptive LayerNorm vectors at every
level, and runs the unconditional half of the batch even without guidance. Same random weights,
same random numbers; the tokens of both ways are compared. Tokenizer decoding is timed apart.
"""

import ctypes
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.train_step import peak_and_base, reset_peak
from models.base import ARImageModel
from models.cache import LayerCache
from models.decoding import SamplingOptions, draw_tokens, filter_logits
from models.devices import DTYPES, autocast
from models.errors import run_command
from models.llamagen import Attention, LlamaGen, LlamaGenState, rotate
from models.loading import build_model
from models.options import Parser, count, number
from models.tables import markdown_table
from models.var import VAR
from models.zoo import ZOO


class ConcatenatedLayer:
    """Grows by concatenation, level by level, as in VAR's code."""

    def __init__(self):
        self.stored: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.stored is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.stored, (k, v)))
        self.stored = k, v
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


class ConcatenatedCache:
    def __init__(self, layers: int):
        self.layers = [ConcatenatedLayer() for _ in range(layers)]
        self.filled = 0

    def at(self) -> list[ConcatenatedLayer]:
        return self.layers

    def advance(self, n: int) -> None:
        self.filled += n


def full_length_attention(self: Attention, x: Tensor, table: Tensor, cache: LayerCache) -> Tensor:
    """Attention over the whole preallocated cache, masked behind the current position."""
    q, k, v = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, table), rotate(k, table)
    place = slice(cache.filled, cache.filled + 1)
    cache.keys[:, :, place], cache.values[:, :, place] = k, v
    mask = (torch.arange(cache.keys.shape[2], device=x.device) <= cache.filled)[None, None, None]
    out = F.scaled_dot_product_attention(q, cache.keys, cache.values, attn_mask=mask)
    return self.wo(out.transpose(1, 2).flatten(2))


@torch.inference_mode()
def plain_var(model: ARImageModel, labels: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    net, steps = model.transformer, len(model.step_sizes)
    doubled = torch.cat([labels, torch.full_like(labels, model.null_class)])
    cache, reconstruction = ConcatenatedCache(net.config.depth), None
    tokens = labels.new_empty(len(labels), 0)
    for step, size in enumerate(model.step_sizes):
        state = net.condition(doubled, precompute=False)
        state.cache, state.reconstruction = cache, reconstruction
        cond, uncond = model.next_logits(state, step, tokens.repeat(2, 1)).chunk(2)
        reconstruction = state.reconstruction
        strength = options.scale_at(step, steps) - 1
        logits = (1 + strength) * cond - strength * uncond
        noise = uniforms[:, tokens.shape[1] : tokens.shape[1] + size]
        tokens = torch.cat([tokens, draw_tokens(filter_logits(logits, options), noise)], dim=1)
    return tokens


def plain_llamagen(model: ARImageModel, labels: Tensor, uniforms: Tensor, options: SamplingOptions) -> Tensor:
    own_attention, own_begin = Attention.forward, LlamaGen.begin

    def begin(self: LlamaGen, labels: Tensor) -> LlamaGenState:
        state = own_begin(self, labels)
        for keys, values in state.cache.layers:
            keys.zero_()
            values.zero_()
        return state

    Attention.forward, LlamaGen.begin = full_length_attention, begin
    try:
        return model.generate(labels, uniforms, options)
    finally:
        Attention.forward, LlamaGen.begin = own_attention, own_begin


PLAIN = {VAR: plain_var, LlamaGen: plain_llamagen}


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float, int]:
    """Result, seconds, and peak bytes above what was held before."""
    if not torch.cuda.is_available():
        # Give back what the run before has freed, else this one's use of it does not show.
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    base = peak_and_base()[1]
    began = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - began, peak_and_base()[0] - base


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, "benchmarks.sampling")
    parser.add_argument("--model", required=True, choices=sorted(ZOO), help="whose sizes")
    parser.add_argument("--image-size", type=count(), help="pixels (default: the model's)")
    parser.add_argument("--batch-size", type=count(), default=16, help="images at once (default 16)")
    parser.add_argument(
        "--cfg-scale", type=number(1), default=2.0, help="scale of the guided run (default 2.0)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="precision (default float32)",
    )
    parser.add_argument(
        "--rounds", type=count(), default=3, help="timed rounds, the ways in turn (default 3)"
    )
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build_model(args.model, args.image_size, device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model = model.eval().to(device)
    labels = torch.arange(args.batch_size, device=device) % model.num_classes
    uniforms = torch.rand(args.batch_size, model.sequence_length, dtype=torch.float64).to(device)
    free = SamplingOptions(1.0, model.default_cfg_schedule)
    guided = SamplingOptions(args.cfg_scale, model.default_cfg_schedule)
    plain = PLAIN[type(model)]
    runs = {
        "plain, no guidance": lambda: plain(model, labels, uniforms, free),
        "ours, no guidance": lambda: model.generate(labels, uniforms, free),
        "plain, guided": lambda: plain(model, labels, uniforms, guided),
        "ours, guided": lambda: model.generate(labels, uniforms, guided),
    }
    tokens, seconds, peaks = {}, {name: [] for name in runs}, dict.fromkeys(runs, 0)
    model.transformer.store_matrices(DTYPES[args.dtype])
    with autocast(device, args.dtype):
        first = -1 if device.type == "cuda" else 0  # a GPU's first picks kernels and gets memory
        for turn in range(first, args.rounds):
            for name, run in runs.items():
                tokens[name], value, peak = timed(run)
                peaks[name] = max(peak, peaks[name])
                if turn >= 0:
                    seconds[name].append(value)
    with torch.inference_mode():
        few = tokens["ours, no guidance"][:8]
        decoding = timed(lambda: model.decode(few))[1] / len(few)
    machine = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{args.model} at {model.image_size}, batch {args.batch_size}, {args.dtype}, "
        f"{machine}, torch {torch.__version__}"
    )
    rows = []
    for name in runs:
        differ = (tokens[name] != tokens[name.replace("ours", "plain")]).float().mean().item()
        speed = args.batch_size / statistics.median(seconds[name])
        rows.append([name, f"{speed:.3f}", f"{peaks[name] / 1e6:,.0f}", f"{differ:.2%}"])
    print(markdown_table(["way", "images/s", "peak, MB", "tokens that differ from the plain way"], rows))

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b]))

    print(
        f"speed over plain: {ratio('plain, no guidance', 'ours, no guidance'):.2f} without guidance, "
        f"{ratio('plain, guided', 'ours, guided'):.2f} guided; time without guidance over guided: "
        f"{ratio('ours, no guidance', 'ours, guided'):.2f}; decoding {decoding:.2f} s per image"
    )


if __name__ == "__main__":
    run_command(main)
