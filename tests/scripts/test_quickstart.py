"""The quickstart's report, from a summary; the whole quickstart is run by hand."""

import json

import numpy as np
import pytest

from scripts import mini_results
from scripts.quickstart_report import gaps_closed, write_report

SCALES = {"llamagen-mini": (1.25, 1.5), "var-mini": (2.0, 3.0)}


def summary(seed, control=True):
    generator = np.random.default_rng(seed)

    def figures(label, **more):
        more.setdefault("file", f"{len(label)}")
        names = ("fid", "is", "precision", "recall", "accuracy", "seconds_per_image")
        return {"label": label, **{name: float(generator.uniform(0.1, 1)) for name in names}, **more}

    def model(scales):
        main = {
            "base": figures("base, no guidance"),
            "guided": figures(f"base, best guidance (scale {scales[seed % 2]})"),
        }
        main["cca"] = figures("CCA, no guidance")
        if control:
            main["sft"] = figures("control: maximum likelihood, no guidance")
        sweep = [figures(f"base, guidance {s}", scale=s) for s in scales]
        cooler = [figures("control: base at temperature 0.8")] if control else []
        return {"best_scale": scales[0], "main": main, "sweep": sweep, "temperature": cooler}

    return {
        "models": {name: model(scales) for name, scales in SCALES.items()}, "wall_seconds": 1.0, "seed": seed,
        "samples": 40, "threads": 2, "processor": "a CPU", "versions": {"torch": "2"},
    }  # fmt: skip


def test_report(tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    content = summary(0)
    for results in content["models"].values():
        for kind in ("base", "guided", "cca"):
            file = tmp_path / "samples" / f"{results['main'][kind]['file']}.npz"
            np.savez(file, arr_0=np.zeros((40, 32, 32, 3), np.uint8), arr_1=np.arange(40) % 10)
    write_report(tmp_path, content)
    report = (tmp_path / "report.md").read_text()
    assert "base, best guidance (scale 1.25)" in report and "control: base at temperature 0.8" in report
    assert "(paper: 1.02 to 1.33)" in report
    for picture in ("llamagen-mini.png", "var-mini.png", "fid.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG" and f"({picture})" in report


def test_mean_and_spread(tmp_path):
    summaries = [summary(seed, control=seed < 2) for seed in (0, 1, 2)]
    folders = []
    for i, content in enumerate(summaries):
        folders.append(str(tmp_path / f"{i}"))
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "summary.json").write_text(json.dumps(content))
    mini_results.main([*folders, "--output", str(tmp_path / "mini.md")])
    text = (tmp_path / "mini.md").read_text()
    fids = [content["models"]["var-mini"]["main"]["cca"]["fid"] for content in summaries]
    assert f"{np.mean(fids):.3f} ± {np.std(fids, ddof=1):.3f}" in text
    assert "| base, best guidance |" in text  # not the same scale in all seeds
    assert "control: maximum likelihood" not in text  # nor in all of them


def test_gap():
    fids = {"base": {"fid": 1.0}, "guided": {"fid": 0.5}, "cca": {"fid": 0.6}}
    assert gaps_closed([{"main": fids}]) == pytest.approx([0.8])
