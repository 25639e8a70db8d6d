"""The reproduction scripts: every command that they would run, and that they go on where they stopped."""

import importlib
import json
import shlex
from pathlib import Path

import pytest

import scripts.reproduce as reproduce
from models.errors import UserError
from scripts.experiments import CCA, ablation_rows, base_row
from scripts.pipeline import Launcher, Pipeline, Row
from scripts.report import distances_to_curve, figures_table

GIVEN = (("dpo", "--beta 1 --lr 1e-6"), ("unlearning", "--lambda 1 --lr 1e-7"))
OPTIONS = {
    "var-tables": [],
    "llamagen-tables": ["--from-released"],
    "tradeoff": [],
    "with-guidance": [],
    "samples": [],
    "ablation": [word for loss, options in GIVEN for word in ("--loss-options", loss, options)],
}


def planned(capsys, *arguments):
    """Commands of a dry run, as (module, arguments)."""
    reproduce.main([*arguments, "--dry-run"])
    commands = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("$ "):
            words = shlex.split(line)[1:]
            start = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
            name, rest = (
                (words[start + 1], words[start + 2 :])
                if words[start] == "-m"
                else (words[start], words[start + 1 :])
            )
            commands.append((name.removesuffix(".py"), rest))
    return commands


@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("experiment", OPTIONS)
def test_every_planned_command_is_understood(experiment, mini, capsys, tmp_path, monkeypatch):
    """By the parsers of the commands themselves; nothing is written, and no step stands there twice."""
    monkeypatch.chdir(tmp_path)
    commands = planned(capsys, experiment, *(["--mini"] if mini else OPTIONS[experiment]))
    for module, arguments in commands:
        parsed = importlib.import_module(module).make_parser().parse_args(arguments)
        assert parsed.output.is_relative_to("runs")
    outputs = [arguments[arguments.index("--output") + 1] for _, arguments in commands]
    assert len(outputs) == len(set(outputs)) > 2
    assert not list(tmp_path.iterdir())


def test_losses_without_published_values_are_left_out(capsys):
    commands = planned(capsys, "ablation", "--models", "var-d24")
    assert {"cca", "sft"} == {a[a.index("--loss") + 1] for module, a in commands if module == "train_var_cca"}
    assert [row.name for row in ablation_rows("var-mini", {})] == ["base", "cca", "dpo", "unlearning", "sft"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tradeoff"], "--data: is required, or --mini"),
        (["tradeoff", "--mini", "--models", "var-d16"], "var-d16 does not go with --mini"),
        (["tradeoff", "--models", "var-mini"], "var-mini needs --mini"),
        (["ablation", "--from-released"], "--from-released: goes with"),
        (["var-tables", "--data", "nowhere", "--reference", "none.npz"], "--data: nowhere: no such file"),
        (["var-tables", "--nnodes", "2", "--dry-run"], "--rdzv-endpoint: several machines need one"),
        (["with-guidance", "--models", "var-d24", "--dry-run"], "no recipe for CCA with guidance on top"),
    ],
)
def test_wrong_options(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        reproduce.main(arguments)
    assert not list(tmp_path.iterdir())


class Pretender(Launcher):
    """Writes what the commands would, and stops at the n-th of them."""

    dry, processes = False, 2

    def __init__(self, stop_at=0):
        self.done, self.stop_at = [], stop_at

    def run(self, module, arguments):
        if len(self.done) + 1 == self.stop_at:
            raise KeyboardInterrupt
        self.done.append((module, arguments))
        options = dict(zip(arguments[::2], arguments[1::2]))
        output = Path(options["--output"])
        output.parent.mkdir(parents=True, exist_ok=True)
        if module.startswith("train"):
            output.mkdir()
            (output / "config.json").write_text(json.dumps({"options": {"batch_size": 10}}))
            (output / "metrics.jsonl").write_text('{"images_per_second": 5.0}\n' * 3)
            (output / "model.pth").touch()
        elif module == "sample":
            output.touch()
            output.with_suffix(".json").write_text(json.dumps({"images_per_second": 7.0}))
        else:
            output.write_text(json.dumps({"metrics": {"fid": 1.5, "is": 2.0}}))


def pipeline(folder, launcher, seed=0):
    return Pipeline(folder, folder, launcher, "data.npz", "reference.npz", "mini", 100, seed)


ROWS = [
    base_row("var-mini"),
    Row("var-mini", "cca", "CCA", CCA),
    Row("var-mini", "guided", "CCA", CCA, ("--cfg-scale", "2")),
]


def test_goes_on_after_every_command(tmp_path):
    whole = Pretender()
    figures = pipeline(tmp_path / "whole", whole).run(ROWS)
    assert len(whole.done) == 1 + 3 + 3  # one training serves two rows
    assert figures["var-mini-cca"] == {
        "fid": 1.5,
        "is": 2.0,
        "images_per_second": 7.0,
        "training_hours": 6.0 * 2 / 3600,
    }
    for stop_at in range(1, len(whole.done) + 1):
        folder, cut, rest = tmp_path / f"{stop_at}", Pretender(stop_at), Pretender()
        with pytest.raises(KeyboardInterrupt):
            pipeline(folder, cut).run(ROWS)
        assert pipeline(folder, rest).run(ROWS) == figures
        assert [m for m, _ in cut.done] + [m for m, _ in rest.done] == [m for m, _ in whole.done]


def test_results_of_other_options_are_refused(tmp_path):
    pipeline(tmp_path, Pretender()).claim()
    pipeline(tmp_path, Pretender()).claim()
    with pytest.raises(UserError, match="holds results with seed 0, not 1"):
        pipeline(tmp_path, Pretender(), seed=1).claim()


def test_distances_to_the_guidance_curve():
    curve = [(4.0, 1.0), (6.0, 0.5), (5.0, 0.6)]  # (IS, FID), in any order
    found = distances_to_curve(curve, [(4.5, 0.8), (5.5, 0.5), (7.0, 0.1)])  # the last lies beyond the curve
    assert found == pytest.approx([0.0, -0.05])


def test_table_states_published_figures_and_spread():
    rows = [Row("m", "a", "first", published=3.0), Row("m", "b", "second")]
    seeds = [
        {"m-a": {"fid": f, "images_per_second": 2.0}, "m-b": {"fid": 1.0, "images_per_second": 2.0}}
        for f in (3.0, 5.0)
    ]
    lines = figures_table(rows, seeds).splitlines()
    assert lines[2] == "| first | 4.000 ± 1.414 | 3.00 | +1.000 ± 1.414 | 2.0 ± 0.0 |"
    assert lines[3] == "| second | 1.000 ± 0.000 | – | – | 2.0 ± 0.0 |"
