"""A simulated GPU: tensors on "cuda" without data, and generated code that is not run.

FakeTensorMode computes the shapes, precision and device of each operator, and refuses to mix devices as a GPU
does. It raises where a value or a number of elements depends on data. This module answers the queries that
PyTorch would send to the GPU. It needs a CUDA build of PyTorch. It cannot check values, time, memory,
streams, CUDA graphs or NCCL.
"""

import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from commands import ROOT
from torch import Tensor, fx, nn
from torch._inductor import compile_fx, config, graph
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.backends.compiler import GPUTarget

from models import ARImageModel
from models.zoo.loading import build_model

GPU = torch.device("cuda", 0)
PRODUCT = f"{ROOT}/models", f"{ROOT}/cca"
KERNELS = {"sort": 4, "topk": 4}  # kernels per call, if not one; from ATen's CUDA sources
EXTERNAL = re.compile(r"(?:extern_kernels|torch\.ops\.\w+|aten)\.(\w+)[\w.]*\(")
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
)  # fmt: skip


DRIVER = SimpleNamespace(  # the calls that Triton makes while Inductor generates code
    utils=SimpleNamespace(),
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None) -> Tensor:
    """Replace scaled_dot_product_attention: call the kernel that PyTorch would choose on the GPU."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (t.to(torch.get_autocast_dtype("cuda")) for t in (query, key, value))
    width = query.shape[-1]
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        whole = [F.pad(t, (0, -width % 8)) if width % 8 else t for t in (query, key, value)]
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(*whole, dropout_p, is_causal, False, scale=scale or width**-0.5)[0][..., :width]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


@torch.no_grad()
def _apply(root: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replace Module._apply, which cannot change the data of a fake parameter: create new parameters."""
    for module in root.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(function(parameter), parameter.requires_grad)
        module._buffers.update({key: function(buffer) for key, buffer in module._buffers.items()})
    return root


@torch.no_grad()
def _backward(root: Tensor) -> None:
    """Replace Tensor.backward, whose engine would ask the GPU for its streams.

    Run the backward passes that are written in Python, and set gradients without data.
    """
    nodes = [root.grad_fn]
    for node in nodes:  # the loop appends to the list
        nodes += {following for following, _ in node.next_functions if following} - set(nodes)
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)
        elif hasattr(node, "_forward_cls"):
            like = node._input_metadata[0]
            node.apply(torch.zeros(like.shape, dtype=like.dtype, device=like.device))


@contextmanager
def enter_all(contexts: Iterable[AbstractContextManager]) -> Iterator[None]:
    """Context manager that enters all ``contexts``."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def fake_gpu() -> AbstractContextManager[None]:
    """Context manager in which tensors can be created on, or moved to, the device "cuda"."""
    return enter_all([
        warnings.catch_warnings(action="ignore"),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(Tensor, "backward", _backward),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        # Record one wait for the tensor instead of one per element.
        mock.patch.object(FakeTensor, "tolist", lambda tensor: [tensor.sum().item()] * len(tensor)),
        mock.patch("torch.set_float32_matmul_precision"),  # the commands set it permanently
        FakeTensorMode(allow_non_fake_inputs=True),
    ])  # fmt: skip


def fake_model(name: str, layers: int | None = None) -> ARImageModel:
    """Return a model of the zoo on the fake GPU, without data; ``layers`` limits the number of blocks."""
    with _disable_current_modes():
        model = build_model(name)
    if layers:
        del model.transformer.transformer_blocks()[layers:]
    model.tokenizer.requires_grad_(False)
    return model.to_empty(device=GPU).eval()


def tensors_of(tree: object) -> list[Tensor]:
    """Return the tensors among nested arguments or results."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    """Context manager that records why and where the host waits for the GPU, and counts kernels.

    It counts one kernel per operator. If the host asks for the value of a tensor, it gets 1.
    """

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.kernels = 0

    def record_wait(self, why: str) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(PRODUCT)]
        self.waits.append(f"{why} in {frames[-1] if frames else 'autograd'}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, inputs = func._schema.name.removeprefix("aten::"), tensors_of((args, kwargs))
        on_gpu = any(tensor.is_cuda for tensor in inputs)
        if name in ("item", "_local_scalar_dense", "nonzero"):
            if on_gpu:
                self.record_wait(name)
            if name == "nonzero":  # the largest possible result
                return inputs[0].new_empty((inputs[0].numel(), inputs[0].dim()), dtype=torch.int64)
            return False if inputs[0].dtype == torch.bool else 1
        result = func(*args, **kwargs)
        outputs = tensors_of(result)
        self.kernels += on_gpu and bool(outputs) and not func.is_view
        is_copy = name in ("to", "_to_copy")  # other operators take a CPU scalar as a constant
        devices = {t.device.type for t in (*inputs, *outputs) if t.dim() or is_copy}
        is_async = kwargs.get("non_blocking") or any(argument is True for argument in args)
        if len(devices) > 1 and not is_async:
            self.record_wait(f"{name} of CPU and GPU")
        return result


def _inductor_sees_an_h100() -> AbstractContextManager[None]:
    """Context manager in which Inductor generates code for an H100."""
    properties = {"get_device_properties": H100, "current_device": 0, "device_count": 1}
    more = {**properties, "is_available": True, "is_bf16_supported": True}
    module = "torch._dynamo.device_interface"
    return enter_all([
        *(mock.patch(f"{module}.CudaInterface.{key}", return_value=value) for key, value in more.items()),
        *(mock.patch(f"torch.cuda.{key}", return_value=value) for key, value in properties.items()),
        mock.patch.dict(f"{module}.caching_worker_device_properties", {"cuda": [H100]}),
        mock.patch("torch._inductor.scheduler.has_triton", return_value=True),
        mock.patch.object(compile_fx, "has_triton", return_value=True),
        mock.patch("triton.runtime.driver.driver._active", DRIVER),
        config.patch(
            shape_padding=False, fx_graph_cache=False, compile_threads=1, joint_graph_constant_folding=False
        ),
    ])  # fmt: skip


class Writer:
    """Backend of torch.compile inside ``fake_gpu`` that generates code and runs the eager operators.

    graphs: the number of kernels in each compiled graph. transposed: the number of Triton kernels that read
    memory in one order and write it in another. kernels: the number of kernels in all calls so far.
    """

    def __init__(self):
        self.graphs: list[int] = []
        self.transposed = 0
        self.kernels = 0

    def __call__(
        self, module: fx.GraphModule, inputs: Sequence[Any], options: dict | None = None
    ) -> Callable:
        """Generate code for ``module`` and return a function that runs the eager operators.

        options: the options of torch.compile.
        """
        sources: list[str] = []

        def stop(lowering: graph.GraphLowering) -> None:
            sources.append(lowering.codegen()[0].value)
            raise NotImplementedError  # the code must not be run

        stopped = mock.patch.object(graph.GraphLowering, "_compile_to_module", stop)
        with _inductor_sees_an_h100(), stopped, suppress(torch._inductor.exc.InductorError):
            compile_fx.compile_fx(module, list(inputs), config_patches=options or {})
        body = sources[0][sources[0].index("def call") :]
        kernels = len(re.findall(r"\.run\(", body)) + sum(KERNELS.get(n, 1) for n in EXTERNAL.findall(body))
        self.graphs.append(kernels)
        self.transposed += len(re.findall(r"size_hints=\{'y'", sources[0]))

        def run(*arguments: Any) -> Any:
            self.kernels += kernels
            return module(*arguments)

        return run
