"""Several nodes give the results of one. Nodes that do not share their files end with one error line."""

import json

import numpy as np
import pytest
import torch
from commands import ROOT, TRAIN, content, finish, run, start_agents, start_processes
from made_data import bundled
from safetensors.torch import load_file, save_file

# Run each command on one rank per node, and print the messages of those that are refused.
COMMANDS = """
import json, sys
import cca.distributed, eval_fid, sample, train_var_cca
from models import UserError
from scripts import extract_codes, make_reference, reconstruct

cca.distributed.QUIET_SECONDS = 0
mains = {
    "train": train_var_cca.main, "sample": sample.main, "extract": extract_codes.main, "eval": eval_fid.main,
    "reconstruct": reconstruct.main, "reference": make_reference.main,
}
found = {}
for name, arguments in json.loads(sys.argv[1]):
    try:
        mains[name.split()[0]](arguments)
    except (UserError, SystemExit) as end:
        found[name] = str(end)
print(json.dumps(found))
"""


@pytest.fixture
def nodes(tmp_path):
    """Return two folders with equal data.npz, and with different other.npz and weights.safetensors."""
    (tmp_path / "commands.py").write_text(COMMANDS)
    weights = load_file(ROOT / "assets" / "var-mini.safetensors")
    images, labels = bundled(20).values()
    folders = [tmp_path / "one", tmp_path / "two"]
    for node, folder in enumerate(folders):
        folder.mkdir()
        np.savez(folder / "data.npz", arr_0=images, arr_1=labels)
        np.savez(folder / "other.npz", arr_0=images, arr_1=np.roll(labels, node))
        save_file({name: value + node for name, value in weights.items()}, folder / "weights.safetensors")
    return folders


def test_nodes_without_shared_files_are_refused(nodes, tmp_path):
    var, codes, data, output = ["--model", "var-mini"], ["--model", "llamagen-mini"], "data.npz", "--output"
    train, mini = [*var, "--batch-size", "4", "--max-steps", "2", "--data"], ["--features", "mini"]
    place, files = "--output: {} on ", "all nodes need the same options and files"
    calls = {
        "train": ([*train, data, output, "run"], place.format("run")),
        "sample": ([*var, "--num-samples", "8", output, "s.npz"], place.format("s.npz")),
        "extract": ([*codes, "--data", data, output, "codes"], place.format("codes")),
        "reconstruct": ([*codes, "--images", data, output, "r.npz"], place.format("r.npz")),
        "train on other data": ([*train, "other.npz", output, "run"], files),
        "train of other weights": ([*train, data, "--weights", "weights.safetensors", output, "run"], files),
        "eval": (["--samples", "other.npz", "--reference", data, *mini], files),
        "reference": (["--images", data, *mini, output, "reference.npz"], place.format("reference.npz")),
    }
    before = [content(node) for node in nodes]
    arguments = json.dumps([(name, line) for name, (line, _) in calls.items()])
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    ended = finish(start_processes([tmp_path / "commands.py", arguments], nodes, **variables))
    assert [status for status, _, _ in ended] == [0, 0], ended
    silent, refused = (json.loads(out.splitlines()[-1]) for _, out, _ in ended)
    assert silent == dict.fromkeys(calls, "2")
    for name, (_, message) in calls.items():
        assert message in refused[name] and "\n" not in refused[name]
    assert (
        "data_sha256" in refused["train on other data"]
        and "weights_sha256" in refused["train of other weights"]
    )
    assert [content(node) for node in nodes] == before


@pytest.mark.slow
def test_two_torchruns_match_one(tmp_path):
    def train_arguments(output):
        common = ["--model", "var-mini", "--data", ROOT / TRAIN, "--batch-size", 8, "--max-steps", 3]
        return [ROOT / "train_var_cca.py", *common, "--save-every", 2, "--output", output]

    def sample_arguments(output):
        weights = ["--weights", tmp_path / "one" / "model.pth"]
        return [ROOT / "sample.py", "--model", "var-mini", *weights, "--num-samples", 600, "--output", output]

    for command, one, two in (
        (train_arguments, tmp_path / "one", tmp_path / "two"),
        (sample_arguments, tmp_path / "one.npz", tmp_path / "two.npz"),
    ):
        run(*command(one), processes=2)
        ended = finish(start_agents(command(two), [tmp_path, tmp_path]))
        assert [status for status, _, _ in ended] == [0, 0], ended
    expected, found = (
        torch.load(tmp_path / name / "model.pth", weights_only=True) for name in ("one", "two")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
