"""Compiled decoding: a step, sampling included, is a few kernels that a CUDA graph replays without the host.

Without compilation a step of a small model is hundreds of kernels, and launching each takes longer than
running it. A step is compiled in three parts: before the blocks, the blocks, and after the blocks. The blocks
are alike and compile once. To compile the whole step as one would take longer than most runs need to sample.
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

# If attention cannot read only the filled part of the cache, it reads one of this many fixed lengths.
LENGTHS = {"cuda": 4, "cpu": 1}
GRAPHS = 128  # most graphs per compiled part: one per cache length, with and without guidance
BLOCKS_AT_ONCE = 2  # compiled together, which fuses the last kernel of a block with the first of the next
# Inductor options on GPUs. Fused kernels round where the separate kernels do. Otherwise nearly every image in
# 16 bits would get other tokens than without compilation.
ROUNDED_AS_EAGER: dict[str, Any] = {"emulate_precision_casts": True}


@contextlib.contextmanager
def compiled_decoding() -> Iterator[None]:
    """Context manager in which the stages of ``CompiledGenerate`` run."""
    with (
        torch.inference_mode(),
        attention_kernels(),
        torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS),
    ):
        yield


def run_blocks(blocks: Sequence[nn.Module], x: Tensor, arguments: Sequence[tuple]) -> Tensor:
    """Run x [B, n, dim] through some blocks, as ``ARTransformer.run_blocks`` does with all."""
    for block, others in zip(blocks, arguments):
        x = block(x, *others)
    return x


class CompiledGenerate:
    """Callable that samples the tokens of at most ``batch_size`` images. A smaller batch is padded.

    It returns the same tokens as ``generate_tokens``, except for the rounding of fused kernels.
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
        with torch.inference_mode():  # the steps make inference tensors, too
            self.labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.uniforms = torch.zeros(batch_size, length, dtype=torch.float64, device=device)
            self.tokens = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
            self.finite = torch.ones(batch_size, dtype=torch.bool, device=device)
            self.at = torch.zeros(1, dtype=torch.int64, device=device)
            self.scales = torch.tensor([options.scale_at(i, steps) for i in range(steps)], device=device)
        self.starts = list(accumulate(model.step_sizes, initial=0))
        settings = ROUNDED_AS_EAGER if device.type == "cuda" else None
        compiled = partial(torch.compile, fullgraph=True, backend=backend, options=settings)
        # VAR's levels differ in the number of tokens: compile once for any number, not once per level.
        varying = False if model.steps_alike else None
        self.before = compiled(self._before, dynamic=False)
        self.run_blocks, self.after = (
            compiled(run_blocks, dynamic=varying),
            compiled(self._after, dynamic=varying),
        )

    def __call__(self, labels: Tensor, uniforms: Tensor) -> Tensor:
        """Return tokens [n, L] of labels [n] and uniforms [n, L]; NOT_FINITE where logits are not finite."""
        rows = len(labels)
        with compiled_decoding():
            self.labels[:rows].copy_(labels)
            self.uniforms[:rows].copy_(uniforms)
            for run in self.calls:
                run()
            return self.tokens[:rows].masked_fill(~self.finite[:rows, None], NOT_FINITE)

    @cached_property
    def calls(self) -> list[Callable[[], None]]:
        """The functions that decode a batch, in order: the stages; on a GPU, captured at the first use."""
        if self.labels.is_cuda:
            return self._capture()
        return [function for function, times in self.stages() for _ in range(times)]

    def _begin(self) -> None:
        """Reset the state for a new batch."""
        model = self.model
        labels = with_unconditional(self.labels, model.null_class) if self.guided else self.labels
        with autocast(labels.device, self.dtype):
            self.state = model.begin(labels, static=True) if model.steps_alike else model.begin(labels)
        self.finite.fill_(True)
        self.at.zero_()

    def _step(self, step: int | None, guided: bool) -> None:
        """Run decoding step ``step``, or the one in ``self.at`` if it is None."""
        model = self.model
        with autocast(self.tokens.device, self.dtype):
            # VAR's levels resize differently. Only the last one, by far the largest, is worth compiling.
            before = self.before if step in (None, len(model.step_sizes) - 1) else self._before
            x = before(step, guided)
            blocks = list(model.transformer.transformer_blocks())
            arguments = model.block_arguments(self.state, self.at if step is None else step)
            for start in range(0, len(blocks), BLOCKS_AT_ONCE):
                part = slice(start, start + BLOCKS_AT_ONCE)
                x = self.run_blocks(blocks[part], x, arguments[part])
            self.after(x, None if step is None else (step, self.starts[step]), guided)

    def _before(self, step: int | None, guided: bool) -> Tensor:
        """Return the input of the first block."""
        if step is None:
            tokens = self.tokens.index_select(1, (self.at - 1).clamp(min=0))
        else:
            tokens = self.tokens[:, : self.starts[step]]
        tokens = tokens.repeat(2, 1) if guided else tokens
        return self.model.step_inputs(self.state, self.at if step is None else step, tokens)

    def _after(self, x: Tensor, place: tuple[int, int] | None, guided: bool) -> None:
        """Sample the tokens of a step from the output of the last block.

        place: the step and the position of its first token; None: those in ``self.at``.
        """
        logits = self.model.step_logits(self.state, x)
        if place is None:
            scale = self.scales.index_select(0, self.at) if guided else None
            noise = self.uniforms.index_select(1, self.at)
            tokens, finite = draw_step(logits, noise, scale, self.options)
            self.tokens.index_copy_(1, self.at, tokens)
            self.at.add_(1)
        else:
            step, start = place
            scale = self.scales[step] if guided else None
            part = slice(start, start + x.shape[1])
            tokens, finite = draw_step(logits, self.uniforms[:, part], scale, self.options)
            self.tokens[:, part] = tokens
        self.finite.logical_and_(finite)

    def stages(self) -> list[tuple[Callable[[], None], int]]:
        """Return the functions that decode a batch, each with the number of calls in a row."""
        steps = len(self.model.step_sizes)
        ends = self._lengths() if self.model.steps_alike else range(1, steps)
        bounds = sorted({0, self.guided, *ends, steps})
        parts = [(partial(self._run, *part), part[1] - part[0]) for part in pairwise(bounds)]
        return [(self._begin, 1), *parts]

    def _run(self, start: int, stop: int) -> None:
        """Run one of the steps from ``start`` to ``stop``, which are alike."""
        if 0 < start == self.guided:
            self.state.keep_rows(len(self.labels))
        if self.model.steps_alike:
            self.state.reach(stop)
        self._step(None if self.model.steps_alike else start, start < self.guided)

    def _lengths(self) -> set[int]:
        """Return the numbers of steps at which attention changes to a longer part of the cache."""
        device, steps = self.labels.device, len(self.model.step_sizes)
        with autocast(device, self.dtype):
            like = self.uniforms.new_empty(0, dtype=autocast_dtype(device, torch.float32))
        parts = 1 if attends_to_part(like) else LENGTHS[device.type]
        return {steps * (i + 1) // parts for i in range(parts)}

    def _capture(self) -> list[Callable[[], None]]:
        """Capture each stage as a CUDA graph, in one memory pool; return the replays in order."""
        warm_up, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):  # compiles, and initialises libraries
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
