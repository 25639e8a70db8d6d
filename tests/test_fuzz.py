"""Damaged files and random option values, by the thousand; by hand with -m slow.

    FUZZ_FILES=200 FUZZ_OPTIONS=50 pytest -m slow tests/test_fuzz.py

Each case is a command in a child forked from this process, which has imported everything. It ends with
status 0, or with status 2, one line and nothing changed on disk; within 30 s of computing and 2 GB of
resident memory. Where a file is read while the work is on, the command goes on after it is mended.
FUZZ_FILES damaged files per reader (default 2000), FUZZ_OPTIONS command lines per
command (300), FUZZ_SEED (0). A summary of each is printed.
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
PROGRESS = re.compile(r"%\||/s\]|\[\d\d:\d\d")  # bars of tqdm
DIVERGED = "the trained weights are not finite"  # no refusal: what came of the work, which is on disk
SECONDS, PATIENCE, MEGABYTES = 30, 300, 2000  # of computing; on the clock; resident

pytestmark = pytest.mark.slow

# Commands on the mini models, whose options are tried; and on the specimens, which are small and fast.
STEP = ["--batch-size", "8", "--max-steps", "1", "--output", "out"]
SAMPLE = ["--model", "llamagen-mini", "--num-samples", "1", "--output", "out.npz"]
ENCODE = ["--model", "llamagen-mini", "--data", "good.npz", "--output", "out"]
EVAL = ["--reference", "good.npz", "--features", "mini", "--samples"]
SMALL_SAMPLE = [*weights("llamagen"), "--num-samples", "1", "--output"]
SMALL_ENCODE = [*tokenizer("llamagen"), "--data", "small.npz"]
SMALL_TRAIN = [*weights("llamagen"), *STEP]
# Reader: (the files that are damaged in turn, the command that reads them).
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
# Read while the work is on: a damaged one stops the command, which goes on where the file is mended.
READ_AT_WORK = re.compile(r"published/.*|(parts.npz.parts|unfinished/progress)/00000000.npy")
COMMANDS = {
    "sample": (sample, SAMPLE),
    "eval_fid": (eval_fid, [*EVAL, "good.npz"]),
    "train_var_cca": (train_var_cca, ["--model", "var-mini", *STEP, "--data", "good.npz"]),
    "train_llamagen_cca": (train_llamagen_cca, ["--model", "llamagen-mini", *STEP, "--codes", "codes"]),
    "extract_codes": (extract_codes, ENCODE),
    "make_reference": (make_reference, ["--images", "good.npz", "--features", "mini", "--output", "out.npz"]),
}
# What one asks for in earnest and gets, or takes minutes to compile.
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
    """A folder with one good file of each kind."""
    register(pytest.MonkeyPatch())
    recognise({})  # each child would build all models anew to name what does not fit
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
    shutil.copytree(folder / "run", folder / "old-run")  # as before there were checksums
    (folder / "old-run" / "state" / "step-1" / "sha256-0.json").unlink()
    parts = folder / "parts.npz.parts"  # an unfinished run whose only part is made
    parts.mkdir()
    made = json.loads((folder / "made.json").read_text())
    marker = {"format": 1, "kind": "samples", "options": made["options"]}
    (parts / "options.json").write_text(json.dumps(marker))
    with np.load(folder / "made.npz") as file:
        np.save(parts / "00000000.npy", file["arr_0"])
    progress = folder / "unfinished" / "progress"  # codes whose only part is made
    progress.mkdir(parents=True)
    shutil.copy2(folder / "small-codes" / "header.json", progress)
    shutil.copy2(folder / "small-codes" / "codes.npy", progress / "00000000.npy")
    return folder


Outcome = collections.namedtuple("Outcome", "status errors seconds megabytes")


def run_child(main, arguments: list[str], folder: Path) -> Outcome:
    """The command in a forked child; status: its exit status, or minus the signal that ended it."""
    log = folder.parent / "stderr"
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
            resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))  # to spare the machine
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
    """Kind and rights of everything in a folder, and when files were last written to."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: (p.lstat().st_mode, p.is_file() and p.lstat().st_mtime_ns) for name, p in found.items()}


