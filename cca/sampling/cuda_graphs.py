"""Decoding compiled: a decoding step, its draw included, in few kernels, replayed by a GPU without the host.

Eager, a step of a small model is hundreds of kernels, each of which takes longer to launch than to run.
A step is compiled in three parts: what comes before the blocks, the blocks, and what comes after. Blocks
are alike and are compiled once: the whole step as one would take longer than the images of most runs.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from models import ARImageModel, SamplingOptions, autocast
from models.kv_cache import attends_to_part
from models.sampling import (
    NOT_FINITE,
    attention_kernels,
    draw_step,
    guided_steps,
    with_unconditional,
)
from models.utils.precision import autocast_dtype

# Where attention cannot be told how much of the cache counts, it reads one of so many lengths of it.
LENGTHS = {"cuda": 4, "cpu": 1}
GRAPHS = 128  # of one part at most: lengths of the cache, guided and not, are a graph each
BLOCKS_AT_ONCE = 2  # compiled as one: where one block ends and the next begins two kernels become one
# Of the compiler for GPUs: a fused kernel rounds where the kernels that it stands for do, or nearly every
# image of 16 bits would have other tokens than without compilation.
ROUNDED_AS_EAGER: dict[str, Any] = {"emulate_precision_casts": True}


@contextlib.contextmanager
def compiled_decoding() -> Iterator[None]:
    """What the stages of ``CompiledGenerate`` run in."""
    with (
        torch.inference_mode(),
        attention_kernels(),
        torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS),
    ):
        yield


def through(blocks: Sequence[nn.Module], x: Tensor, arguments: Sequence[tuple]) -> Tensor:
    """``ARTransformer.run_blocks`` of some blocks."""
    for block, others in zip(blocks, arguments):
        x = block(x, *others)
    return x


class CompiledGenerate:
    """Tokens of at most ``batch_size`` images at a time; a smaller batch is filled up.

    The same tokens as ``generate_tokens`` gives, but for the rounding of fused kernels.
    """

    def __init__(
        self,
        model: ARImageModel,
        options: SamplingOptions,
        dtype: str,
        batch_size: int,
        device: torch.device,
        backend: str | Callable[..., Any] = "inductor",
    ):
        self.model, self.options, self.dtype = model, options, dtype
        steps, length = len(model.step_sizes), model.sequence_length
        self.guided = guided_steps(options, steps)
        with torch.inference_mode():  # as what the steps make
            self.labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.uniforms = torch.zeros(batch_size, length, dtype=torch.float64, device=device)
            self.tokens = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
            self.finite = torch.ones(batch_size, dtype=torch.bool, device=device)
            self.at = torch.zeros(1, dtype=torch.int64, device=device)
            self.scales = torch.tensor([options.scale_at(i, steps) for i in range(steps)], device=device)
        self.starts = list(accumulate(model.step_sizes, initial=0))
        settings = ROUNDED_AS_EAGER if device.type == "cuda" else None
        compiled = partial(torch.compile, fullgraph=True, backend=backend, options=settings)
        # Of any number of tokens, where levels differ in it: not for each level anew.
        varying = False if model.steps_alike else None
        self.before = compiled(self._before, dynamic=False)
        self.through, self.after = compiled(through, dynamic=varying), compiled(self._after, dynamic=varying)

    def __call__(self, labels: Tensor, uniforms: Tensor) -> Tensor:
        """Labels [n], uniforms [n, L] -> tokens [n, L], NOT_FINITE in rows whose logits were not finite."""
        rows = len(labels)
        with compiled_decoding():
            self.labels[:rows].copy_(labels)
            self.uniforms[:rows].copy_(uniforms)
            for run in self.calls:
                run()
            return self.tokens[:rows].masked_fill(~self.finite[:rows, None], NOT_FINITE)

    @cached_property
    def calls(self) -> list[Callable[[], None]]:
        """What decodes a batch, called in this order: the stages, on a GPU captured when first asked for."""
        if self.labels.is_cuda:
            return self._capture()
        return [function for function, times in self.stages() for _ in range(times)]

    def _begin(self) -> None:
        model = self.model
        labels = with_unconditional(self.labels, model.null_class) if self.guided else self.labels
        with autocast(labels.device, self.dtype):
            self.state = model.begin(labels, static=True) if model.steps_alike else model.begin(labels)
        self.finite.fill_(True)
        self.at.zero_()

    def _step(self, step: int | None, guided: bool) -> None:
        """One decoding step; None: the one that ``at`` says."""
        model = self.model
        with autocast(self.tokens.device, self.dtype):
            # Of levels, whose resizing differs, the last is by far the largest: the others' is not compiled.
            before = self.before if step in (None, len(model.step_sizes) - 1) else self._before
            x = before(step, guided)
            blocks = list(model.transformer.transformer_blocks())
            arguments = model.block_arguments(self.state, self.at if step is None else step)
            for start in range(0, len(blocks), BLOCKS_AT_ONCE):
                part = slice(start, start + BLOCKS_AT_ONCE)
                x = self.through(blocks[part], x, arguments[part])
            self.after(x, None if step is None else (step, self.starts[step]), guided)

    def _before(self, step: int | None, guided: bool) -> Tensor:
        if step is None:
            tokens = self.tokens.index_select(1, (self.at - 1).clamp(min=0))
        else:
            tokens = self.tokens[:, : self.starts[step]]
        tokens = tokens.repeat(2, 1) if guided else tokens
        return self.model.step_inputs(self.state, self.at if step is None else step, tokens)

    def _after(self, x: Tensor, place: tuple[int, int] | None, guided: bool) -> None:
        """``place``: the step and the position of its first token; None: what ``at`` says."""
        logits = self.model.step_logits(self.state, x)
        if place is None:
            scale = self.scales.index_select(0, self.at) if guided else None
            noise = self.uniforms.index_select(1, self.at)
            drawn, good = draw_step(logits, noise, scale, self.options)
            self.tokens.index_copy_(1, self.at, drawn)
            self.at.add_(1)
        else:
            step, start = place
            scale = self.scales[step] if guided else None
            part = slice(start, start + x.shape[1])
            drawn, good = draw_step(logits, self.uniforms[:, part], scale, self.options)
            self.tokens[:, part] = drawn
        self.finite.logical_and_(good)

    def stages(self) -> list[tuple[Callable[[], None], int]]:
        """What decodes a batch, and how many times in a row each is called."""
        steps = len(self.model.step_sizes)
        ends = self._lengths() if self.model.steps_alike else range(1, steps)
        bounds = sorted({0, self.guided, *ends, steps})
        parts = [(partial(self._run, *part), part[1] - part[0]) for part in pairwise(bounds)]
        return [(self._begin, 1), *parts]

    def _run(self, start: int, stop: int) -> None:
        """One step of those from ``start`` to ``stop``, which are alike."""
        if 0 < start == self.guided:
            self.state.keep_rows(len(self.labels))
        if self.model.steps_alike:
            self.state.reach(stop)
        self._step(None if self.model.steps_alike else start, start < self.guided)

    def _lengths(self) -> set[int]:
        device, steps = self.labels.device, len(self.model.step_sizes)
        with autocast(device, self.dtype):
            like = self.uniforms.new_empty(0, dtype=autocast_dtype(device, torch.float32))
        parts = 1 if attends_to_part(like) else LENGTHS[device.type]
        return {steps * (i + 1) // parts for i in range(parts)}

    def _capture(self) -> list[Callable[[], None]]:
        """A CUDA graph of every stage, in one pool of memory; to be replayed in this order."""
        warm_up, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):  # compiles, and lets libraries set themselves up
            for function, _ in self.stages():
                function()
        torch.cuda.current_stream().wait_stream(warm_up)
        del self.state  # the graphs have a cache of their own
        torch.cuda.empty_cache()
        replays: list[Callable[[], None]] = []
        for function, times in self.stages():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                function()
            replays += [graph.replay] * times
        return replays
