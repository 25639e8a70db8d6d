"""A GPU that is not there: tensors may claim to be on "cuda", and hold no numbers.

FakeTensorMode gives each operator's shapes, precision and device, and refuses to mix devices as a GPU
does. What PyTorch would ask the GPU itself for is answered here: which attention kernel it takes, the
streams of the backward pass, what autocast is allowed. It needs a CUDA build of PyTorch.

It cannot show numbers, kernels that lack a precision, real time and memory, streams, graphs or NCCL.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from models.base import ARImageModel
from models.cache import varlen_attn
from models.loading import build_model

DEVICE = torch.device("cuda", 0)
HALF = (torch.float16, torch.bfloat16)
aten = torch.ops.aten


class OneProcess:
    """As ``cca.distributed.Processes`` of a run with one process and a GPU."""

    rank, world, main, device = 0, 1, True, DEVICE

    def sum(self, values: Tensor) -> Tensor:
        return values

    def share(self, count: int) -> slice:
        return slice(0, count)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """scaled_dot_product_attention as CUDA chooses its kernel; raises RuntimeError where none fits."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    kinds = {query.dtype, key.dtype, value.dtype}
    if len(kinds) > 1 or (attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype)):
        raise RuntimeError(f"attention of {kinds} with a mask {attn_mask is not None and attn_mask.dtype}")
    if any(tensor.stride(-1) != 1 for tensor in (query, key, value)):
        raise RuntimeError("attention: the last dimension is not contiguous, which no fused kernel takes")
    width, half = query.shape[-1], query.dtype in HALF
    scale = width**-0.5 if scale is None else scale
    if attn_mask is None and half and width <= 256:
        padded = [F.pad(t, (0, -width % 8)) if width % 8 else t for t in (query, key, value)]
        out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :width]
    if width % (8 if half else 4):
        raise RuntimeError(f"attention: heads of {width} numbers, which no fused kernel takes with a mask")
    if attn_mask is not None:
        if attn_mask.shape[-1] % 16:  # rows of the mask must start at a multiple of 16
            attn_mask = F.pad(attn_mask, (0, -attn_mask.shape[-1] % 16))[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, keep, dropout_p, is_causal, scale=scale
    )[0]


def varlen_attention(query: Tensor, *others: Any, **options: Any) -> Tensor:
    """varlen_attn; raises RuntimeError for heads that its kernel does not take."""
    if query.shape[-1] % 8:
        raise RuntimeError(
            f"attention: heads of {query.shape[-1]} numbers, which the flash kernel does not take"
        )
    assert varlen_attn is not None
    return varlen_attn(query, *others, **options)


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Module._apply, which cannot exchange what is in a fake parameter: the parameter is replaced."""
    for child in module.children() if recurse else ():
        child._apply(function)
    with torch.no_grad():
        for key, parameter in module._parameters.items():
            if parameter is not None and (new := function(parameter)) is not parameter:
                module._parameters[key] = nn.Parameter(new.detach(), parameter.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = function(buffer)
    return module


def _backward(root: Tensor) -> None:
    """Tensor.backward by walking the graph: autograd's engine would ask the GPU for its streams."""
    waiting: Counter[Any] = Counter()
    known, stack = {root.grad_fn}, [root.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in known:
                    known.add(node)
                    stack.append(node)
    grads, ready = {root.grad_fn: {0: torch.ones_like(root)}}, [root.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = grads.pop(node, {})
            if hasattr(node, "variable"):
                if 0 in given:
                    _accumulate(node.variable, given[0])
                continue
            for (following, index), grad in zip(node.next_functions, _run(node, given)):
                if following is None:
                    continue
                if grad is not None:
                    wanted, slots = following._input_metadata[index], grads.setdefault(following, {})
                    if grad.device != wanted.device:
                        raise RuntimeError(f"a gradient on {grad.device} instead of {wanted.device}")
                    grad = grad.sum_to_size(wanted.shape).to(wanted.dtype)
                    slots[index] = slots[index] + grad if index in slots else grad
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)


def _run(node, given: dict[int, Tensor]) -> list[Tensor | None]:
    """Gradients of a node's inputs, one for each of its ``next_functions``."""
    if not given:
        return [None] * len(node.next_functions)
    if hasattr(node, "_forward_cls"):  # a Function written in Python
        found = node.apply(given.get(0))
        found = list(found) if isinstance(found, tuple) else [found]
        while len(found) > len(node.next_functions):  # of arguments that are no tensors
            found.remove(None)
        return found
    found = node(*[given.get(i) for i in range(len(node._input_metadata))])
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _accumulate(leaf: Tensor, grad: Tensor) -> None:
    if (grad.dtype, grad.device, grad.shape) != (leaf.dtype, leaf.device, leaf.shape):
        raise RuntimeError(f"gradient {grad.dtype} {grad.device} {list(grad.shape)} of a parameter "
                           f"{leaf.dtype} {leaf.device} {list(leaf.shape)}")  # fmt: skip
    leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)


def _numpy(tensor: Tensor, **_) -> np.ndarray:
    if not isinstance(tensor, FakeTensor):
        return _OWN_NUMPY(tensor)
    if tensor.device.type == "cuda":
        raise TypeError("can't convert a tensor of the GPU to numpy")
    with _disable_current_modes():
        return _OWN_NUMPY(torch.zeros(tensor.shape, dtype=tensor.dtype))


_OWN_NUMPY = Tensor.numpy


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, tensors may be made on, or moved to, the device "cuda"."""
    answers = (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        mock.patch("models.cache.varlen_attn", varlen_attn and varlen_attention),
        mock.patch("torch._C._current_graph_task_id", return_value=1),  # asked where blocks run again
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(Tensor, "backward", _backward),
        mock.patch.object(Tensor, "numpy", _numpy),
        mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: tensor),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        for answer in answers:
            stack.enter_context(answer)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def fake_model(
    name: str, image_size: int | None = None, tokenizer: str | None = None, layers: int | None = None
) -> ARImageModel:
    """A model of the zoo as ``load_model`` gives it, on the CPU; ``layers``: no more blocks than that."""
    with _disable_current_modes():
        model = build_model(name, image_size, tokenizer)
    if layers:
        del model.transformer.transformer_blocks()[layers:]
        depth = "depth" if hasattr(model.transformer.config, "depth") else "layers"
        model.transformer.config = replace(model.transformer.config, **{depth: layers})
    fill(model)
    model.tokenizer.requires_grad_(False)
    return model.eval()


def fill(module: nn.Module) -> None:
    """Parameters of the meta device become those of the CPU, without numbers; buffers stay."""
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[key] = nn.Parameter(empty, parameter.requires_grad)
