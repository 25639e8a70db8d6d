"""What the commands do, on the pretended GPU; each run gives the record of its operators.

Phases: "inputs", "generate", "decode", "encode", "step 0" and "step 1" (of one and of two
micro-batches), "features", "metrics".
"""

from functools import partialmethod
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks.blank import Blank
from benchmarks.pretended.gpu import DEVICE, OneProcess, fake_model, fill, pretended_gpu
from benchmarks.pretended.inductor import Writer, compiled_kernels
from benchmarks.pretended.recorder import Recorder
from cca.evaluation.features import INCEPTION, Extractor
from cca.evaluation.metrics import kernel_distance, precision_recall
from cca.sampling.compiled import CompiledGenerate, compiled_decoding
from cca.sampling.sampler import SampleRequest, decode_tokens, eager_generate, prepare, sample_tokens
from cca.training.losses import Batch, pair_labels
from cca.training.schedule import TrainingConfig
from cca.training.trainer import Trainer
from models import DTYPES, ZOO, SamplingOptions
from models.base import ARImageModel
from models.devices import LIKELIHOOD_LOGITS
from models.loading import build_model
from models.logprob import chunk_error, chunk_logprob
from scripts.extract_codes import encode


def request(count: int, dtype: str, eval_size: int | None = None, **options) -> SampleRequest:
    classes = tuple(range(1000))
    return SampleRequest(count, classes, "balanced", 0, eval_size, dtype, SamplingOptions(**options))


def sampled(
    name: str,
    images: int,
    dtype: str,
    image_size: int | None = None,
    layers: int | None = None,
    steps: int | None = None,
    **options,
) -> Recorder:
    """One batch of ``sample.py`` up to its tokens; ``steps``: no more decoding steps than that."""
    recorder = Recorder()
    with pretended_gpu():
        model = fake_model(name, image_size, layers=layers)
        prepare(model, dtype, DEVICE)
        model.step_sizes = model.step_sizes[:steps]
        wanted = request(images, dtype, cfg_schedule=model.default_cfg_schedule, **options)
        inner = eager_generate(model, wanted)

        def generate(labels: Tensor, uniforms: Tensor) -> Tensor:
            with recorder.phase("generate"):
                return inner(labels, uniforms)

        with recorder, recorder.phase("inputs"):
            tokens = sample_tokens(model, range(images), wanted, DEVICE, generate)
        assert tokens.shape == (images, model.sequence_length) and tokens.device == DEVICE
        assert tokens.dtype == torch.int64
    return recorder


def compiled_steps(name: str, images: int, dtype: str, **options) -> tuple[int, Writer]:
    """Compiled decoding of the whole model: kernels of its last step, and all that was compiled."""
    writer, recorder = Writer(), Recorder()
    torch._dynamo.reset()
    with pretended_gpu():
        model = fake_model(name).requires_grad_(False)
        prepare(model, dtype, DEVICE)
        eager = model.block_arguments

        def block_arguments(*arguments):  # what runs between the compiled parts
            with recorder:
                return eager(*arguments)

        wanted = SamplingOptions(cfg_schedule=model.default_cfg_schedule, **options)
        generate = CompiledGenerate(model, wanted, dtype, images, DEVICE, writer)
        with compiled_decoding():
            *others, (last, _) = generate.stages()
            for stage, _ in others:
                stage()
            writer.calls.clear()
            with mock.patch.object(model, "block_arguments", block_arguments):
                last()
    return sum(event.kernels for event in recorder.events) + writer.kernels().total(), writer


def kernels_of_likelihood(name: str, dtype: str) -> tuple[int, int]:
    """Kernels of the likelihood of a chunk of tokens and of its gradient by the logits: eager, compiled."""
    vocab = build_model(name).vocab_size
    rows, recorder, compiled = LIKELIHOOD_LOGITS["cuda"] // vocab, Recorder(), 0
    with pretended_gpu():
        layer = fake_model(name, layers=1).transformer.output_layer().requires_grad_(False).to(DEVICE)
        layer.to(DTYPES[dtype])
        numbers = [torch.zeros(rows, *width, device=DEVICE) for width in ((), (), (1,))]
        chunk = numbers[0].new_zeros(rows, layer.in_features, dtype=DTYPES[dtype])
        given = [chunk, torch.zeros(rows, dtype=torch.int64, device=DEVICE), layer.weight.detach()]
        bias = [] if layer.bias is None else [layer.bias.detach()]
        of_bias = [torch.zeros(vocab, device=DEVICE) for _ in bias]

        def forward(*tensors: Tensor) -> None:
            chunk_logprob(*tensors, *([] if bias else [None]))

        def backward(*tensors: Tensor) -> object:
            return chunk_error(*tensors, *([] if bias else [None, None]))

        calls = (
            (forward, [*numbers[:2], *given, *bias]),
            (backward, [*numbers[1:], *given, *bias, *of_bias]),
        )
        for function, inputs in calls:
            compiled += compiled_kernels(function, inputs).total()
            with recorder:
                function(*inputs)
    return sum(event.kernels for event in recorder.events), compiled


def decoded(
    name: str, images: int, dtype: str, eval_size: int | None = None, tokenizer: str | None = None
) -> Recorder:
    """Tokens to pixels, as ``sample.py`` does it."""
    recorder = Recorder()
    with pretended_gpu():
        model = _tokenizer_alone(name, tokenizer)
        prepare(model, dtype, DEVICE)
        tokens = torch.zeros(images, model.sequence_length, dtype=torch.int64, device=DEVICE)
        with recorder, recorder.phase("decode"):
            pixels = decode_tokens(model, tokens, request(images, dtype, eval_size))
        size = eval_size or model.image_size
        assert pixels.shape == (images, size, size, 3) and pixels.dtype == torch.uint8
        assert pixels.device.type == "cpu"
    return recorder


