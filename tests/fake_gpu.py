"""A GPU that is not there: tensors that claim to be on "cuda" and hold no numbers, and code that is not run.

FakeTensorMode gives each operator's shapes, precision and device, and refuses to mix devices as a GPU does;
it raises for a number, or a count of elements, that only a computation would give. What PyTorch would ask
the GPU itself for is answered here. It needs a CUDA build of PyTorch, and cannot show numbers, real time and
memory, streams, graphs or NCCL.
"""

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from commands import ROOT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from models import ARImageModel
from models.zoo.loading import build_model

GPU = torch.device("cuda", 0)
PRODUCT = f"{ROOT}/models", f"{ROOT}/cca"


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None) -> Tensor:
    """scaled_dot_product_attention by the kernel that CUDA takes, for which PyTorch would ask the GPU."""
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
    """Module._apply, which cannot exchange what is in a fake parameter: the parameter is replaced."""
    for module in root.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(function(parameter), parameter.requires_grad)
        module._buffers.update({key: function(buffer) for key, buffer in module._buffers.items()})
    return root


@torch.no_grad()
def _backward(root: Tensor) -> None:
    """In place of autograd's engine, which would ask the GPU for its streams: the backward passes that are
    written in Python, and gradients without numbers."""
    seen, stack = {None}, [root.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)
        elif hasattr(node, "_forward_cls"):
            given = node._input_metadata[0]
            node.apply(torch.zeros(given.shape, dtype=given.dtype, device=given.device))


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, tensors may be made on, or moved to, the device "cuda"."""
    contexts = [
        warnings.catch_warnings(action="ignore"),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch.object(Tensor, "backward", _backward),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        FakeTensorMode(allow_non_fake_inputs=True),
    ]
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def fake_model(name: str, layers: int | None = None) -> ARImageModel:
    """A model of the zoo without numbers on the GPU, with at most ``layers`` blocks; see ``fake_gpu``."""
    with _disable_current_modes():
        model = build_model(name)
    del model.transformer.transformer_blocks()[layers:]
    model.tokenizer.requires_grad_(False)
    return model.to_empty(device=GPU).eval()


def tensors_of(tree: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    """While it is entered, notes why and where the host waits for the GPU; answers 0 where the host asks for
    a number."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def note(self, why: str) -> None:
        """A wait, and where in the product; the numbers that one line asks for (tolist) are one."""
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(PRODUCT)]
        wait = f"{frames[-1].filename}:{frames[-1].lineno}: {why}" if frames else why
        if "item" not in why and "scalar" not in why or self.waits[-1:] != [wait]:
            self.waits.append(wait)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, inputs = func._schema.name.removeprefix("aten::"), tensors_of((args, kwargs))
        on_gpu = any(tensor.is_cuda for tensor in inputs)
        if name in ("item", "_local_scalar_dense", "nonzero"):
            if on_gpu:
                self.note(name)
            if name == "nonzero":  # as many as there could be
                return inputs[0].new_empty((inputs[0].numel(), inputs[0].dim()), dtype=torch.int64)
            return False if inputs[0].dtype == torch.bool else 0
        result = func(*args, **kwargs)
        moved = name in ("to", "_to_copy")  # in other operators a single number of the CPU is a constant
        used = {t.device.type for t in (*inputs, *tensors_of(result)) if t.dim() or moved}
        queued = kwargs.get("non_blocking") or any(argument is True for argument in args)
        if len(used) > 1 and not queued:
            self.note(f"{name} of CPU and GPU")
        return result
