"""Mistakes of users give one line on stderr and exit status 2, without a traceback or a file on disk."""

import io
import os
import struct
import zipfile

import numpy as np
import pytest
from commands import REFERENCE, ROOT, call
from made_data import bundled, make_picture

import eval_fid
import sample
import train_llamagen_cca
import train_var_cca
from cca.cli.main import run_command
from scripts import convert_weights, extract_codes, make_reference, reconstruct, reproduce

SAMPLE = ["--model", "var-mini", "--num-samples", "5", "--output", "out/s.npz"]
VAR = ["--model", "var-mini", "--output", "out", "--data"]
LLAMAGEN = ["--model", "llamagen-mini", "--output", "out", "--codes"]
CODES = ["--model", "llamagen-mini", "--output", "out", "--data"]
EVAL = ["--reference", REFERENCE, "--features", "mini", "--samples"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to a folder with broken inputs, and with the bundled files in assets/."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.npz").write_bytes(b"junk" * 100)
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez("wrong-name.npz", images=np.zeros((9, 32, 32), np.uint8))
    np.savez("float.npz", arr_0=np.zeros((9, 32, 32)), arr_1=np.zeros(9, np.int64))
    np.savez("large.npz", arr_0=np.zeros((9, 64, 64), np.uint8), arr_1=np.zeros(9, np.int64))
    np.savez("labels.npz", arr_0=np.zeros((9, 32, 32), np.uint8), arr_1=np.full(9, 10))
    np.savez("few.npz", arr_0=np.zeros((3, 32, 32), np.uint8), arr_1=np.zeros(3, np.int64))
    whole = bundled(50)
    np.savez("good.npz", **whole)
    np.savez("unlabelled.npz", arr_0=whole["arr_0"])
    np.save(array := io.BytesIO(), whole["arr_0"])
    with zipfile.ZipFile("short.npz", "w") as archive:  # its header promises more images than it holds
        archive.writestr("arr_0.npy", array.getvalue().replace(b"(50, 32, 32)", b"(99, 32, 32)"))
    for name, shape in (
        ("negative", b"(-9, 32, 32)"),
        ("absurd", b"(10**9, 9, 9)"),
        ("huge", b"(9" + b"9" * 30 + b", 32, 32)"),
    ):
        with zipfile.ZipFile(f"{name}.npz", "w") as archive:
            header = array.getvalue()[:128].replace(b"(50, 32, 32)", shape)
            archive.writestr("arr_0.npy", header[:8] + struct.pack("<H", len(header) - 10) + header[10:])
    os.symlink("circle.npz", "circle.npz")
    os.symlink("circle", "circle")
    os.mkfifo("pipe.json")
    os.mkfifo("pipe.pth")
    (tmp_path / "codes-labels").mkdir()
    os.mkfifo("pipe.npz")
    for name in ("cat", "dog"):
        make_picture(tmp_path / "photos" / name / "a.png", size=(40, 40))
    (tmp_path / "classes.json").write_text('{"cat": 3, "bird": 5}')
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:20000])
    return tmp_path


