"""``--compare``: the columns of the table, and the difference from a published figure."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT

import eval_fid
import sample
from models import ZOO
from models.utils.errors import UserError

IMAGES = 20
# What sample.py records with --preset published-cfg.
GUIDED = {
    "model": "var-d16", "weights": "base", "weights_sha256": "0123456789", "image_size": 256,
    "num_samples": 50_000, "classes": list(range(1000)), "eval_size": 256, "cfg_scale": 2.5,
    "cfg_schedule": "linear", "cfg_interval": None, "top_k": 900, "top_p": 0.96, "temperature": 1.0,
    "class_order": "balanced",
}  # fmt: skip
CCA = {**GUIDED, "weights": "runs/own", "loss": "cca", "cfg_scale": 1.0}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes the results of an evaluation as published, except for its arguments."""
    monkeypatch.chdir(tmp_path)

    def write(path, sampling=None, fid=4.0, samples=None, reference=None, features=None, **other):
        content = {
            "format": 1,
            "kind": "results",
            "options": {"resize": None},
            "metrics": {"fid": fid, "is": 250.0},
            "samples": {"file": f"{path}.npz", "count": 50_000, "sampling": sampling, **(samples or {})},
            "reference": {"file": "a.npz", "sha256": "aa", "published": "imagenet256", **(reference or {})},
            "features": {"extractor": "inception-v3-compat", "weights_sha256": "bb", **(features or {})},
            "notes": [],
            **other,
        }
        Path(path).write_text(json.dumps(content))
        return path

    return write


def table(capsys, *paths):
    """Return the rows of the table, each as a dict by column."""
    capsys.readouterr()
    eval_fid.main(["--compare", *paths])
    lines = [[cell.strip() for cell in line.split(" | ")] for line in capsys.readouterr().out.splitlines()]
    columns, _, *rows = ([cell.strip("| ") for cell in line] for line in lines)
    assert all(len(row) == len(columns) for row in rows)
    return [dict(zip(columns, row)) for row in rows]


def test_differences_from_published_figures(write, capsys):
    """The published FID of the guided base is the base's; that of CCA weights and CCA runs is CCA's."""
    published = {**GUIDED, "weights": "cca", "cfg_scale": 1.0}
    rows = table(capsys, write("a", GUIDED), write("b", published), write("c", CCA))
    assert [(row["published FID"], row["difference"]) for row in rows] == [
        ("3.55", "+0.450"),
        ("4.03", "-0.030"),
        ("4.03", "-0.030"),
    ]


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"samples": {"count": 1000}}, "count 1,000 instead of 50,000"),
        ({"features": {"extractor": "mini"}}, "features mini instead of inception-v3-compat"),
        (
            {"reference": {"published": None, "file": "x/imagenet256"}},
            "reference file imagenet256 instead of imagenet256",
        ),
        ({"options": {"resize": 256}}, "size 256 resized to 256 by --resize instead of 256"),
        ({"cfg_scale": 1.5}, "guidance 1.5 (linear, all steps) instead of 2.5 (linear, all steps)"),
        (
            {"cfg_schedule": "constant"},
            "guidance 2.5 (constant, all steps) instead of 2.5 (linear, all steps)",
        ),
        ({"cfg_interval": 5}, "guidance 2.5 (linear, 5 steps) instead of 2.5 (linear, all steps)"),
        ({"top_k": 0}, "filters temperature 1, top-k all, top-p 0.96 instead of"),
        ({"temperature": 0.9}, "filters temperature 0.9, top-k 900, top-p 0.96 instead of"),
        ({"eval_size": 128}, "size 256 resized to 128 instead of 256"),
        ({"classes": [2, 7]}, "classes 2, 7 instead of 1,000"),
        ({"weights": "cca"}, "no FID is published for var-d16, cca with guidance"),
        ({"weights": "runs/a", "loss": "cca"}, "no FID is published for var-d16, cca with guidance"),
        ({"weights": "base", "cfg_scale": 1.0}, "no FID is published for var-d16, base"),
        (
            {"weights": "w.pth", "cfg_scale": 1.0},
            "no FID is published for var-d16, weights of unknown",
        ),
        ({"weights": "runs/a", "loss": "sft", "cfg_scale": 1.0}, "no FID is published for var-d16, sft"),
        ({"model": "var-mini"}, "no FID is published for var-mini, guided"),
        ({"model": "other"}, "the sampling is not recorded"),
    ],
)
def test_reason_for_a_missing_difference(write, capsys, changed, reason):
    other_changes = {key: value for key, value in changed.items() if key not in (*GUIDED, "loss")}
    sampling = {**GUIDED, **{key: value for key, value in changed.items() if key not in other_changes}}
    (row,) = table(capsys, write("a", sampling, **other_changes))
    assert row["difference"].startswith(reason)


