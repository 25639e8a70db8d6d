"""How many kernels torch.compile makes of a function on a GPU: Inductor's CUDA code, written and not run."""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from unittest import mock

import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config, graph
from torch._inductor.exc import InductorError
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

from benchmarks.pretended.recorder import KERNELS

H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
)  # fmt: skip
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


def compiled_kernels(function: Callable[..., object], inputs: Sequence[Tensor]) -> Counter[str]:
    """Kernels of one call of a compiled function, by kind: "triton", or the name of a library's.

    Call it inside ``pretended_gpu``; the inputs are tensors of the GPU, and the function, which is traced
    whole, computes no gradients. Raises what tracing or Inductor raises.
    """
    written: list[str] = []

    def stop(lowering: graph.GraphLowering) -> None:
        written.append(lowering.codegen()[0].value)
        raise _Written

    with _h100(), mock.patch.object(graph.GraphLowering, "_compile_to_module", stop):
        with mock.patch("torch.compiler.is_compiling", return_value=True):
            traced = make_fx(function)(*inputs)
        try:
            compile_fx.compile_fx(traced, list(inputs))
        except (_Written, InductorError):
            if not written:
                raise
    (code,) = written
    body = code[code.index("def call") :]
    found = Counter({"triton": len(re.findall(r"\.run\(", body))})
    for name in EXTERNAL.findall(body):
        found[name] += KERNELS.get(name, 1)
    return found
