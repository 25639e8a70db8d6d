"""Models against results of the published code, and the guarantees of their interface."""

import pytest
import torch
from golden_models import LLAMAGEN_CASES, VAR_CASES, build, golden, logits_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.autoencoder import nearest_code
from models.sampling import SamplingOptions
from models.zoo.loading import load_model

ALL = LLAMAGEN_CASES + VAR_CASES


@pytest.fixture(scope="module", params=ALL)
def case(request):
    with torch.no_grad():
        yield build(request.param), golden(request.param)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_encoder_and_tokens(case):
    model, expected = case
    assert_close(model.tokenizer.latents(expected["image"]), expected["encoder_out"])
    assert torch.equal(model.encode(expected["image"]), expected["tokens"])


def test_decoded_images(case):
    model, expected = case
    # The published code clamps VAR's images, but not LlamaGen's.
    is_var = model.checkpoint_name == "model.pth"
    decode = model.decode if is_var else model.tokenizer.decode
    assert_close(decode(expected["tokens"]), expected["reconstruction"])
    for scale in (0.0, 1.5, 4.0) if is_var else (1.0, 2.0, 4.0):  # VAR's scale counts from 0
        images = decode(expected[f"greedy_tokens_cfg{scale}"].long())
        assert_close((images + 1) / 2 if is_var else images, expected[f"greedy_image_cfg{scale}"])


@pytest.mark.parametrize("name", VAR_CASES)
def test_teacher_forcing_input(name):
    expected = golden(name)
    with torch.no_grad():
        assert_close(
            build(name).tokenizer.teacher_forcing_input(expected["tokens"]), expected["teacher_forcing_input"]
        )


def greedy_tokens(model, scale, interval=None):
    options = SamplingOptions(scale, model.default_cfg_schedule, interval, top_k=1)
    return model.generate(torch.arange(4), torch.rand(4, model.sequence_length), options)


@pytest.mark.parametrize("name", ALL)
def test_outputs_match_published_code(name):
    assert logits_error(name, torch.device("cpu")) < 1e-4


@pytest.mark.parametrize("function", ["sequence_logprob", "logits", "decode"])
def test_invalid_tokens_raise(case, function):
    model, length = case[0], case[0].sequence_length

    def call(tokens, labels):
        return model.decode(tokens) if function == "decode" else getattr(model, function)(labels, tokens)

    labels, tokens = torch.arange(2), torch.zeros(2, length, dtype=torch.int64)
    call(tokens, labels)
    for wrong in (length - 1, length + 1, 1):
        with pytest.raises(ValueError, match=f"tokens are .*; expected .2, {length}."):
            call(torch.zeros(2, wrong, dtype=torch.int64), labels)
    for wrong in (-1, -100, model.vocab_size):
        with pytest.raises(ValueError, match="tokens are .*; expected 0 … "):
            call(tokens.index_fill(1, torch.tensor(length - 1), wrong), labels)
    for wrong in (labels[:1], labels[:, None]) if function != "decode" else ():
        with pytest.raises(ValueError, match="are .*; expected"):
            call(tokens, wrong)


@pytest.mark.parametrize("name", LLAMAGEN_CASES)
def test_guidance_interval(name):
    """The published interval 5 guides the first token and the decoding steps 0 to 5 after it: 7 tokens."""
    expected = golden(name)["greedy_tokens_cfg4.0_interval5"].long()
    assert torch.equal(greedy_tokens(build(name), 4.0, interval=7), expected)


def test_generation_agrees_with_teacher_forcing(case):
    """Each greedy token of cached decoding is the argmax of the teacher-forced logits."""
    model, _ = case
    tokens = greedy_tokens(model, 1.0)
    assert torch.equal(model.logits(torch.arange(4), tokens).argmax(-1), tokens)


def test_no_unconditional_pass_without_guidance(case, monkeypatch):
    model, _ = case
    batch_sizes = []
    begin = type(model).begin
    monkeypatch.setattr(
        type(model), "begin", lambda self, labels: batch_sizes.append(len(labels)) or begin(self, labels)
    )
    greedy_tokens(model, 1.0)
    greedy_tokens(model, 2.0)
    assert batch_sizes == [4, 8]


@pytest.mark.parametrize("name", ALL)
def test_forward_flops(name):
    """PyTorch counts the same FLOPs within 0.1 %, and twice as many in the backward pass within 0.5 %."""
    model = build(name)
    labels, tokens = (
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, model.sequence_length, dtype=torch.int64),
    )
    inputs = model.inputs(tokens)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # on a CPU, PyTorch counts only this kernel
        with FlopCounterMode(display=False) as forward:
            logits = model.transformer.logits(labels, inputs)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    expected = 2 * model.forward_flops()
    assert forward.get_total_flops() == pytest.approx(expected, rel=1e-3)
    assert backward.get_total_flops() == pytest.approx(2 * expected, rel=5e-3)


def test_nearest_code_uses_float32():
    """Autocast and the matmul precision have no effect. In 16 bits, some of these codes are equal."""
    codebook = torch.stack([1 + torch.arange(64) / 1000, torch.ones(64)], dim=1)
    expected, before = torch.arange(64), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal((codebook @ codebook.T - codebook.square().sum(1) / 2).argmax(1), expected)
            assert torch.equal(nearest_code(codebook, codebook), expected)
            assert torch.get_float32_matmul_precision() == "medium"
            assert (codebook @ codebook.T).dtype == torch.bfloat16
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llamagen-mini", "var-mini"])
def test_output_layer_uses_autocast(name, dtype):
    """As in the published code, logits have 16 bits, and are one rounding or less from float32 logits."""
    torch.manual_seed(0)
    model, labels = load_model(name), torch.arange(8)
    tokens = torch.randint(model.vocab_size, (8, model.sequence_length))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        hidden = model.transformer.hidden(labels, model.inputs(tokens))
        logits = model.transformer.to_logits(hidden)
        with torch.autocast("cpu", enabled=False):
            exact = model.transformer.to_logits(hidden.float())
    assert torch.equal(logits.to(dtype).float(), logits)
    assert (logits - exact).abs().max() < torch.finfo(dtype).eps * exact.abs().max()