def compiled_decoder(name: str, images: int, dtype: str, tokenizer: str | None = None) -> Writer:
    """What decoding compiles, and calls for one batch."""
    writer, own = Writer(), nn.Module.compile
    torch._dynamo.reset()
    with pretended_gpu():
        model = _tokenizer_alone(name, tokenizer)
        with mock.patch.object(nn.Module, "compile", partialmethod(own, backend=writer)):
            prepare(model, dtype, DEVICE, compile=True)
        tokens = torch.zeros(images, model.sequence_length, dtype=torch.int64, device=DEVICE)
        decode_tokens(model, tokens, request(images, dtype))
    return writer


class NoTransformer(nn.Module):
    """In place of one that is not used."""

    def store_matrices(self, dtype: torch.dtype) -> None:
        pass


def _tokenizer_alone(name: str, tokenizer: str | None = None) -> ARImageModel:
    model = fake_model(name, tokenizer=tokenizer)
    model.transformer = NoTransformer()
    return model.to(DEVICE)


def trained(
    name: str,
    micro_batch: int,
    dtype: str,
    loss: str,
    image_size: int | None = None,
    layers: int | None = None,
    ema: float = 0.0,
    **options,
) -> Recorder:
    """Two optimizer steps, the first of one micro-batch and the second of two; ``options`` of Trainer."""
    recorder, recipe = Recorder(), ZOO[name].recipes["cca"]
    config = TrainingConfig(
        loss=loss, beta=recipe.beta, lambda_=recipe.lambda_, uncond_ratio=0.1, batch_size=2 * micro_batch,
        lr=recipe.lr, weight_decay=0.05, final_weight_decay=None, grad_clip=recipe.grad_clip, warmup=0.0,
        final_lr=1.0, schedule_accumulation=1, max_steps=2, ema=ema, seed=0, dtype=dtype,
    )  # fmt: skip
    with pretended_gpu():
        model = fake_model(name, image_size, layers=layers)
        with recorder, recorder.phase("setup"):
            trainer = Trainer(model, config, micro_batch, OneProcess(), **options)
        for step in range(2):
            images = micro_batch * (step + 1)
            labels, uncond = torch.arange(images), torch.zeros(images, dtype=torch.bool)
            tokens = torch.zeros(images, model.sequence_length, dtype=torch.int64)
            pairs = pair_labels(labels, uncond, model.null_class)
            with recorder, recorder.phase(f"step {step}"):
                metrics = trainer.optimizer_step(step, Batch(tokens, *pairs, uncond))
            assert "loss" in metrics and trainer.skipped == 0
        for key, parameter in trainer.net.named_parameters():
            assert parameter.device == DEVICE and parameter.dtype == torch.float32, key
    return recorder


def waits_of_training(recorder: Recorder) -> tuple[int, int]:
    """Host waits of each micro-batch, and of an optimizer step besides."""
    one, two = (len(recorder.waits(f"step {step}")) for step in range(2))
    return two - one, 2 * one - two


def encoded(name: str, images: int, tokenizer: str | None = None) -> Recorder:
    """A batch of images to tokens, as training on images does it."""
    recorder = Recorder()
    with pretended_gpu():
        model = _tokenizer_alone(name, tokenizer)
        size = model.image_size
        with recorder, recorder.phase("encode"):
            tokens = Blank(model, images).tokens(torch.zeros(images, 3, size, size, dtype=torch.uint8))
        assert tokens.shape == (images, model.sequence_length) and tokens.device == DEVICE
    return recorder


def extracted(name: str, images: int, crops: int, batch: int) -> Recorder:
    """A chunk of ``scripts.extract_codes``."""
    recorder = Recorder()
    with pretended_gpu():
        model = _tokenizer_alone(name)
        written: list[np.ndarray] = []
        file = SimpleNamespace(
            shape=(images, crops, model.sequence_length),
            write=lambda start, codes: written.append(codes),
            finish_chunk=lambda chunk: None,
        )
        with recorder, recorder.phase("encode"):
            encode(Blank(model, images, crops), range(images), file, batch, workers=0)
        assert sum(map(len, written)) == images and not any(codes.any() for codes in written)
    return recorder


def evaluated(images: int, size: int) -> Recorder:
    """Inception features of a batch, and the metrics that run on the GPU."""
    recorder = Recorder()
    with pretended_gpu():
        extractor = _inception()
        with recorder, recorder.phase("features"):
            found = extractor(torch.zeros(images, 3, size, size, dtype=torch.uint8))
        assert found.pooled.shape == (images, 2048) and found.spatial.shape == (images, 2023)
        assert found.pooled.device.type == found.probabilities.device.type == "cpu"
        features = np.zeros((1500, 2048), np.float32)
        with recorder, recorder.phase("metrics"):
            precision_recall(features, features, device=DEVICE)
            kernel_distance(features, features, subsets=2, device=DEVICE)
    return recorder


def _inception() -> Extractor:
    """The extractor as if its weights were in the cache, on the pretended GPU."""
    with _disable_current_modes(), torch.device("meta"):
        blank = mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict")
        download = mock.patch("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url")
        with blank, download:
            extractor = Extractor(INCEPTION, None, torch.device("meta"))
    fill(extractor.module)
    for part in extractor.module.modules():  # statistics of the norms
        for key, buffer in part._buffers.items():
            part._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    extractor.device = DEVICE
    extractor.module.to(DEVICE)
    return extractor
