"""Fuzz the commands with thousands of damaged files and random option values. Run by hand with -m slow.

    FUZZ_FILES=200 FUZZ_OPTIONS=50 pytest -m slow tests/test_fuzz.py

Each case runs a command in a forked child of this process, which has imported everything. The command must
end with status 0, or print one error line, change nothing on disk and end with status 2. It may take 30 s of
CPU time and 2 GB of resident memory. Some files are read only during the work. If such a file is damaged, the
work may stop, and the same command must resume after the file is restored.

Environment variables: FUZZ_FILES is the number of damaged files per reader (default: 2000). FUZZ_OPTIONS is
the number of command lines per command (default: 300). FUZZ_SEED is the seed (default: 0). Each test prints a
summary.
"""

import collections
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from made_data import bundled, make_codes
from PIL import Image
from safetensors.torch import save_file
from specimens import SPECIMENS, register, tokenizer, weights

import eval_fid
import sample
import train_llamagen_cca
import train_var_cca
from cca.cli.main import run_command
from models.zoo.checkpoint_formats import read_state_dict
from models.zoo.loading import recognise
from scripts import convert_weights, extract_codes, make_reference

FILES = int(os.environ.get("FUZZ_FILES", 2000))
LINES = int(os.environ.get("FUZZ_OPTIONS", 300))
SEED = int(os.environ.get("FUZZ_SEED", 0))
PROGRESS = re.compile(r"%\||/s\]|\[\d\d:\d\d")  # progress bars of tqdm
DIVERGED = "the trained weights are not finite"  # not a refusal: the work was done and is on disk
SECONDS, PATIENCE, MEGABYTES = 30, 300, 2000  # limits: CPU time; wall time; resident memory

pytestmark = pytest.mark.slow

