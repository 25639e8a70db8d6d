"""The log-likelihood in chunks compared with the plain one, and compiled code compared with eager code."""

from functools import cache, partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import models.log_likelihood
import models.utils.precision
from models.log_likelihood import linear_sequence_logprob, sequence_logprob


@pytest.mark.parametrize("bias", [True, False])
def test_chunked_logprob_equals_plain(monkeypatch, bias):
    # A chunk has 7 tokens, so chunks end inside sequences.
    monkeypatch.setitem(models.utils.precision.LIKELIHOOD_LOGITS, "cpu", 101 * 7)
    hidden, weight, offset = torch.randn(3, 13, 16), torch.randn(101, 16), torch.randn(101)
    tokens, outer = torch.randint(0, 101, (3, 13)), torch.randn(3)
    results = []
    for function in (
        linear_sequence_logprob,
        lambda h, w, b, t: sequence_logprob(torch.nn.functional.linear(h, w, b), t),
    ):
        inputs = [t.clone().requires_grad_() for t in (hidden, weight, offset)]
        value = function(inputs[0], inputs[1], inputs[2] if bias else None, tokens)
        (value * outer).sum().backward()
        results.append((value, *(t.grad for t in inputs if t.grad is not None)))
    for chunked, plain in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", ["from logits", "from hidden states"])
def test_invalid_tokens_raise(function):
    """Shapes with the right number of tokens raise too, and so does -100, which cross-entropy ignores."""
    hidden, weight = torch.randn(2, 5, 8), torch.randn(11, 8)

    def logprob(tokens):
        if function == "from logits":
            return sequence_logprob(hidden @ weight.T, tokens)
        return linear_sequence_logprob(hidden, weight, None, tokens)

    for shape in ((5, 2), (2, 4), (10,), (2, 5, 1)):
        with pytest.raises(ValueError, match=r"expected \[2, 5\]"):
            logprob(torch.zeros(shape, dtype=torch.int64))
    for value in (-100, -1, 11):
        tokens = torch.zeros(2, 5, dtype=torch.int64)
        tokens[1, 4] = value
        with pytest.raises(ValueError, match=r"expected 0 … 10"):
            logprob(tokens)


def forward_backward(hidden: Tensor, layer: list[Tensor], tokens: Tensor, compiled: bool):
    """Run ``linear_sequence_logprob`` in inference mode, and with gradients forward and backward.

    Return [log-likelihoods, those of inference mode, gradients of the inputs], and shape and dtype of each
    tensor that is saved for the backward pass.
    """
    saved: list[tuple[torch.Size, torch.dtype]] = []
    inputs = [t.clone().requires_grad_() for t in (hidden, *layer)]
    arguments = (*inputs, *[None] * (2 - len(layer)), tokens, compiled)
    with torch.inference_mode():
        reference = linear_sequence_logprob(*arguments)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append((t.shape, t.dtype)) or t, lambda t: t
    ):
        value = linear_sequence_logprob(*arguments)
    (value * torch.linspace(-1, 1, len(value))).sum().backward()
    return [value.detach(), reference, *(t.grad for t in inputs)], saved


def compiled_and_eager(monkeypatch, backend: str, dtype: torch.dtype, bias: bool):
    """Yield the results of ``forward_backward``, compiled and eager, for batches of several sizes.

    A chunk has 7 tokens. Assert that three graphs serve all batches.
    """
    torch._dynamo.reset()
    counters.clear()
    compiler = partial(torch.compile, fullgraph=True, backend=backend)
    monkeypatch.setattr(models.log_likelihood, "compiled_function", cache(compiler))
    monkeypatch.setitem(models.utils.precision.LIKELIHOOD_LOGITS, "cpu", 512 * 7)
    torch.manual_seed(0)
    layer = [t.to(dtype) for t in (torch.randn(512, 16), torch.randn(512))[: 2 if bias else 1]]
    for images, length in ((3, 13), (3, 13), (2, 17), (4, 14), (1, 5)):
        hidden, tokens = torch.randn(images, length, 16, dtype=dtype), torch.randint(512, (images, length))
        yield [forward_backward(hidden, layer, tokens, compiled) for compiled in (True, False)]
        # One is for the policy's forward pass, one for the reference's, and one for the backward pass.
        assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


@pytest.mark.parametrize("dtype, bias", [(torch.float32, False), (torch.bfloat16, True)])
def test_aot_eager_is_bit_equal(dtype, bias, monkeypatch):
    """Compiled code saves no more tensors than eager code, and needs no new graph for another size."""
    for (compiled, saved), (eager, saved_by_eager) in compiled_and_eager(
        monkeypatch, "aot_eager", dtype, bias
    ):
        assert all(map(torch.equal, compiled, eager)) and len(compiled) == len(eager)
        assert saved == saved_by_eager
        assert max(shape.numel() for shape, _ in saved) == 512 * 16  # the weight


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_agrees_with_eager(dtype, bias, monkeypatch):
    """Inductor is the default compiler, and needs a C++ compiler.

    Measured relative errors: log-likelihoods 1e-7; gradients 1e-7 in float32 and 0 in bfloat16.
    """
    for (compiled, _), (eager, _) in compiled_and_eager(monkeypatch, "inductor", dtype, bias):
        for ours, expected in zip(compiled[:2], eager[:2], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
        for ours, expected in zip(compiled[2:], eager[2:], strict=True):
            assert ours.dtype == expected.dtype
            distance = (ours.double() - expected.double()).norm() / expected.double().norm()
            assert distance <= (1e-6 if dtype == torch.float32 else 1e-3)