def complaint(outcome: Outcome, changed: set[str]) -> str | None:
    """What is wrong with how a case ended; None if nothing is."""
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
    """Cases of one kind in one folder, which is mended after each that changed it; and what was found."""

    def __init__(self, name: str, template: Path):
        self.name, self.template, self.folder = name, template, template.parent / "work" / "here"
        self.statuses: collections.Counter[int] = collections.Counter()
        self.found: dict[str, list] = {}
        self.slowest = self.largest = 0.0
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        shutil.copytree(self.template, self.folder)

    def mend(self, changed: set[str]) -> None:
        """Make these paths as they are in the template."""
        for name in sorted(changed, reverse=True):  # what is in a folder, then the folder
            path = self.folder.parent / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        shutil.copytree(self.template, self.folder, copy_function=copy_if_missing, dirs_exist_ok=True)

    def case(self, main, arguments: list[str], about: str, damaged: str | None = None) -> None:
        """One command; ``damaged``: the file that is to be mended after it, which the work may stop at."""
        before = snapshot(self.folder.parent)
        outcome = run_child(main, arguments, self.folder)
        after = snapshot(self.folder.parent)
        (self.folder.parent / "stderr").unlink(missing_ok=True)
        changed = {k for k in {**before, **after} if before.get(k) != after.get(k)} - {"here", "stderr"}
        self.statuses[outcome.status] += 1
        self.slowest, self.largest = max(self.slowest, outcome.seconds), max(self.largest, outcome.megabytes)
        at_work = outcome.status == 2 and changed and READ_AT_WORK.fullmatch(damaged or "")
        if problem := complaint(outcome, set() if at_work else changed):
            self.found.setdefault(problem[:160], []).append(about)
        if at_work:
            self.mend({f"here/{damaged}"})
            again = run_child(main, arguments, self.folder)
            (self.folder.parent / "stderr").unlink()
            if again.status:
                self.found.setdefault(f"does not go on: {again.errors[-120:]}", []).append(about)
            after = snapshot(self.folder.parent)
            changed = {k for k in {**before, **after} if before.get(k) != after.get(k)} - {"here"}
        self.mend(changed | ({f"here/{damaged}"} if damaged else set()))

    def end(self, capsys) -> None:
        ended = ", ".join(f"{n} with status {status}" for status, n in sorted(self.statuses.items()))
        text = [
            f"\n{self.name}: {ended}; at most {self.slowest:.1f} s and {self.largest:.0f} MB; "
            f"{sum(map(len, self.found.values()))} found"
        ]
        text += [f"  {len(abouts)} x {problem!r}, e.g. {abouts[0]}" for problem, abouts in self.found.items()]
        with capsys.disabled():
            print("\n".join(text))
        assert not self.found, "\n".join(text)


def damaged(data: bytes, draw: random.Random, text: bool) -> bytes:
    """The same bytes with one kind of damage; in half of the cases near an end, where the structure is."""
    size = len(data)
    near = min(size, draw.choice([150, 2000]))
    place = draw.choice([draw.randrange(size), draw.randrange(near), size - 1 - draw.randrange(near)])
    length = draw.choice([1, 2, 8, 64, 1000])
    kind = draw.choice(
        ["flip", "flip", "cut", "zero", "ones", "drop", "double", "random", *["value"] * 4 * text]
    )
    if kind == "flip":
        out = bytearray(data)
        for _ in range(draw.choice([1, 1, 3, 10])):
            out[min(size - 1, place + draw.randrange(100))] ^= 1 << draw.randrange(8)
        return bytes(out)
    if kind == "value":  # another JSON value after a colon, or in place of everything
        value = draw.choice(JSON_VALUES).encode()
        colons = [i for i, byte in enumerate(data) if byte == ord(":")]
        if not colons or draw.random() < 0.2:
            return value
        start = draw.choice(colons) + 1
        ends = [i for i in (data.find(mark, start) for mark in (b",", b"}", b"\n")) if i > 0]
        return data[:start] + b" " + value + data[min(ends, default=size) :]
    new = {
        "cut": b"",
        "drop": data[place + length :],
        "double": data[place : place + length] + data[place:],
        "zero": bytes(length) + data[place + length :],
        "ones": b"\xff" * length + data[place + length :],
        "random": draw.randbytes(length) + data[place + length :],
    }
    return data[:place] + new[kind]


def damaged_inside(data: bytes, draw: random.Random) -> bytes:
    """A zip archive with damage in a member, whose checksum fits: what reads the member has to notice."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(changed, "w") as after:
        members = before.infolist()
        pickles = [m for m in members if m.filename.endswith(".pkl")]
        chosen = draw.choice(pickles if pickles and draw.random() < 0.7 else members)
        for member in members:
            content = before.read(member)
            after.writestr(member, damaged(content, draw, False) if member is chosen else content)
    return changed.getvalue()


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(template, capsys, name):
    files, module, arguments = READERS[name]
    campaign = Campaign(name, template)
    campaign.case(module.main, arguments, "undamaged")
    assert campaign.statuses == {0: 1}, campaign.found
    for i in range(FILES):
        draw = random.Random(f"{SEED} {name} {i}")
        file = draw.choice(files)
        data = (template / file).read_bytes()
        if zipfile.is_zipfile(io.BytesIO(data)) and draw.random() < 0.6:
            data = damaged_inside(data, draw)
        else:
            data = damaged(data, draw, file.endswith((".json", ".jsonl")))
        (campaign.folder / file).write_bytes(data)
        given = [file if name == "weights-converted" and a == "w.pt" else a for a in arguments]
        campaign.case(module.main, given, f"case {i}, {file}", file)
    campaign.end(capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_random_options(template, capsys, name):
    module, base = COMMANDS[name]
    actions, campaign = module.make_parser()._actions, Campaign(name, template)
    options = [a for a in actions if a.option_strings and a.option_strings[-1] not in LEFT_OUT]
    for i in range(LINES):
        draw = random.Random(f"{SEED} {name} {i}")
        arguments = list(base)
        for action in draw.sample(options, draw.choice([1, 1, 2, 3])):
            option = action.option_strings[-1]
            values = [*SMALL, *(() if option in ENDLESS else LARGE), *(action.choices or ())]
            flag = action.nargs == 0
            chosen = draw.choice([str(c) for c in action.choices] if action.choices and i % 2 else values)
            arguments += [option] if flag else draw.choice([[option, chosen], [f"{option}={chosen}"]])
        campaign.case(module.main, arguments, repr(arguments[len(base) :])[:300])
    campaign.end(capsys)
