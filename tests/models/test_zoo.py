"""The zoo against the manifests of the published checkpoints, and what README says of models."""

import json

import pytest
from commands import ROOT
from golden_models import GOLDEN

from models import __main__ as listing
from models.catalogue import figures_notes, figures_table, files_table, models_table
from models.loading import build_model, find_files, model_names, recognise
from models.plan import size_text
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


@pytest.mark.parametrize(
    "page, parts",
    [("README.md", (models_table,)), ("docs/models.md", (figures_table, figures_notes, files_table))],
)
def test_tables_of_the_pages_are_the_zoo(page, parts):
    text = (ROOT / page).read_text()
    for part in parts:
        assert f"\n\n{part()}\n\n" in text, f"{page} should say\n{part()}"


def test_published_figures():
    """Those of the paper's tables, CCA's and the bases' model zoos, digit by digit."""
    order = ("fid", "is", "sfid", "precision", "recall")
    found = {
        (name, sampled): tuple(figures.get(metric) for metric in order)
        for name, entry in ZOO.items()
        for sampled, figures in (entry.published.figures if entry.published else {}).items()
    }
    fid_alone = {
        "guided": {"var-d16": 3.55, "var-d20": 2.95, "var-d24": 2.33, "var-d30": 1.97, "llamagen-b": 6.09,
                   "llamagen-l": 3.07, "llamagen-xl": 2.62, "llamagen-xxl": 2.34},
        "cca": {"var-d16": 4.03, "var-d20": 3.02, "llamagen-b": 7.04, "llamagen-xl": 3.10,
                "llamagen-xxl": 3.12},
    }  # fmt: skip
    assert found == {
        **{
            (name, sampled): (fid, None, None, None, None)
            for sampled, fids in fid_alone.items()
            for name, fid in fids.items()
        },
        ("llamagen-3b", "base"): (9.38, 112.9, None, 0.69, 0.67),
        ("llamagen-3b", "guided"): (2.18, 263.3, None, None, None),
        ("llamagen-3b", "cca"): (2.69, 276.8, None, 0.80, 0.59),
        ("var-d30", "base"): (5.25, 175.6, None, 0.75, 0.62),
        ("var-d30", "cca"): (2.54, 264.2, None, 0.83, 0.56),
        ("llamagen-l", "base"): (19.00, 64.7, 8.78, 0.61, 0.67),
        ("llamagen-l", "dpo"): (61.69, 30.8, 44.98, 0.36, 0.40),
        ("llamagen-l", "unlearning"): (12.22, 111.6, 7.99, 0.66, 0.64),
        ("llamagen-l", "cca"): (3.43, 288.2, 7.44, 0.81, 0.52),
        ("var-d24", "base"): (6.20, 154.3, 8.50, 0.74, 0.62),
        ("var-d24", "dpo"): (7.53, 232.6, 19.10, 0.85, 0.34),
        ("var-d24", "unlearning"): (5.55, 165.9, 8.41, 0.75, 0.61),
        ("var-d24", "cca"): (2.63, 298.8, 7.63, 0.84, 0.55),
    }


def test_everything_as_json(capsys):
    """It is valid JSON, and names the same files as the list of published ones."""
    listing.main(["--json"])
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert set(content["models"]) == set(ZOO) and set(content["tokenizers"]) == set(TOKENIZERS)
    files = [row["weights"] for row in content["tokenizers"].values()]
    files += [f for m in content["models"].values() for s in m["image_sizes"] for f in s["weights"].values()]
    named = {f"{f['repository']}/{f['file']}" for f in files if f and f["repository"]}
    assert named == set((GOLDEN / "published_files.txt").read_text().split())
    model = content["models"]["llamagen-l"]
    assert model["parameters"] == MANIFESTS["llamagen-l"]["parameters"]
    assert model["published"]["figures"]["cca"]["fid"] == 3.43 and model["published"]["cfg_scale"] == 2.0
    assert model["recipes"]["with-guidance"]["lambda_"] == 1
    assert [size["tokens"] for size in model["image_sizes"]] == [256, 576, 1024]
    file = model["image_sizes"][1]["weights"]["base"]
    assert file["address"] == "https://huggingface.co/FoundationVision/LlamaGen/resolve/main/c2i_L_384.pt"
    bundled = content["models"]["var-mini"]["image_sizes"][0]["weights"]["base"]
    assert bundled["path"] == str(ROOT / "assets" / "var-mini.safetensors") and bundled["address"] is None
    assert bundled["approximate_bytes"] == (ROOT / "assets" / "var-mini.safetensors").stat().st_size


def test_what_would_be_downloaded(monkeypatch, tmp_path):
    """The files that are not here, and their sizes; a path, and what is bundled, is here."""
    monkeypatch.setattr("models.hub.try_to_load_from_cache", lambda *_: None)

    def downloads(*arguments):
        files = find_files(*arguments)
        return {download.name: size_text(download.size) for download in files.downloads(files.build())}

    assert downloads("llamagen-3b", "cca") == {
        "ChenDRAG/CCA_LlamaGen/CCA_LlamaGen_Guidance_Free/c2i_3B_384_CCA_0005000.pt": "12.4 GB",
        "FoundationVision/LlamaGen/vq_ds16_c2i.pt": "288 MB",
    }
    (tmp_path / "own.pth").write_bytes(b"")
    assert list(downloads("var-d16", str(tmp_path / "own.pth"))) == [
        "FoundationVision/var/vae_ch160v4096z32.pth"
    ]
    assert downloads("var-mini") == {}


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
