"""Compiled decoding: the eager tokens, one graph of each shape, and one mode for each file."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import sample
from cca.sampling.cuda_graphs import CompiledGenerate
from models import SamplingOptions, load_model
from models.kv_cache import StaticCache, StaticLayer
from models.llamagen import LlamaGenTransformer
from models.sampling import generate_tokens
from models.utils.errors import UserError

MODELS = ("llamagen-mini", "var-mini")
CPU = torch.device("cpu")
OPTIONS = {
    "free": SamplingOptions(),
    "guided": SamplingOptions(2.0, "linear", top_k=100, top_p=0.9, temperature=0.9),
    "guided in part": SamplingOptions(2.0, "constant", cfg_interval=3),
}
BATCH = 16


def differing_rows(model, options, counts, backend):
    """Share of rows whose tokens are not the eager ones, and the graphs compiled, after each batch."""
    torch._dynamo.reset()
    counters.clear()
    joined = copy.deepcopy(model)
    joined.transformer.join_matrices()
    generate = CompiledGenerate(joined, options, "float32", BATCH, CPU, backend)
    generator, differ, graphs = torch.Generator().manual_seed(0), [], []
    for count in counts:
        labels = torch.randint(10, (count,), generator=generator)
        uniforms = torch.rand(count, model.sequence_length, dtype=torch.float64, generator=generator)
        expected = generate_tokens(model, labels, uniforms, options)
        differ.append((generate(labels, uniforms) != expected).any(1))
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    return torch.cat(differ).double().mean().item(), graphs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", ["free", "guided in part"])
def test_tokens_and_graphs(name, options, monkeypatch):
    """As traced, without code generation: no graph break, and no graph more after the first batch.

    A step is three graphs; both blocks, here one at a time, are the same one. VAR's blocks are compiled for
    no tokens cached, for some, where none are stored, and for fewer rows; what comes after them for one
    token, for some, and for fewer rows; what comes before them for the last level alone.
    """
    monkeypatch.setattr("cca.sampling.cuda_graphs.BLOCKS_AT_ONCE", 1)
    model, chosen = load_model(name), OPTIONS[options]
    differ, graphs = differing_rows(model, chosen, (BATCH, 9, BATCH), "eager")
    shapes = 1 if chosen.cfg_interval is None else 2  # with the unconditional rows, and without
    expected = 3 * shapes if model.steps_alike else 1 + 1 + shapes + 2 + shapes
    assert graphs == 3 * [expected]
    assert differ <= 0.005


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_generated_code(name):
    """By the compiler that users get: greedy tokens are equal, of random ones hardly any differ."""
    model = load_model(name)
    for options, share in ((SamplingOptions(top_k=1), 0), (OPTIONS["guided"], 0.005)):
        differ, _ = differing_rows(model, options, [BATCH] * 20, "inductor")
        assert differ <= share


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_mask_of_several_lengths(backend, monkeypatch):
    """Where attention is not told how much of the cache counts, it reads one of a few lengths."""
    monkeypatch.setitem(CompiledGenerate.__init__.__globals__["LENGTHS"], "cpu", 4)
    differ, graphs = differing_rows(load_model("llamagen-mini"), OPTIONS["guided"], (BATCH, BATCH), backend)
    assert (differ, graphs) == (0, 2 * [1 + 4 + 1])  # the blocks' part alone depends on it


def test_attention_told_what_counts(monkeypatch):
    """As on a GPU in half precision."""
    for module in ("models.kv_cache", "cca.sampling.cuda_graphs"):
        monkeypatch.setattr(f"{module}.attends_to_part", lambda keys: True)
    differ, graphs = differing_rows(load_model("llamagen-mini"), OPTIONS["guided in part"], (BATCH,), "eager")
    assert (differ, graphs) == (0, [3 * 2])  # with the unconditional rows, and without


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_generated_code_reads_what_counts(monkeypatch):
    """As behind a mask, at every position of three blocks, the last not full."""
    found, length = [], 144
    for told in (True, False):
        torch.manual_seed(0)
        monkeypatch.setattr("models.kv_cache.attends_to_part", lambda keys, told=told: told)
        cache, attend = StaticCache(1, 2, 3, length, 16, torch.zeros(1)), StaticLayer.attend
        attend = torch.compile(attend, fullgraph=True, dynamic=False) if told else attend
        with torch.inference_mode():
            inputs = torch.randn(length, 3, 2, 3, 1, 16)
            outputs = [attend(*cache.at(torch.tensor([i])), *qkv) for i, qkv in enumerate(inputs)]
        found.append(torch.stack(outputs))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_heads_that_no_fused_kernel_takes():
    """LlamaGen-3B's have 100 numbers: the static cache fills them up to a multiple of 8, 16 at least."""
    config = replace(load_model("llamagen-mini").transformer.config, dim=60, heads=5)
    torch.manual_seed(0)
    model = load_model("llamagen-mini")
    model.transformer = LlamaGenTransformer(config)
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    assert model.begin(torch.tensor([0]), static=True).cache.layers[0][0].shape[-1] == 16
    assert differing_rows(model, OPTIONS["guided"], (BATCH,), "eager")[0] == 0


def test_attention_is_not_left_to_cudnn(monkeypatch):
    """It builds a plan for every length of the cache."""
    model, uniforms, allowed = load_model("var-mini"), torch.rand(1, 130, dtype=torch.float64), []
    attention = F.scaled_dot_product_attention

    def noting(function):
        def run(*arguments, **options):
            allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
            return function(*arguments, **options)

        return run

    assert torch.backends.cuda.cudnn_sdp_enabled()
    generate = CompiledGenerate(
        model, SamplingOptions(), "float32", 1, CPU, lambda module, _: noting(module.forward)
    )
    generate(torch.tensor([1]), uniforms)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noting(attention))
    generate_tokens(model, torch.tensor([1]), uniforms, SamplingOptions())
    assert len(allowed) > 20 and not any(allowed)


def test_logits_that_are_not_finite_mark_their_row():
    model, uniforms = load_model("llamagen-mini"), torch.rand(3, 64, dtype=torch.float64)
    with torch.no_grad():
        model.transformer.cls_embedding.embedding_table.weight[1] = torch.nan
    generate = CompiledGenerate(model, SamplingOptions(), "float32", 3, CPU, "eager")
    assert (generate(torch.tensor([0, 1, 2]), uniforms) < 0).all(1).tolist() == [False, True, False]
    assert (generate(torch.tensor([0, 2, 0]), uniforms) >= 0).all()


def test_one_mode_for_each_file(tmp_path, monkeypatch, capsys):
    """The mode is noted, and another is refused."""
    monkeypatch.setattr(
        "cca.sampling.sampler.CompiledGenerate",
        lambda *arguments: CompiledGenerate(*arguments, "eager"),
    )
    command = ["--model", "llamagen-mini", "--num-samples", "20", "--batch-size", "8"]
    for name, mode in (("eager", "--no-compile"), ("compiled", "--compile")):
        sample.main([*command, mode, "--output", str(tmp_path / f"{name}.npz")])
    files = [np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("eager", "compiled")]
    assert np.array_equal(*files)
    assert json.loads((tmp_path / "eager.json").read_text())["options"]["compile"] is False
    with pytest.raises(UserError, match="holds samples with compile False instead of True"):
        sample.main([*command, "--compile", "--output", str(tmp_path / "eager.npz")])
    sample.main([*command, "--output", str(tmp_path / "compiled.npz")])  # keeps to its mode
    assert "compiled.npz is there already, with these options" in capsys.readouterr().out