CASES = [
    (sample, ["--model", "var-mini", "--output", ""], "--output: . is not a file name"),
    (eval_fid, [*EVAL, "good.npz", "--output", "."], "--output: . is not a file name"),
    (sample, [*SAMPLE, "--weights", ""], "--weights: . holds no model.pth"),
    (sample, [*SAMPLE, "--classes", ""], "--classes: '' is neither 'all' nor a list"),
    (
        eval_fid,
        [*EVAL[:2], "--samples", "good.npz", "--features", "a.pth", "--inception-weights", "b.pth"],
        "--inception-weights: needs --features inception, not a.pth",
    ),
    (eval_fid, [*EVAL, "negative.npz"], "negative.npz: arr_0"),
    (eval_fid, [*EVAL, "absurd.npz"], "absurd.npz: "),
    (eval_fid, [*EVAL, "huge.npz"], "huge.npz: arr_0 is cut off or damaged"),
    (eval_fid, [*EVAL, "pipe.npz"], "pipe.npz: is not a file"),
    (eval_fid, [*EVAL, "circle.npz"], "circle.npz: "),
    (eval_fid, ["--compare", "pipe.json"], "pipe.json is not a result"),
    (train_var_cca, [*VAR, "photos", "--classes-from", "pipe.json"], "pipe.json is not a readable JSON file"),
    (convert_weights, ["pipe.pth", "out.pt"], "pipe.pth: "),
    (sample, [*SAMPLE, "--weights", "pipe.pth"], "pipe.pth: "),
    (sample, [*SAMPLE[:-1], "circle.npz"], "--output: circle.npz cannot be written ("),
    (sample, [*SAMPLE[:-1], "circle/s.npz"], "--output: circle/s.npz cannot be written"),
    (train_var_cca, ["--model", "var-mini", "--data", "good.npz", "--output", "circle"], "--output: circle"),
    (
        reproduce,
        ["ablation", "--mini", "--loss-options", "dpo", "--beta '1", "--output", "out"],
        '--loss-options: "--beta \'1" cannot be split into options (No closing quotation)',
    ),
    (sample, ["--model", "var-d99", "--output", "s.npz"], "--model: invalid choice: 'var-d99'"),
    (sample, SAMPLE[:-1] + ["out/s.png"], "--output: out/s.png does not end in .npz"),
    (sample, [*SAMPLE, "--classes", "0,10"], "--classes: 0,10; expected"),
    (sample, [*SAMPLE, "--classes", "shoes"], "--classes: 'shoes' is neither"),
    (sample, [*SAMPLE, "--cfg-sclae", "2"], "unrecognized arguments: --cfg-sclae"),
    (sample, [*SAMPLE, "--cfg", "2"], "unrecognized arguments: --cfg"),
    (sample, [*SAMPLE, "--top-p", "0"], "--top-p: 0 must be above 0"),
    (sample, [*SAMPLE, "--top-k", "some"], "--top-k: 'some' is not an integer"),
    (sample, [*SAMPLE, "--temperature", "nan"], "--temperature: nan must be at least 1e-06 and finite"),
    (sample, [*SAMPLE, "--weights", "none.pth"], "none.pth: no such file"),
    (sample, [*SAMPLE, "--weights", "assets/llamagen-mini.safetensors"], "does not fit var-mini"),
    (sample, [*SAMPLE, "--tokenizer-weights", "junk.npz"], "junk.npz: not a weights file"),
    (train_var_cca, VAR[:-1], "the following arguments are required: --data"),
    (train_var_cca, [*VAR, "none.npz"], "none.npz: no such file"),
    (train_var_cca, [*VAR, "junk.npz"], "junk.npz: not a readable .npz"),
    (train_var_cca, [*VAR, "empty.npz"], "empty.npz: not a readable .npz"),
    (train_var_cca, [*VAR, "cut.npz"], "cut.npz: not a readable .npz"),
    (train_var_cca, [*VAR, "wrong-name.npz"], "wrong-name.npz: holds images; expected arr_0"),
    (train_var_cca, [*VAR, "float.npz"], "expected uint8"),
    (train_var_cca, [*VAR, "large.npz"], "--data: large.npz has images of 64 x 64"),
    (train_var_cca, [*VAR, "labels.npz"], "labels must be in 0 … 9"),
    (train_var_cca, [*VAR, "good.npz"], "--batch-size: 64 is more than the 50 images"),
    (train_var_cca, [*VAR, "good.npz", "--beta", "0"], "--beta: 0 must be above 0"),
    (
        train_var_cca,
        [*VAR, "good.npz", "--loss", "sft", "--beta", "1"],
        "--beta: is not used by --loss sft",
    ),
    (train_llamagen_cca, [*LLAMAGEN, "none", "--loss", "dpo", "--lambda", "1"], "--lambda: is not used by"),
    (
        train_var_cca,
        [*VAR, "good.npz", "--uncond-ratio", "1.5"],
        "--uncond-ratio: 1.5 must be at least 0 and at most 1",
    ),
    (train_var_cca, [*VAR, "good.npz", "--epochs", "1", "--max-steps", "1"], "not allowed with argument"),
    (train_llamagen_cca, [*LLAMAGEN, "none"], "--codes: none is not a folder of packed codes"),
    (
        train_llamagen_cca,
        ["--model", "var-mini", *LLAMAGEN[2:], "none"],
        "--model: invalid choice: 'var-mini'",
    ),
    (eval_fid, [*EVAL, "none.npz"], "none.npz: no such file"),
    (eval_fid, [*EVAL, "junk.npz"], "junk.npz: not a readable .npz"),
    (eval_fid, [*EVAL, "wrong-name.npz"], "wrong-name.npz: holds images; expected arr_0"),
    (eval_fid, [*EVAL, "float.npz"], "arr_0 is float64 [9, 32, 32]; expected uint8"),
    (eval_fid, [*EVAL, "short.npz"], "short.npz: arr_0 is cut off or damaged"),
    (eval_fid, [*EVAL, "few.npz"], "holds 3 images; at least 5"),
    (eval_fid, [*EVAL, "codes-labels"], "codes-labels: holds no images"),
    (eval_fid, [*EVAL, "good.npz", "--metrics", "fid,lpips"], "--metrics: 'lpips' is not one of"),
    (
        eval_fid,
        ["--reference", REFERENCE, "--samples", "good.npz", "--features", "vgg"],
        "--features: 'vgg' is neither a file",
    ),
    (
        eval_fid,
        ["--reference", REFERENCE, "--samples", "good.npz", "--inception-weights", "none.pth"],
        "--inception-weights: none.pth: no such file",
    ),
    (
        eval_fid,
        ["--reference", REFERENCE, "--samples", "good.npz", "--inception-weights", "junk.npz"],
        "junk.npz: not a weights file",
    ),
    (
        eval_fid,
        [*EVAL, "good.npz", "--inception-weights", "junk.npz"],
        "--inception-weights: needs --features inception",
    ),
    (eval_fid, ["--samples", "good.npz"], "--reference: is required"),
    (eval_fid, ["--compare", "none.json"], "none.json is not a result"),
    (make_reference, ["--images", "good.npz", "--output", "ref.json"], "ref.json does not end in .npz"),
    (
        make_reference,
        ["--images", "good.npz", "--image-size", "16", "--output", "ref.npz"],
        "--image-size: applies to a folder of images",
    ),
    (sample, [*SAMPLE, "--preset", "published"], "--preset: var-mini has no published settings"),
    (sample, [*SAMPLE, "--image-size", "64"], "--image-size: 64"),
    (sample, [*SAMPLE, "--tokenizer-weights", "vq_ds16_c2i"], "--tokenizer-weights: vq_ds16_c2i"),
    (
        sample,
        ["--model", "var-d36", "--weights", "cca", "--output", "s.npz"],
        "no cca weights are published for var-d36 at 512",
    ),
    (train_var_cca, [*VAR, "pipe.npz"], "pipe.npz: is not a file"),
    (train_var_cca, [*VAR, "photos"], "with --classes-from FILE.json"),
    (extract_codes, [*CODES, "photos"], "with --classes-from FILE.json"),
    (
        extract_codes,
        [*CODES, "photos", "--classes-from", "classes.json"],
        "--classes-from: does not name dog of photos",
    ),
    (
        train_var_cca,
        [*VAR, "good.npz", "--classes-from", "classes.json"],
        "--classes-from: needs class folders",
    ),
    (
        train_var_cca,
        [*VAR, "photos", "--classes-from", "none.json"],
        "--classes-from: none.json: no such file",
    ),
    (eval_fid, [*EVAL, "good.npz", "--resize", "16"], "--resize: applies to folders of images"),
    (
        eval_fid,
        [*EVAL, "good.npz", "--classes-from", "classes.json"],
        "--classes-from: applies to a folder of samples",
    ),
    (
        reconstruct,
        ["--model", "var-mini", "--images", "large.npz", "--output", "r.npz"],
        "images of 64 x 64, the model takes 32 x 32",
    ),
    (train_var_cca, [*VAR, "codes-labels"], "codes-labels: holds no images"),
    (
        train_llamagen_cca,
        [*LLAMAGEN, "codes-labels", "--parallel", "fsdp"],
        "codes-labels is not a folder of packed codes",
    ),
    (train_var_cca, ["--model", "var-d16", "--loss", "dpo", *VAR[2:], "good.npz"], "give --beta, --lr"),
    (
        train_llamagen_cca,
        ["--model", "llamagen-l", "--loss", "unlearning", *LLAMAGEN[2:], "none"],
        "--loss: no values are published for unlearning on llamagen-l; give --lambda, --lr",
    ),
    (
        train_var_cca,
        ["--model", "var-d16", "--recipe", "with-guidance", *VAR[2:], "good.npz"],
        "--recipe: var-d16 has no recipe with-guidance",
    ),
    (train_llamagen_cca, [*LLAMAGEN, "none", "--recipe", "with-guidance", "--loss", "dpo"], "for --loss dpo"),
    (convert_weights, ["good.npz", "out.bin"], "out.bin ends in none of .pth, .pt, .safetensors"),
    (convert_weights, ["junk.npz", "out.pt"], "junk.npz: not a weights file"),
    (convert_weights, ["none.pt", "out.pt"], "none.pt: no such file"),
    (
        reproduce,
        ["ablation", "--mini", "--loss-options", "foo", "--beta 1", "--output", "out"],
        "'foo' is not",
    ),
    (reproduce, ["samples", "--mini", "--class", "11", "--output", "out"], "--class: 11 goes beyond 0 … 9"),
    (reproduce, ["quickstart", "--samples", "-3", "--output", "out"], "--samples: -3 must be at least 100"),
    (reproduce, ["quickstart", "--output", "good.npz"], "--output: good.npz cannot be written (it is a file"),
    (eval_fid, [*EVAL, "unlabelled.npz", "--metrics", "accuracy"], "--metrics: none can be computed; acc"),
    (
        extract_codes,
        ["--model", "llamagen-mini", "--output", "out", "--data", "labels.npz"],
        "labels must be in 0 … 9",
    ),
]


@pytest.mark.parametrize("module, arguments, message", CASES, ids=lambda value: None)
def test_wrong_input_is_one_error_line(folder, capsys, module, arguments, message):
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: module.main(arguments))
    assert caught.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    lines = [line for line in printed if "%|" not in line and line.strip()]  # without progress bars
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("script", ["sample.py", "train_var_cca.py", "train_llamagen_cca.py", "eval_fid.py"])
def test_wrong_option_in_new_process(script):
    result = call([script, "--model", "gpt"])
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
