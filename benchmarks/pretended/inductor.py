"""How many kernels torch.compile makes of a function on a GPU: Inductor's CUDA code, written and not run."""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config, graph
from torch._inductor.codecache import PyCodeCache
from torch._inductor.exc import InductorError
from triton.backends.compiler import GPUTarget

from benchmarks.pretended.recorder import KERNELS

H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
)  # fmt: skip
TRITON = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)
EXTERNAL = re.compile(r"(?:extern_kernels|torch\.ops\.\w+|aten)\.(\w+)[\w.]*\(")


class _Driver:
    """What Triton asks its driver for while code is written."""

    utils = SimpleNamespace()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _h100() -> Iterator[None]:
    """Inductor believes that there is one."""
    answers = {
        "get_device_properties": H100, "current_device": 0, "device_count": 1, "is_available": True,
        "is_bf16_supported": True,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, return_value=answer))
        for name, answer in (("get_device_properties", H100), ("get_device_capability", (9, 0)),
                             ("device_count", 1), ("current_device", 0)):  # fmt: skip
            stack.enter_context(mock.patch(f"torch.cuda.{name}", return_value=answer))
        workers = "torch._dynamo.device_interface.caching_worker_device_properties"
        stack.enter_context(mock.patch.dict(workers, {"cuda": [H100]}))
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", return_value=True))
        stack.enter_context(mock.patch.object(compile_fx, "has_triton", return_value=True))
        stack.enter_context(
            config.patch(
                shape_padding=False,
                fx_graph_cache=False,
                compile_threads=1,
                joint_graph_constant_folding=False,
            )
        )
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver()))
        yield


class _Written(Exception):
    """Stops the compilation where the code would be run."""


def cuda_code(module: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> str:
    """The code that Inductor writes for a graph; raises what it raises."""
    written: list[str] = []

    def stop(lowering: graph.GraphLowering) -> None:
        written.append(lowering.codegen()[0].value)
        raise _Written

    with _h100(), mock.patch.object(graph.GraphLowering, "_compile_to_module", stop):
        try:
            compile_fx.compile_fx(module, list(inputs), config_patches=options)
        except (_Written, InductorError):
            if not written:
                raise
    (code,) = written
    return code


def kernels_of(code: str) -> Counter[str]:
    """Of one call, by kind: "triton", or the name of a library's."""
    body = code[code.index("def call") :]
    found = Counter({"triton": len(re.findall(r"\.run\(", body))})
    for name in EXTERNAL.findall(body):
        # A convolution's bias is added by what follows.
        found[name] += 1 if name == "convolution" else KERNELS.get(name, 1)
    return found


class Writer:
    """A backend of torch.compile inside ``pretended_gpu``: code is written, and eager operators are run.

    graphs: the kernels of each graph that was compiled. calls: which of the
    graphs were called, in order. sources: of Triton's kernels, all different, and what each is called.
    """

    def __init__(self):
        self.graphs: list[Counter[str]] = []
        self.calls: list[int] = []
        self.sources: dict[str, str] = {}

    def __call__(
        self, module: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any] | None = None
    ) -> Callable[..., Any]:
        """``options``: those of torch.compile."""
        code, number = cuda_code(module, inputs, options or {}), len(self.graphs)
        self.graphs.append(kernels_of(code))
        self.sources.update((source, name) for name, source in TRITON.findall(code))

        def run(*arguments: Any) -> Any:
            self.calls.append(number)
            return module(*arguments)

        return run

    def kernels(self) -> Counter[str]:
        """Of the calls so far."""
        return sum((self.graphs[number] for number in self.calls), Counter())


def binaries(sources: dict[str, str]) -> int:
    """How many programs Triton makes for an H100 of a ``Writer``'s sources; raises what it raises."""
    count = 0
    with _h100(), mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu"):
        for source, name in sources.items():
            kernel = getattr(PyCodeCache.load(source), name)
            kernel.precompile(warm_cache_only=True)
            count += len(kernel.compile_results)
    return count


def compiled_kernels(function: Callable[..., object], inputs: Sequence[Tensor]) -> Counter[str]:
    """Kernels of one call of a compiled function, by kind; raises what compiling raises.

    Call it inside ``pretended_gpu``; the inputs are tensors of the GPU, and no gradients are computed.
    """
    writer = Writer()
    torch._dynamo.reset()
    torch.compile(function, backend=writer, fullgraph=True, dynamic=False)(*inputs)
    return writer.kernels()
