"""The zoo against the manifests of the published checkpoints, and against the pages about models."""

import json
import re

import pytest
from commands import ROOT
from golden_models import GOLDEN

from models import __main__ as listing
from models.utils.errors import UserError
from models.zoo.hub import Download, require_space
from models.zoo.loading import build_model, model_names, recognise
from models.zoo.registry import TOKENIZERS, ZOO

MANIFESTS = {
    path.stem: json.loads(path.read_text()) for path in sorted((GOLDEN / "manifests").glob("*.json"))
}
TOKENIZER_MANIFESTS = {
    "var-tokenizer-256": "vae_ch160v4096z32",
    "var-tokenizer-512": "vae_ch160v4096z32-512",
    "llamagen-vq-16": "vq_ds16_c2i",
    "llamagen-vq-8": "vq_ds8_c2i",
}


def build_module(manifest):
    if manifest in TOKENIZER_MANIFESTS:
        tokenizer = TOKENIZER_MANIFESTS[manifest]
        user = model_names(TOKENIZERS[tokenizer].backbone)[0]
        return build_model(user, tokenizer=tokenizer).tokenizer
    return build_model(manifest.removesuffix("-256").removesuffix("-512")).transformer


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_state_dict_matches_manifest(manifest):
    """Keys, shapes and dtypes are equal. So the official code loads exported weights with strict=True."""
    expected, module = MANIFESTS[manifest], build_module(manifest)
    state_dict = {
        k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in module.state_dict().items()
    }
    assert state_dict == expected["state_dict"]
    assert sum(p.numel() for p in module.parameters()) == expected["parameters"]


def test_every_model_has_a_manifest():
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
def test_recognise_names_the_model(manifest, name):
    assert recognise(build_module(manifest).state_dict()) == name


@pytest.mark.parametrize(
    "size, tokenizer, tokens",
    [(256, None, 256), (384, None, 576), (512, None, 1024), (256, "vq_ds8_c2i", 1024)],
)
def test_llamagen_image_sizes(size, tokenizer, tokens):
    model = build_model("llamagen-b", size, tokenizer)
    assert (model.sequence_length, model.image_size) == (tokens, size)


DIGITS = {"fid": 2, "sfid": 2, "is": 1, "precision": 2, "recall": 2}
HUB = re.compile(r"\(https://huggingface.co/([^)]*)/blob/main/([^)]*)\)")


def model_rows(page):
    """Return the cells of every row about a model, from all tables on a page."""
    rows = (line.strip("| ").split(" | ") for line in (ROOT / page).read_text().splitlines())
    return [row for row in rows if row[0] in ZOO]


def test_published_figures_and_links():
    """README has the FIDs and the files of the default size; docs/models.md has all figures and files."""
    figures = {
        (name, sampled): [f"{values[m]:.{DIGITS[m]}f}" if m in values else "–" for m in DIGITS]
        for name, entry in ZOO.items()
        for sampled, values in (entry.published.figures if entry.published else {}).items()
    }
    files = {
        (name, str(size)): [(file.repository, file.file) for file in (base, entry.cca.get(size)) if file]
        for name, entry in ZOO.items()
        for size, base in entry.base.items()
    }
    short = [row for row in model_rows("README.md") if len(row) == 7]
    for name, _, pixels, *fids, links in short:
        expected = [figures.get((name, sampled), "–")[0] for sampled in ("base", "guided", "cca")]
        assert [fid.partition(" ")[0] for fid in fids] == expected, name
        assert HUB.findall(links) == files[name, pixels], name
    assert {row[0] for row in short} == {name for name in ZOO if not name.endswith("-mini")}
    whole = model_rows("docs/models.md")
    on_page = {
        (name, re.sub(r"base, (guided).*", r"\1", sampled).lower()): cells
        for name, sampled, *cells in whole
        if len(cells) == len(DIGITS)
    }
    assert on_page == figures
    on_page = {(name, size): HUB.findall(" ".join(rest)) for name, size, *rest in whole if size.isdigit()}
    assert on_page == {key: value for key, value in files.items() if value and value[0][0]}
    links_of_page = {"/".join(file) for file in HUB.findall((ROOT / "docs/models.md").read_text())}
    assert links_of_page == set((GOLDEN / "published_files.txt").read_text().split())


def test_json_listing(capsys):
    """The listing is valid JSON, and has the same files as the golden list of published files."""
    listing.main(["--json"])
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert set(content["models"]) == set(ZOO) and set(content["tokenizers"]) == set(TOKENIZERS)
    files = [row["weights"] for row in content["tokenizers"].values()]
    files += [f for m in content["models"].values() for s in m["image_sizes"] for f in s["weights"].values()]
    names = {f"{f['repository']}/{f['file']}" for f in files if f and f["repository"]}
    assert names == set((GOLDEN / "published_files.txt").read_text().split())
    model = content["models"]["llamagen-l"]
    assert model["parameters"] == MANIFESTS["llamagen-l"]["parameters"]
    assert model["published"]["figures"]["cca"]["fid"] == 3.43 and model["published"]["cfg_scale"] == 2.0
    assert model["recipes"]["with-guidance"]["lambda_"] == 1 and model["image_sizes"][1]["tokens"] == 576
    address = "https://huggingface.co/FoundationVision/LlamaGen/resolve/main/c2i_L_384.pt"
    assert model["image_sizes"][1]["weights"]["base"]["address"] == address
    bundled = content["models"]["var-mini"]["image_sizes"][0]["weights"]["base"]
    assert bundled["path"] == str(ROOT / "assets" / "var-mini.safetensors") and bundled["address"] is None
    assert bundled["approximate_bytes"] == (ROOT / "assets" / "var-mini.safetensors").stat().st_size


def test_download_folder_must_be_writable(tmp_path):
    """``require_space`` checks the folders of all files, not only of the first one."""
    (tmp_path / "cache").write_text("a file")
    files = [Download("some", 10, tmp_path, "--a"), Download("other", 10, tmp_path / "cache" / "x", "--b")]
    with pytest.raises(UserError, match="--b: other .*cache is not a writable folder"):
        require_space(files)


def test_recipes():
    """Recipes have the published values, for CCA and for CCA with guidance. SFT has the recipe of CCA."""
    recipes = {name: ZOO[name].recipes["cca"] for name in ("var-d16", "var-d30", "llamagen-l", "llamagen-3b")}
    assert {name: (r.lambda_, r.lr) for name, r in recipes.items()} == {
        "var-d16": (50, 2e-5), "var-d30": (1000, 2e-5), "llamagen-l": (300, 1e-5), "llamagen-3b": (500, 1e-5),
    }  # fmt: skip
    with_guidance = {name: ZOO[name].recipes["with-guidance"] for name in ("llamagen-b", "llamagen-l")}
    assert {n: (r.beta, r.lambda_) for n, r in with_guidance.items()} == {
        "llamagen-b": (0.1, 1),
        "llamagen-l": (0.02, 1),
    }
    assert all(entry.recipes["sft"] == entry.recipes["cca"] for entry in ZOO.values())


def test_readme_example():
    """The example samples images, and computes the gradient of CCA on them."""
    names = {}
    exec((ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0], names)
    assert names["images"].shape == (10, 3, 32, 32) and names["images"].abs().max() <= 1
    assert names["rewards"][0].shape == (10,) and names["model"].transformer.head.weight.grad.abs().sum() > 0
