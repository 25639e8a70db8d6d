"""The zoo against the manifests of the published checkpoints, and what README says of models."""

import json

import pytest
from commands import ROOT
from golden_models import GOLDEN

from models.__main__ import zoo_rows
from models.loading import build_model, model_names, recognise
from models.zoo import TOKENIZERS, ZOO

MANIFESTS = {
    path.stem: json.loads(path.read_text()) for path in sorted((GOLDEN / "manifests").glob("*.json"))
}
TOKENIZER_MANIFESTS = {
    "var-tokenizer-256": "vae_ch160v4096z32",
    "var-tokenizer-512": "vae_ch160v4096z32-512",
    "llamagen-vq-16": "vq_ds16_c2i",
    "llamagen-vq-8": "vq_ds8_c2i",
}


def module_of(manifest):
    if manifest in TOKENIZER_MANIFESTS:
        tokenizer = TOKENIZER_MANIFESTS[manifest]
        user = model_names(TOKENIZERS[tokenizer].backbone)[0]
        return build_model(user, tokenizer=tokenizer).tokenizer
    return build_model(manifest.removesuffix("-256").removesuffix("-512")).transformer


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifest(manifest):
    """Key for key, shape for shape, dtype for dtype: what is exported loads officially with strict=True."""
    expected, module = MANIFESTS[manifest], module_of(manifest)
    found = {k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in module.state_dict().items()}
    assert found == expected["state_dict"]
    assert sum(p.numel() for p in module.parameters()) == expected["parameters"]


def test_every_model_is_held_against_a_manifest():
    covered = {m.removesuffix("-256").removesuffix("-512") for m in MANIFESTS} - set(TOKENIZER_MANIFESTS)
    assert {name for name in ZOO if not name.endswith("-mini")} <= covered


@pytest.mark.parametrize(
    "manifest, name",
    [
        ("var-d16-256", "var-d16"),
        ("llamagen-xl", "llamagen-xl"),
        ("llamagen-vq-8", "the tokenizer vq_ds8_c2i"),
    ],
)
def test_recognised_by_content(manifest, name):
    assert recognise(module_of(manifest).state_dict()) == name


@pytest.mark.parametrize(
    "size, tokenizer, tokens",
    [(256, None, 256), (384, None, 576), (512, None, 1024), (256, "vq_ds8_c2i", 1024)],
)
def test_llamagen_sizes(size, tokenizer, tokens):
    model = build_model("llamagen-b", size, tokenizer)
    assert (model.sequence_length, model.image_size) == (tokens, size)


def test_readme_table_is_the_zoo():
    readme = (ROOT / "README.md").read_text()
    for row in zoo_rows():
        if not row["model"].endswith("-mini") and int(row["pixels"]) == ZOO[row["model"]].default_image_size:
            cells = (row[c] for c in ("model", "parameters", "pixels", "FID base", "FID guided", "FID CCA"))
            assert f"| {' | '.join(cells)} |" in readme


def test_recipes():
    """The published ones (method and its section on guidance on top); the control trains as CCA does."""
    found = {name: ZOO[name].recipes["cca"] for name in ("var-d16", "var-d30", "llamagen-l", "llamagen-3b")}
    assert {name: (r.lambda_, r.lr) for name, r in found.items()} == {
        "var-d16": (50, 2e-5), "var-d30": (1000, 2e-5), "llamagen-l": (300, 1e-5), "llamagen-3b": (500, 1e-5),
    }  # fmt: skip
    guided = {name: ZOO[name].recipes["with-guidance"] for name in ("llamagen-b", "llamagen-l")}
    assert {n: (r.beta, r.lambda_) for n, r in guided.items()} == {
        "llamagen-b": (0.1, 1),
        "llamagen-l": (0.02, 1),
    }
    assert all(entry.recipes["sft"] == entry.recipes["cca"] for entry in ZOO.values())


def test_example_of_the_readme():
    """It samples, and takes the gradient of CCA on the samples."""
    names = {}
    exec((ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0], names)
    assert names["images"].shape == (10, 3, 32, 32) and names["images"].abs().max() <= 1
    assert names["rewards"][0].shape == (10,) and names["model"].transformer.head.weight.grad.abs().sum() > 0