# Random options are tried on the mini models, damaged files mostly on the specimens, which are faster.
STEP = ["--batch-size", "8", "--max-steps", "1", "--output", "out"]
SAMPLE = ["--model", "llamagen-mini", "--num-samples", "1", "--output", "out.npz"]
ENCODE = ["--model", "llamagen-mini", "--data", "good.npz", "--output", "out"]
EVAL = ["--reference", "good.npz", "--features", "mini", "--samples"]
SMALL_SAMPLE = [*weights("llamagen"), "--num-samples", "1", "--output"]
SMALL_ENCODE = [*tokenizer("llamagen"), "--data", "small.npz"]
SMALL_TRAIN = [*weights("llamagen"), *STEP]
# Reader: (files, of which each case damages one; module and options of the command that reads them).
READERS = {
    "codes": (
        ["small-codes/codes.npy", "small-codes/labels.npy", "small-codes/header.json"],
        train_llamagen_cca, [*SMALL_TRAIN, "--codes", "small-codes"],
    ),
    "published-codes": (
        [f"published/imagenet8_{kind}/{i}.npy" for kind in ("codes", "labels") for i in (0, 7, 15)],
        train_llamagen_cca, [*SMALL_TRAIN, "--codes", "published"],
    ),
    "run-folder": (
        ["run/config.json", "run/metrics.jsonl"],
        train_llamagen_cca, [*SMALL_TRAIN[:-1], "run", "--codes", "small-codes"],
    ),
    "run-state": (
        [f"run/state/step-1/{file}" for file in (".metadata", "__0_0.distcp", "sha256-0.json")],
        train_llamagen_cca, [*SMALL_TRAIN[:-1], "run", "--codes", "small-codes"],
    ),
    "run-state-unchecked": (
        [f"old-run/state/step-1/{file}" for file in (".metadata", "__0_0.distcp")],
        train_llamagen_cca, [*SMALL_TRAIN[:-1], "old-run", "--codes", "small-codes"],
    ),
    "unfinished-codes": (
        ["unfinished/progress/header.json", "unfinished/progress/00000000.npy"],
        extract_codes, [*SMALL_ENCODE, "--output", "unfinished"],
    ),
    "classes-from": (
        ["classes.json"],
        extract_codes, [*SMALL_ENCODE[:-1], "photos", "--classes-from", "classes.json", "--output", "out"],
    ),
    "images-encoded": (
        ["photos/cat/0.png", "photos/cat/4.png", "photos/dog/1.jpg", "photos/dog/5.jpg"],
        extract_codes, [*SMALL_ENCODE[:-1], "photos", "--classes-from", "classes.json", "--output", "out"],
    ),
    "images-evaluated": (
        ["photos/cat/0.png", "photos/cat/4.png", "photos/dog/1.jpg", "photos/dog/5.jpg"],
        eval_fid, [*EVAL, "photos"],
    ),
    "compared": (["results.json"], eval_fid, ["--compare", "results.json"]),
    "sample-parts": (
        ["parts.npz.parts/options.json", "parts.npz.parts/00000000.npy"], sample, [*SMALL_SAMPLE, "parts.npz"]
    ),
    "samples-finished": (["made.npz", "made.json"], sample, [*SMALL_SAMPLE, "made.npz"]),
    "json-beside-samples": (["good.json"], eval_fid, [*EVAL, "good.npz"]),
    "npz-statistics": (["ref.npz"], eval_fid, [*EVAL[2:], "good.npz", "--reference", "ref.npz"]),
    "npz-evaluated": (["good.npz"], eval_fid, [*EVAL, "good.npz"]),
    "npz-deflated": (["deflated.npz"], eval_fid, [*EVAL, "deflated.npz"]),
    "npz-trained-on": (["small.npz"], train_var_cca, [*weights("var"), *STEP, "--data", "small.npz"]),
    "npz-encoded": (
        ["small.npz"], extract_codes, [*SMALL_ENCODE, "--output", "out"],
    ),
    "weights-zip": (["w.pt"], sample, [*SMALL_SAMPLE, "out.npz", "--weights", "w.pt"]),
    "weights-legacy": (["w.pth"], sample, [*SMALL_SAMPLE, "out.npz", "--weights", "w.pth"]),
    "weights-safetensors": (
        ["w.safetensors"], sample, [*SMALL_SAMPLE, "out.npz", "--weights", "w.safetensors"]
    ),
    "weights-of-state": (
        [f"old-run/state/step-1/{file}" for file in (".metadata", "__0_0.distcp")],
        sample, [*SMALL_SAMPLE, "out.npz", "--weights", "old-run/state/step-1"],
    ),
    "weights-shards": (
        ["shards/m.safetensors.index.json"], sample, [*SMALL_SAMPLE, "out.npz", "--weights", "shards"]
    ),
    "weights-converted": (["w.pt", "w.safetensors"], convert_weights, ["w.pt", "out.safetensors"]),
}  # fmt: skip
# Files that are read during the work. A damaged one may stop the command, which must resume once the file is
# restored.
READ_AT_WORK = re.compile(r"published/.*|(parts.npz.parts|unfinished/progress)/00000000.npy")
COMMANDS = {
    "sample": (sample, SAMPLE),
    "eval_fid": (eval_fid, [*EVAL, "good.npz"]),
    "train_var_cca": (train_var_cca, ["--model", "var-mini", *STEP, "--data", "good.npz"]),
    "train_llamagen_cca": (train_llamagen_cca, ["--model", "llamagen-mini", *STEP, "--codes", "codes"]),
    "extract_codes": (extract_codes, ENCODE),
    "make_reference": (make_reference, ["--images", "good.npz", "--features", "mini", "--output", "out.npz"]),
}
# ENDLESS: a large value is valid, but takes hours or starts many processes. LEFT_OUT: compilation takes
# minutes, and --help runs nothing.
ENDLESS = ("--max-steps", "--epochs", "--workers")
LEFT_OUT = ("--compile", "--help")
SMALL = (
    "0", "1", "2", "3", "-1", "-0", "0.5", "1e-46", "1e-5", "", " ", "a", "0x10", "1_0", "٣", "é\n", "none",
    "0,1", "1,", ",", "9" * 5000, "x" * 300, "../x", "good.npz", "codes", "shards", "deflated.npz",
    "no/such/x", "nan", "inf", "-inf", "-1e309", "True", "--", "base", "cca", "\udcff",
)  # fmt: skip
LARGE = ("1e300", "9223372036854775807", "9223372036854775808", "4611686018427387904", "1e38")
JSON_VALUES = (
    "null",
    "[]",
    "{}",
    "-1",
    "1e999",
    "NaN",
    '"x"',
    "true",
    "3.5",
    "[" * 50_000,
    '{"a": [1]}',
    "9" * 400,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Return a folder with undamaged files of each kind."""
    register(pytest.MonkeyPatch())
    recognise({})  # fill its cache; otherwise each child would build all models again
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("fuzz") / "template"
    folder.mkdir()
    for file in SPECIMENS.glob("specimen-*.safetensors"):
        shutil.copy2(file, folder)
    state = {k: v.clone() for k, v in read_state_dict(folder / "specimen-llamagen.safetensors").items()}
    torch.save({"model": state, "steps": np.float64(3), "args": {"lr": 1e-4}}, folder / "w.pt")
    torch.save({"model": state}, folder / "w.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "w.safetensors")
    (folder / "shards").mkdir()
    save_file(state, folder / "shards/m-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "m-1.safetensors")}
    (folder / "shards/m.safetensors.index.json").write_text(json.dumps(index))
    arrays = bundled(16)
    np.savez(folder / "good.npz", **arrays)
    np.savez_compressed(folder / "deflated.npz", **arrays)
    options = {"model": "var-mini", "cfg_scale": 1.0, "num_samples": 16}
    (folder / "good.json").write_text(json.dumps({"format": 1, "options": options}))
    make_codes(folder, images=16)
    np.savez(folder / "small.npz", **bundled(16, SPECIMENS / "few.npz"))
    shutil.copy2(SPECIMENS / "images.npz", folder)
    for i, image in enumerate(arrays["arr_0"]):
        path = folder / "photos" / (f"dog/{i}.jpg" if i % 2 else f"cat/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (folder / "classes.json").write_text(json.dumps({"cat": 3, "dog": 1}))
    for module, arguments in (
        (make_reference, ["--images", "good.npz", "--features", "mini", "--output", "ref.npz"]),
        (extract_codes, [*SMALL_ENCODE, "--output", "small-codes"]),
        (train_llamagen_cca, READERS["run-folder"][2]),
        (eval_fid, [*EVAL, "good.npz", "--output", "results.json"]),
        (sample, READERS["samples-finished"][2]),
    ):
        outcome = run_child(module.main, arguments, folder)
        assert outcome.status == 0, outcome.errors
    for kind in ("codes", "labels"):
        (folder / f"published/imagenet8_{kind}").mkdir(parents=True)
        for i, row in enumerate(np.load(folder / "small-codes" / f"{kind}.npy")):
            np.save(folder / f"published/imagenet8_{kind}/{i}.npy", row[None])
    shutil.copytree(folder / "run", folder / "old-run")  # like a run whose version wrote no checksums
    (folder / "old-run" / "state" / "step-1" / "sha256-0.json").unlink()
    parts = folder / "parts.npz.parts"  # unfinished samples with all their parts
    parts.mkdir()
    made = json.loads((folder / "made.json").read_text())
    marker = {"format": 1, "kind": "samples", "options": made["options"]}
    (parts / "options.json").write_text(json.dumps(marker))
    with np.load(folder / "made.npz") as file:
        np.save(parts / "00000000.npy", file["arr_0"])
    progress = folder / "unfinished" / "progress"  # unfinished codes with all their parts
    progress.mkdir(parents=True)
    shutil.copy2(folder / "small-codes" / "header.json", progress)
    shutil.copy2(folder / "small-codes" / "codes.npy", progress / "00000000.npy")
    return folder


Outcome = collections.namedtuple("Outcome", "status errors seconds megabytes")


def run_child(main, arguments: list[str], folder: Path) -> Outcome:
    """Run a command in a forked child. The status is its exit status, or minus the signal that ended it."""
    log = folder.parent / "stderr"
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
            resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))  # protects the machine
            signal.alarm(PATIENCE)
            for name, target, path in (("stdout", 1, os.devnull), ("stderr", 2, log)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
                stream = os.fdopen(target, "w", 1, "utf-8", closefd=False)
                setattr(sys, name, stream)
                setattr(sys, f"__{name}__", stream)
            os.environ.update(XDG_CACHE_HOME=str(folder.parent.parent / "cache"), HF_HUB_OFFLINE="1")
            run_command(lambda: main(arguments))
            status = 0
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        os._exit(status)
    _, status, usage = os.wait4(child, 0)
    errors = log.read_text(errors="replace") if log.exists() else ""
    seconds = usage.ru_utime + usage.ru_stime
    return Outcome(os.waitstatus_to_exitcode(status), errors, seconds, usage.ru_maxrss / 1000)


def snapshot(folder: Path) -> dict[str, tuple]:
    """Return type and permissions of each path in a folder, and the modification times of files."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: (p.lstat().st_mode, p.is_file() and p.lstat().st_mtime_ns) for name, p in found.items()}


def find_problem(outcome: Outcome, changed: set[str]) -> str | None:
    """Return what is wrong with the outcome of a case, or None. ``changed``: the paths that it changed."""
    diverged = outcome.status == 2 and DIVERGED in outcome.errors
    printed = outcome.errors.replace("\r", "\n").splitlines()
    lines = [line for line in printed if line.strip() and not PROGRESS.search(line)]
    if outcome.status not in (0, 2):
        return f"status {outcome.status}: {lines[-1] if lines else 'no word'}"
    if "Traceback" in outcome.errors:
        return f"traceback with status {outcome.status}: {lines[-1]}"
    if diverged:
        lines, changed = [line for line in lines if not line.startswith("note: ")], set()
    if outcome.status == 2 and (len(lines) != 1 or not lines[0].startswith("error: ")):
        return f"{len(lines)} lines: {' / '.join(lines[:3])}"
    if outcome.status == 2 and changed:
        return f"refused ({lines[0][:80]}), yet on disk: {', '.join(sorted(changed)[:4])}"
    if outcome.seconds > SECONDS or outcome.megabytes > MEGABYTES:
        return f"{outcome.seconds:.0f} s, {outcome.megabytes:.0f} MB"
    return None


def copy_if_missing(source: str, target: str) -> None:
    if not os.path.lexists(target):
        shutil.copy2(source, target)


class Campaign:
    """Cases of one kind, run in one folder that is restored after each case. Collects the problems."""

    def __init__(self, name: str, template: Path):
        self.name, self.template, self.folder = name, template, template.parent / "work" / "here"
        self.statuses: collections.Counter[int] = collections.Counter()
        self.problems: dict[str, list] = {}
        self.slowest = self.largest = 0.0
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        shutil.copytree(self.template, self.folder)

    def restore(self, changed: set[str]) -> None:
        """Make these paths equal to the template again."""
        for name in sorted(changed, reverse=True):  # content before its folder
            path = self.folder.parent / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        shutil.copytree(self.template, self.folder, copy_function=copy_if_missing, dirs_exist_ok=True)

    def run_case(self, main, arguments: list[str], about: str, damaged: str | None = None) -> None:
        """Run one command and record its problem, if any.

        about: a description of the case. damaged: the damaged file, which is restored afterwards. If it is
        read during the work, the command may stop and must then resume.
        """
        before = snapshot(self.folder.parent)
        outcome = run_child(main, arguments, self.folder)
        after = snapshot(self.folder.parent)
        (self.folder.parent / "stderr").unlink(missing_ok=True)
        changed = {k for k in {**before, **after} if before.get(k) != after.get(k)} - {"here", "stderr"}
        self.statuses[outcome.status] += 1
        self.slowest, self.largest = max(self.slowest, outcome.seconds), max(self.largest, outcome.megabytes)
        at_work = outcome.status == 2 and changed and READ_AT_WORK.fullmatch(damaged or "")
        if problem := find_problem(outcome, set() if at_work else changed):
            self.problems.setdefault(problem[:160], []).append(about)
        if at_work:
            self.restore({f"here/{damaged}"})
            again = run_child(main, arguments, self.folder)
            (self.folder.parent / "stderr").unlink()
            if again.status:
                self.problems.setdefault(f"does not go on: {again.errors[-120:]}", []).append(about)
            after = snapshot(self.folder.parent)
            changed = {k for k in {**before, **after} if before.get(k) != after.get(k)} - {"here"}
        self.restore(changed | ({f"here/{damaged}"} if damaged else set()))

    def report(self, capsys) -> None:
        """Print a summary, and fail the test if there were problems."""
        ended = ", ".join(f"{n} with status {status}" for status, n in sorted(self.statuses.items()))
        text = [
            f"\n{self.name}: {ended}; at most {self.slowest:.1f} s and {self.largest:.0f} MB; "
            f"{sum(map(len, self.problems.values()))} found"
        ]
        text += [
            f"  {len(abouts)} x {problem!r}, e.g. {abouts[0]}" for problem, abouts in self.problems.items()
        ]
        with capsys.disabled():
            print("\n".join(text))
        assert not self.problems, "\n".join(text)


def damage_bytes(data: bytes, rng: random.Random, text: bool) -> bytes:
    """Return the bytes with one kind of damage; ``text``: whether they may be damaged as JSON, too.

    Two of three times the damage is near the start or the end, where the structure of the file is.
    """
    size = len(data)
    near = min(size, rng.choice([150, 2000]))
    place = rng.choice([rng.randrange(size), rng.randrange(near), size - 1 - rng.randrange(near)])
    length = rng.choice([1, 2, 8, 64, 1000])
    kind = rng.choice(
        ["flip", "flip", "cut", "zero", "ones", "drop", "double", "random", *["value"] * 4 * text]
    )
    if kind == "flip":
        out = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 10])):
            out[min(size - 1, place + rng.randrange(100))] ^= 1 << rng.randrange(8)
        return bytes(out)
    if kind == "value":  # another JSON value after a colon, or instead of the whole file
        value = rng.choice(JSON_VALUES).encode()
        colons = [i for i, byte in enumerate(data) if byte == ord(":")]
        if not colons or rng.random() < 0.2:
            return value
        start = rng.choice(colons) + 1
        ends = [i for i in (data.find(mark, start) for mark in (b",", b"}", b"\n")) if i > 0]
        return data[:start] + b" " + value + data[min(ends, default=size) :]
    new = {
        "cut": b"",
        "drop": data[place + length :],
        "double": data[place : place + length] + data[place:],
        "zero": bytes(length) + data[place + length :],
        "ones": b"\xff" * length + data[place + length :],
        "random": rng.randbytes(length) + data[place + length :],
    }
    return data[:place] + new[kind]


