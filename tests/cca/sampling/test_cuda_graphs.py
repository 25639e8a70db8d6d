"""Compiled decoding: same tokens as eager decoding, number of graphs, and the compile mode of a file."""

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


def compare_with_eager(model, options, counts, backend):
    """Return (share of images whose tokens differ from eager decoding, number of graphs after each batch)."""
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
    """Tracing (no code is generated) finds no graph break, and no batch after the first adds a graph.

    A step has three graphs: before the blocks, one block (all blocks share it), and after the blocks. If
    guidance ends early, graphs are added for fewer batch entries. VAR's blocks have a graph for an empty
    cache, one for a filled cache, and one for the last level, which is not stored in the cache. The part
    after VAR's blocks has one graph for a single token and one for several tokens. The part before VAR's
    blocks is compiled for the last level only.
    """
    monkeypatch.setattr("cca.sampling.cuda_graphs.BLOCKS_AT_ONCE", 1)
    model, chosen = load_model(name), OPTIONS[options]
    differ, graphs = compare_with_eager(model, chosen, (BATCH, 9, BATCH), "eager")
    shapes = 1 if chosen.cfg_interval is None else 2  # with the unconditional batch entries, and without
    expected = 3 * shapes if model.steps_alike else 1 + 1 + shapes + 2 + shapes
    assert graphs == 3 * [expected]
    assert differ <= 0.005


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_generated_code(name):
    """With inductor, greedy tokens are equal; sampled tokens differ for at most 0.5 % of the images."""
    model = load_model(name)
    for options, share in ((SamplingOptions(top_k=1), 0), (OPTIONS["guided"], 0.005)):
        differ, _ = compare_with_eager(model, options, [BATCH] * 20, "inductor")
        assert differ <= share


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_mask_with_several_lengths(backend, monkeypatch):
    """If attention cannot read only the filled part of the cache, it reads one of four fixed lengths."""
    monkeypatch.setitem(CompiledGenerate.__init__.__globals__["LENGTHS"], "cpu", 4)
    differ, graphs = compare_with_eager(
        load_model("llamagen-mini"), OPTIONS["guided"], (BATCH, BATCH), backend
    )
    assert (differ, graphs) == (0, 2 * [1 + 4 + 1])  # only the graph of the blocks depends on the length


def test_attention_to_filled_blocks(monkeypatch):
    """Attention reads only the filled blocks of the cache, as on a GPU in half precision."""
    for module in ("models.kv_cache", "cca.sampling.cuda_graphs"):
        monkeypatch.setattr(f"{module}.attends_to_part", lambda keys: True)
    differ, graphs = compare_with_eager(
        load_model("llamagen-mini"), OPTIONS["guided in part"], (BATCH,), "eager"
    )
    assert (differ, graphs) == (0, [3 * 2])  # with the unconditional batch entries, and without


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_generated_code_reads_filled_blocks(monkeypatch):
    """Outputs equal those with a mask at every position of three blocks, of which the last is not full."""
    results, length = [], 144
    for reads_part in (True, False):
        torch.manual_seed(0)
        monkeypatch.setattr("models.kv_cache.attends_to_part", lambda keys, reads_part=reads_part: reads_part)
        cache, attend = StaticCache(1, 2, 3, length, 16, torch.zeros(1)), StaticLayer.attend
        attend = torch.compile(attend, fullgraph=True, dynamic=False) if reads_part else attend
        with torch.inference_mode():
            inputs = torch.randn(length, 3, 2, 3, 1, 16)
            outputs = [attend(*cache.at(torch.tensor([i])), *qkv) for i, qkv in enumerate(inputs)]
        results.append(torch.stack(outputs))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_head_dimension_without_fused_kernel():
    """The static cache pads head dimensions (100 in LlamaGen-3B) to a multiple of 8, and at least to 16."""
    config = replace(load_model("llamagen-mini").transformer.config, dim=60, heads=5)
    torch.manual_seed(0)
    model = load_model("llamagen-mini")
    model.transformer = LlamaGenTransformer(config)
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    assert model.begin(torch.tensor([0]), static=True).cache.layers[0][0].shape[-1] == 16
    assert compare_with_eager(model, OPTIONS["guided"], (BATCH,), "eager")[0] == 0


def test_cudnn_attention_is_disabled(monkeypatch):
    """cuDNN would build a plan for every length of the cache."""
    model, uniforms, allowed = load_model("var-mini"), torch.rand(1, 130, dtype=torch.float64), []
    attention = F.scaled_dot_product_attention

    def record_setting(function):
        def run(*arguments, **options):
            allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
            return function(*arguments, **options)

        return run

    assert torch.backends.cuda.cudnn_sdp_enabled()
    generate = CompiledGenerate(
        model, SamplingOptions(), "float32", 1, CPU, lambda module, _: record_setting(module.forward)
    )
    generate(torch.tensor([1]), uniforms)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record_setting(attention))
    generate_tokens(model, torch.tensor([1]), uniforms, SamplingOptions())
    assert len(allowed) > 20 and not any(allowed)


def test_nonfinite_logits_mark_their_image():
    model, uniforms = load_model("llamagen-mini"), torch.rand(3, 64, dtype=torch.float64)
    with torch.no_grad():
        model.transformer.cls_embedding.embedding_table.weight[1] = torch.nan
    generate = CompiledGenerate(model, SamplingOptions(), "float32", 3, CPU, "eager")
    assert (generate(torch.tensor([0, 1, 2]), uniforms) < 0).all(1).tolist() == [False, True, False]
    assert (generate(torch.tensor([0, 2, 0]), uniforms) >= 0).all()


def test_file_keeps_its_compile_mode(tmp_path, monkeypatch, capsys):
    """The compile mode is recorded, and another mode is refused."""
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
    # Without an option, the command uses the recorded mode.
    sample.main([*command, "--output", str(tmp_path / "compiled.npz")])
    assert "compiled.npz is there already, with these options" in capsys.readouterr().out
