"""Outputs that exist: finished evaluations and references, other options, and files of other programs."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_data import bundled

import eval_fid
from models.utils.errors import UserError
from scripts import make_reference

IMAGES = 20
EVALUATION = ["--features", "mini", "--samples", "samples.npz", "--reference", "reference.npz"]
REFERENCE = ["--features", "mini", "--images", "samples.npz"]
COMMANDS = {
    "eval_fid": (eval_fid, EVALUATION, Path("made.json")),
    "make_reference": (make_reference, REFERENCE, Path("made.npz")),
}
DESCRIPTION = json.dumps(
    {"format": 1, "kind": "samples", "options": {"num_samples": 20, "model": "var-mini"}}
)


def contents():
    """Return the content of each file in the current folder, by name."""
    return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


@pytest.fixture(params=COMMANDS)
def finished_output(evaluate, request, capsys):
    """Run a command; return its module, its options and its output."""
    module, options, output = COMMANDS[request.param]
    module.main([*options, "--output", str(output)])
    capsys.readouterr()
    return module, options, output


def test_finished_output_is_not_computed_again(finished_output, monkeypatch, capsys):
    module, options, output = finished_output
    before = contents()
    for place in ("extract", "extract_batches"):
        monkeypatch.setattr(f"cca.evaluation.evaluator.{place}", lambda *_: pytest.fail("extracted again"))
    monkeypatch.setattr(make_reference, "extract_batches", lambda *_: pytest.fail("extracted again"))
    shutil.copy("samples.npz", "moved.npz")  # inputs are compared by content, not by path
    module.main([*("moved.npz" if option == "samples.npz" else option for option in options),
                 "--output", str(output)])  # fmt: skip
    printed = capsys.readouterr().out
    assert f"{output} is finished already, with these options" in printed
    assert contents() == {**before, "moved.npz": before["samples.npz"]}
    if module is eval_fid:
        metrics = json.loads(output.read_text())["metrics"]
        assert all(f"  {name} " in printed for name in metrics)
        assert f"{metrics['fid']:10.4f}" in printed and "note: " in printed


def test_other_options_and_inputs_are_refused(finished_output):
    module, options, output = finished_output
    other = ["--metrics", "fid"] if module is eval_fid else ["--seed", "1"]
    command, before = [*options, "--output", str(output)], contents()
    with pytest.raises(UserError, match=f"--output: {output} holds .*(metrics|seed) .* instead of"):
        module.main([*command, *other])
    assert contents() == before
    images = bundled(IMAGES)
    np.savez("samples.npz", arr_0=images["arr_0"][::-1], arr_1=images["arr_1"])
    with pytest.raises(UserError, match=f"--output: {output} holds .*s_sha256 .* instead of"):
        module.main(command)
    assert contents() == {**before, "samples.npz": Path("samples.npz").read_bytes()}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("record", [None, DESCRIPTION, "{}", "[]", "notes of mine"])
def test_files_of_other_programs_are_not_replaced(evaluate, command, record):
    """The output exists without a record, or with one that another command such as sample.py wrote."""
    module, options, output = COMMANDS[command]
    output.write_bytes(b"somebody's")
    if record is not None:
        output.with_suffix(".json").write_text(record)
    before = contents()
    with pytest.raises(
        UserError, match="made.json: |--output: made.*(this version did not|no file beside|not )"
    ):
        module.main([*options, "--output", str(output)])
    assert contents() == before


def test_record_without_metrics_is_refused(evaluate):
    Path("made.json").write_text('{"format": 1, "kind": "results", "options": {}}')
    with pytest.raises(UserError, match="--output: made.json is not a result of eval_fid.py"):
        eval_fid.main([*EVALUATION, "--output", "made.json"])


def test_record_of_samples_is_not_replaced(evaluate):
    """The samples do not exist any more, but their record would be read as that of the reference."""
    Path("made.json").write_text(DESCRIPTION)
    with pytest.raises(UserError, match="made.json describes 'samples', not a reference"):
        make_reference.main([*REFERENCE, "--output", "made.npz"])
    assert Path("made.json").read_text() == DESCRIPTION and not Path("made.npz").exists()


@pytest.mark.parametrize(
    "module, option, output",
    [
        (eval_fid, "--samples", "photos/r.json"),
        (eval_fid, "--samples", "photos/new/r.json"),
        (eval_fid, "--reference", "photos/r.json"),
        (eval_fid, "--reference", "link/r.json"),
        (make_reference, "--images", "photos/new/r.npz"),
    ],
)
def test_output_inside_an_input_folder_is_refused(evaluate, write_folder, module, option, output):
    write_folder("photos", bundled(IMAGES)["arr_0"])
    Path("link").symlink_to("photos")
    before = sorted(Path("photos").rglob("*"))
    options = EVALUATION if module is eval_fid else REFERENCE
    # The last value of an option overrides the others.
    options = [*options, option, "photos", "--output", output]
    with pytest.raises(UserError, match=f"--output: {output} lies in what {option} reads"):
        module.main(options)
    assert sorted(Path("photos").rglob("*")) == before and "out.json" not in os.listdir()