def damage_zip_member(data: bytes, rng: random.Random) -> bytes:
    """Return a zip archive with one damaged member and a valid checksum, so that its reader must notice."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(changed, "w") as after:
        members = before.infolist()
        pickles = [m for m in members if m.filename.endswith(".pkl")]
        chosen = rng.choice(pickles if pickles and rng.random() < 0.7 else members)
        for member in members:
            content = before.read(member)
            after.writestr(member, damage_bytes(content, rng, False) if member is chosen else content)
    return changed.getvalue()


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(template, capsys, name):
    files, module, arguments = READERS[name]
    campaign = Campaign(name, template)
    campaign.run_case(module.main, arguments, "undamaged")
    assert campaign.statuses == {0: 1}, campaign.problems
    for i in range(FILES):
        rng = random.Random(f"{SEED} {name} {i}")
        file = rng.choice(files)
        data = (template / file).read_bytes()
        if zipfile.is_zipfile(io.BytesIO(data)) and rng.random() < 0.6:
            data = damage_zip_member(data, rng)
        else:
            data = damage_bytes(data, rng, file.endswith((".json", ".jsonl")))
        (campaign.folder / file).write_bytes(data)
        given = [file if name == "weights-converted" and a == "w.pt" else a for a in arguments]
        campaign.run_case(module.main, given, f"case {i}, {file}", file)
    campaign.report(capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_random_options(template, capsys, name):
    module, base = COMMANDS[name]
    actions, campaign = module.make_parser()._actions, Campaign(name, template)
    options = [a for a in actions if a.option_strings and a.option_strings[-1] not in LEFT_OUT]
    for i in range(LINES):
        rng = random.Random(f"{SEED} {name} {i}")
        arguments = list(base)
        for action in rng.sample(options, rng.choice([1, 1, 2, 3])):
            option = action.option_strings[-1]
            values = [*SMALL, *(() if option in ENDLESS else LARGE), *(action.choices or ())]
            flag = action.nargs == 0
            chosen = rng.choice([str(c) for c in action.choices] if action.choices and i % 2 else values)
            arguments += [option] if flag else rng.choice([[option, chosen], [f"{option}={chosen}"]])
        campaign.run_case(module.main, arguments, repr(arguments[len(base) :])[:300])
    campaign.report(capsys)