def test_columns(write, capsys):
    """The columns are what differs, and always the filters. Files are compared by content, not by name."""
    same = write("a", GUIDED), write("b", {**GUIDED, "weights": "a-copy.pth"}, reference={"file": "b.npz"})
    figures = ["fid", "sfid", "is", "precision", "recall", "kid", "published FID", "difference"]
    assert list(table(capsys, *same)[0]) == ["samples", "filters", *figures]
    other = write(
        "c",
        {**CCA, "weights_sha256": "ff"},
        samples={"count": 1000},
        reference={"sha256": "cc", "published": None},
        features={"weights_sha256": "dd"},
    )
    first, second = table(capsys, "a", other)
    assert [first[name] for name in ("weights", "guidance", "reference", "features", "count")] == [
        "var-d16, base (01234567)", "2.5 (linear, all steps)", "imagenet256 (aa)",
        "inception-v3-compat (bb)", "50,000",
    ]  # fmt: skip
    assert [second[name] for name in ("weights", "guidance", "reference", "features", "count")] == [
        "var-d16, runs/own, cca (ff)", "none", "file a.npz (cc)", "inception-v3-compat (dd)", "1,000",
    ]  # fmt: skip
    (unknown,) = table(capsys, write("d"))
    assert unknown["filters"] == "not recorded" and unknown["published FID"] == "–"


def test_file_name_is_escaped(write, capsys):
    write("odd", GUIDED, samples={"file": "runs/a|b\nc.npz"})
    assert table(capsys, "odd")[0]["samples"] == "a\\|b c.npz"


@pytest.mark.parametrize(
    "changed",
    [
        {"fid": float("nan")}, {"sampling": {**GUIDED, "top_p": float("inf")}}, {"fid": "4"},
        {"fid": None}, {"sampling": [1]}, {"sampling": {**GUIDED, "top_k": {}, "top_p": "1"}},
        {"sampling": {**GUIDED, "classes": 3}}, {"sampling": {**GUIDED, "loss": []}}, {"notes": 1},
        {"samples": {"count": "x"}}, {"reference": {"sha256": 5}}, {"kind": "samples"},
    ],
)  # fmt: skip
def test_invalid_results_are_refused(write, changed):
    write("r.json", **{"sampling": GUIDED, **changed})
    with pytest.raises(UserError, match="--compare: r.json is not a result of eval_fid.py"):
        eval_fid.main(["--compare", "r.json"])


@pytest.mark.parametrize("option", ["--output", "--samples", "--reference"])
def test_compare_excludes_other_options(write, option):
    write("r.json", GUIDED)
    with pytest.raises(UserError, match=f"{option}: does not go with --compare"):
        eval_fid.main(["--compare", "r.json", option, "new.json"])
    assert [path.name for path in Path().iterdir()] == ["r.json"]


def test_loss_is_recorded_with_samples(evaluate, capsys):
    """The loss comes from config.json of the run whose weights are sampled."""
    run = Path("run")
    run.mkdir()
    weights = run / ZOO["var-mini"].backbone.checkpoint_name
    weights.write_bytes((ROOT / "assets/var-mini.safetensors").read_bytes())
    (run / "config.json").write_text(json.dumps({"format": 1, "options": {"loss": "cca"}}))
    options = ["--model", "var-mini", "--num-samples", "20", "--output", "s.npz", "--weights"]
    sample.main([*options, str(run)])
    assert json.loads(Path("s.json").read_text())["options"]["loss"] == "cca"
    evaluate("s.npz", output="r.json")
    assert np.load("s.npz")["arr_0"].shape[0] == 20
    (row,) = table(capsys, "r.json")
    assert row["difference"] == "no FID is published for var-mini, cca"
