"""The quickstart's report, from a summary; the whole quickstart is run by hand."""

import json

import numpy as np

from scripts import mini_results
from scripts.quickstart_report import write_report


def summary(seed):
    generator = np.random.default_rng(seed)

    def metrics(**more):
        names = ("fid", "is", "precision", "recall", "accuracy", "seconds_per_image")
        return {name: float(generator.uniform(0.1, 1)) for name in names} | more

    def model(scales):
        kinds = {kind: metrics() for kind in ("base", "cca", "sft")}
        sweep = {str(s): metrics() for s in scales}
        return kinds | {
            "base_cfg": metrics(cfg_scale=scales[0]),
            "sweep": sweep,
            "temperature": {"0.8": metrics()},
        }

    return {
        "llamagen-mini": model((1.25, 1.5)), "var-mini": model((2.0, 3.0)), "wall_seconds": 1.0, "seed": seed,
        "samples": 40, "threads": 2, "processor": "a CPU", "versions": {"torch": "2"},
    }  # fmt: skip


def test_report(tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    for name in (
        "llamagen-mini-base",
        "llamagen-mini-base-cfg1.25",
        "llamagen-mini-cca",
        "var-mini-base",
        "var-mini-base-cfg2.0",
        "var-mini-cca",
    ):
        np.savez(tmp_path / "samples" / f"{name}.npz", arr_0=np.zeros((40, 32, 32, 3), np.uint8))
    write_report(tmp_path, summary(0))
    report = (tmp_path / "report.md").read_text()
    assert "base, best guidance (scale 1.25)" in report and "control: base at temperature 0.8" in report
    for picture in ("llamagen-mini.png", "var-mini.png", "fid.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG" and f"({picture})" in report


def test_mean_and_spread(tmp_path, monkeypatch):
    summaries = [summary(seed) for seed in (0, 1)]
    for i, content in enumerate(summaries):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "summary.json").write_text(json.dumps(content))
    monkeypatch.setattr(
        "sys.argv",
        ["mini_results", str(tmp_path / "0"), str(tmp_path / "1"), "--output", str(tmp_path / "mini.md")],
    )
    mini_results.main()
    fids = [content["var-mini"]["cca"]["fid"] for content in summaries]
    text = (tmp_path / "mini.md").read_text()
    assert f"{np.mean(fids):.3f} ± {np.std(fids, ddof=1):.3f}" in text
