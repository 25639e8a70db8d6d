"""The experiments: the commands that they plan, resuming, and their reports."""

import hashlib
import json
import os
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from test_documentation import module_and_options

import sample
import scripts.reproduce as reproduce
import train_var_cca
from models import ZOO
from models.utils.errors import UserError
from scripts.recipes import CCA, EXPERIMENTS, Row, Run, base_rows
from scripts.report import distances_to_curve, figures_table
from scripts.reproduce import Pipeline

LOSS_OPTIONS = (("dpo", "--beta 1 --lr 1e-6"), ("unlearning", "--lambda 1 --lr 1e-7"))
OPTIONS = {
    "var-tables": [],
    "llamagen-tables": ["--from-released"],
    "tradeoff": [],
    "with-guidance": [],
    "samples": [],
    "ablation": [word for loss, options in LOSS_OPTIONS for word in ("--loss-options", loss, options)],
}


def planned_commands(capsys, *arguments):
    """Return the commands of a dry run, as (module, arguments)."""
    reproduce.main([*arguments, "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    return [module_and_options(line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]


@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("experiment", [*OPTIONS, "quickstart"])
def test_planned_commands_parse(experiment, mini, capsys, tmp_path, monkeypatch):
    """The parsers of the commands accept them, no two have the same output, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    seeds = "1" if experiment == "samples" else "2"
    options = ["--mini", "--seeds", seeds] if mini else OPTIONS.get(experiment, ["--control"])
    commands = planned_commands(capsys, experiment, *options)
    for module, arguments in commands:
        parsed = module.make_parser().parse_args(arguments)
        assert parsed.output.is_relative_to("runs")
    outputs = [arguments[arguments.index("--output") + 1] for _, arguments in commands]
    assert len(outputs) == len(set(outputs)) > 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["llamagen-l", "var-d24", "llamagen-xl", "var-mini"])
def test_tradeoff_trainings_are_distinct(model):
    rows = EXPERIMENTS["tradeoff"].rows(model, Namespace())
    recipe = ZOO[model].recipes["cca"]
    defaults = {"--beta": f"{recipe.beta:g}", "--lambda": f"{recipe.lambda_:g}"}
    trainings = []
    for row in rows:
        if isinstance(row.weights, Run) and row.name != "sft":
            options = dict(zip(row.weights.options[::2], row.weights.options[1::2]))
            trainings.append(tuple((defaults | options).values()))
    assert len(trainings) == len(set(trainings)) > 4
    lines = {name: [row.series[name] for row in rows if name in row.series] for name in ("lambda", "beta")}
    assert recipe.lambda_ in lines["lambda"] and all(len(set(line)) == len(line) for line in lines.values())
    assert (0 in lines["lambda"]) == (model != "var-mini")


def test_unguided_var_with_and_without_filters(capsys):
    commands = planned_commands(capsys, "var-tables", "--models", "var-d24", "--from-released")
    filters = {
        tuple(a[a.index(option) + 1] if option in a else "preset" for option in ("--top-k", "--top-p"))
        for module, a in commands
        if module is sample and "base" in a and "published-cfg" not in a
    }
    assert filters == {("0", "1"), ("preset", "preset")}
    rows = EXPERIMENTS["var-tables"].rows("var-d24", Namespace(from_released=True))
    assert [row.published for row in rows if "no guidance" in row.label] == [None, None, 2.63]


def test_first_line_counts_the_work(capsys):
    reproduce.main(["ablation", "--mini", "--seeds", "2", "--models", "var-mini", "--dry-run"])
    line = capsys.readouterr().out.splitlines()[0]
    assert line == "ablation: 8 trainings and 10 samplings of 5,000 images, 50,000 in all."


def test_custom_base(capsys):
    commands = planned_commands(
        capsys, "quickstart", "--seeds", "2", "--base", "bases/{model}-{seed}.safetensors"
    )
    bases = {
        (Path(a[a.index("--weights") + 1]).name, a[a.index("--seed") + 1])
        for module, a in commands
        if module in (sample, train_var_cca) and "var-mini" in a and "bases" in a[a.index("--weights") + 1]
    }
    assert bases == {("var-mini-0.safetensors", "0"), ("var-mini-1.safetensors", "1")}


def test_losses_without_published_options(capsys):
    commands = planned_commands(capsys, "ablation", "--models", "var-d24")
    assert {"cca", "sft"} == {a[a.index("--loss") + 1] for module, a in commands if module is train_var_cca}
    rows = EXPERIMENTS["ablation"].rows("var-mini", Namespace(loss_options=[]))
    assert [row.name for row in rows] == ["base", "cca", "dpo", "unlearning", "sft"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tradeoff"], "--data: is required.*--mini"),
        (["tradeoff", "--mini", "--models", "var-d16"], "var-d16 does not go with --mini"),
        (["tradeoff", "--models", "var-mini"], "var-mini needs --mini"),
        (["ablation", "--from-released"], "--from-released: applies only to tables"),
        (["var-tables", "--data", "nowhere", "--reference", "none.npz"], "--data: nowhere: no such file"),
        (["var-tables", "--data", ".", "--reference", "none.npz"], "--reference: none.npz: no such file"),
        (["quickstart", "--base", "none/{model}-{seed}.pth"], "--base: none/llamagen-mini-0.pth: no such"),
        (["with-guidance", "--models", "var-d24", "--dry-run"], "no recipe for CCA with guidance on top"),
        (["tradeoff", "--mini", "--models", "var-d36"], "var-d36 does not go with --mini"),
        (["tradeoff", "--mini", "--class", "0"], "--class: .*samples"),
        (["quickstart", "--guidance", "0"], "--guidance: .*samples"),
        (["samples", "--mini", "--seeds", "2"], "--seeds: must be 1 for the experiment samples"),
    ],
)
def test_invalid_options(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        reproduce.main(arguments)
    assert not list(tmp_path.iterdir())


def test_published_reference_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["var-tables", "--data", ".", "--reference", "imagenet256"]
    rows = reproduce.resolve(reproduce.make_parser().parse_args(arguments))
    assert len(rows) == 4
    (tmp_path / "imagenet256").mkdir()
    with pytest.raises(UserError, match="--reference: .*write ./imagenet256"):
        reproduce.main(arguments)


def test_help_names_every_option():
    parser = reproduce.make_parser()
    options = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    assert all(re.search(rf"{name}\b(?!-)", parser.format_help()) for name in options | EXPERIMENTS.keys())


def test_mini_models_run_under_torchrun(monkeypatch, tmp_path):
    """``--nproc`` is not passed on, because torchrun would read it as an option of its own."""
    commands = []
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command) or exit())
    for nproc in (["--nproc", "3"], ["--nproc=3"]):
        with pytest.raises(SystemExit):
            reproduce.main(["quickstart", *nproc, "--output", str(tmp_path), "--control"])
        command = commands.pop()
        assert command[command.index("--nproc_per_node") + 1] == "3"
        assert command[-5:] == ["scripts.reproduce", "quickstart", "--output", str(tmp_path), "--control"]


class FakeLauncher:
    """Launcher that writes placeholders for the outputs of commands.

    stop_at: the number of the command, from 1, at which it raises KeyboardInterrupt; 0: never.
    """

    main, dry, world_size = True, False, 2

    def __init__(self, stop_at=0):
        self.commands, self.stop_at = [], stop_at

    def run(self, module, arguments):
        if len(self.commands) + 1 == self.stop_at:
            raise KeyboardInterrupt
        self.commands.append((module, arguments))
        options = dict(zip(arguments[::2], arguments[1::2]))
        output = Path(options["--output"])
        output.parent.mkdir(parents=True, exist_ok=True)
        if module == "sample":
            np.savez(output, arr_0=np.zeros((40, 32, 32, 3), np.uint8))
            output.with_suffix(".json").write_text(json.dumps({"images_per_second": 7.0}))
        elif module == "eval_fid":
            output.write_text(json.dumps({"metrics": self.metrics(output)}))
        else:
            output.mkdir(exist_ok=True)
            for name in ("model.pth", "model.pt", "header.json"):
                (output / name).touch()

    def metrics(self, output):
        return {"fid": 1.5, "is": 2.0}


def make_pipeline(folder, launcher, seed=0):
    options = {"data": "data.npz", "reference": "reference.npz", "features": "mini", "num_samples": 100}
    return Pipeline(folder, seed, launcher, Namespace(**options, base="base", output=folder, mini=False))


ROWS = [
    *base_rows("var-mini"),
    Row("var-mini", "cca", "CCA", CCA),
    Row("var-mini", "guided", "CCA", CCA, ("--cfg-scale", "2")),
]


def test_resume_after_every_command(tmp_path):
    whole = FakeLauncher()
    figures = make_pipeline(tmp_path / "whole", whole).run(ROWS)
    assert len(whole.commands) == 1 + 3 + 3  # one training serves two rows
    assert figures["var-mini-cca"] == {"fid": 1.5, "is": 2.0, "images_per_second": 7.0}
    for stop_at in range(1, len(whole.commands) + 1):
        folder, interrupted, resumed = tmp_path / f"{stop_at}", FakeLauncher(stop_at), FakeLauncher()
        with pytest.raises(KeyboardInterrupt):
            make_pipeline(folder, interrupted).run(ROWS)
        assert make_pipeline(folder, resumed).run(ROWS) == figures
        # A resumed experiment runs all commands again. Those that are finished return at once.
        assert [m for m, _ in resumed.commands] == [m for m, _ in whole.commands]


@pytest.fixture
def run_experiment(monkeypatch, tmp_path):
    """Return a function that runs an experiment with a fake launcher, and returns its folder.

    Each row and seed has metrics of its own.
    """

    class Launcher(FakeLauncher):
        def metrics(self, output):
            generator = np.random.default_rng(list(hashlib.sha256(str(output).encode()).digest()))
            names = ("fid", "is", "precision", "recall", "accuracy")
            return dict(zip(names, generator.uniform(1, 2, len(names))))

    monkeypatch.setattr(reproduce, "Launcher", lambda args: Launcher())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.npz").touch()

    def run(experiment, *options):
        inputs = ["--data", "given.npz", "--reference", "given.npz", "--output", "out", "--nproc", "1"]
        reproduce.main([experiment, "--mini", *inputs, *options])
        return tmp_path / "out"

    return run


def test_report_of_quickstart(run_experiment):
    folder = run_experiment("quickstart", "--control", "--seeds", "3")
    report = (folder / "report.md").read_text().replace("**", "")  # the best figures are bold
    for model in ("llamagen-mini", "var-mini"):
        seeds = [
            {
                path.stem.removeprefix(f"{model}-"): json.loads(path.read_text())["metrics"]["fid"]
                for path in (folder / name / "results").glob(f"{model}-*.json")
            }
            for name in (".", "seed-1", "seed-2")
        ]
        best = [min(fid for row, fid in fid_by_row.items() if "cfg" in row) for fid_by_row in seeds]
        fids = [
            best,
            *([fid_by_row[row] for fid_by_row in seeds] for row in ("base", "cca", "sft", "base-t0.8")),
        ]
        for values in fids:
            assert f"| {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} |" in report
        guided, base, cca, *_ = fids
        gaps = [(b - c) / (b - g) for b, c, g in zip(base, cca, guided)]
        assert f"closes {np.mean(gaps):.2f} ± {np.std(gaps, ddof=1):.2f} of the gap" in report
        assert "| control: base at temperature 0.8 |" in report
    assert "(paper: 1.02 to 1.33)" in report and "| base, best guidance" in report
    assert report.count("| control: maximum likelihood, no guidance |") == 2
    for picture in ("llamagen-mini.png", "var-mini.png", "fid.png"):
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG" and f"({picture})" in report


@pytest.mark.parametrize("experiment", OPTIONS)
def test_reports_of_the_paper(experiment, run_experiment):
    seeds = "1" if experiment == "samples" else "2"
    folder = run_experiment(experiment, "--seeds", seeds, "--models", "llamagen-mini")
    report = (folder / f"{experiment}.md").read_text().replace("**", "")
    assert f"scripts.reproduce {experiment} --mini" in report and "## llamagen-mini" in report
    assert ("seed 0, 1. Mean ±" in report) != (experiment == "samples")
    for picture in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"
    expected = {
        "tradeoff": "CCA over beta. ", "with-guidance": "Best FID: guidance alone 1.",
        "ablation": "order, llamagen-l: CCA (3.43) < unlearning (12.22) < base (19.00) < DPO (61.69).",
        "samples": "(samples-llamagen-mini-class5.png)",
    }  # fmt: skip
    assert expected.get(experiment, "| base, guidance 2 | 1.") in report


def test_distances_to_guidance_curve():
    curve = [(4.0, 1.0), (6.0, 0.5), (5.0, 0.6)]  # (IS, FID), in any order
    points = [(4.5, 0.8), (5.5, 0.5), (7.0, 0.1)]  # the last is beyond the curve
    assert distances_to_curve(curve, points) == pytest.approx([0.0, -0.05])


def test_table_states_published_figures_and_spread():
    rows = [Row("m", "a", "first", published=3.0), Row("m", "b", "second")]
    seeds = [{"m-a": {"fid": f}, "m-b": {"fid": 1.0}} for f in (3.0, 5.0)]
    lines = figures_table(rows, seeds).splitlines()
    assert lines[2] == "| first | 4.000 ± 1.414 | 3.00 | +1.000 ± 1.414 |"
    assert lines[3] == "| second | **1.000 ± 0.000** | – | – |"
