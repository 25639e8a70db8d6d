"""Sampling: images belong to (seed, index), not to batches, processes or interruptions."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from commands import REFERENCE, ROOT, command_line, environment, run

import sample
from cca.config import SampleRequest
from cca.sampling.sampler import Sampler, class_of
from models import SamplingOptions, load_model
from models.utils.errors import UserError
from models.zoo.checkpoint_formats import read_state_dict, save_published

MODELS = ("llamagen-mini", "var-mini")


def request(samples=64, order="balanced", seed=0, size=None, **options):
    return SampleRequest(samples, tuple(range(10)), order, seed, size, "float32", SamplingOptions(**options))


def in_batches(model, batch_size, asked):
    sampler = Sampler(model, asked, batch_size, torch.device("cpu"))
    pieces = list(
        sampler.samples([range(asked.num_samples // 3), range(asked.num_samples // 3, asked.num_samples)])
    )
    labels = np.concatenate([piece.classes for piece in pieces])
    assert labels.tolist() == [class_of(i, asked) for i in range(asked.num_samples)]
    return np.concatenate([piece.images for piece in pieces])


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 2.0, "top_k": 100, "top_p": 0.9, "temperature": 0.9}])
@pytest.mark.parametrize("name", MODELS)
def test_batch_size_does_not_matter(name, options):
    model = load_model(name)
    whole = in_batches(model, 64, request(**options))
    for batch_size in (1, 17):
        differs = (in_batches(model, batch_size, request(**options)) != whole).any((1, 2, 3))
        assert differs.sum() <= 0.005 * len(whole)


@pytest.mark.parametrize("name", MODELS)
def test_seed_and_class_matter(name):
    model = load_model(name)
    first, other = (in_batches(model, 10, request(10, seed=seed)) for seed in (0, 1))
    assert (first != other).any((1, 2, 3)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_stored_matrices_give_what_autocast_gives(name, dtype):
    model = load_model(name)
    labels = torch.arange(8)
    uniforms = torch.rand(
        8, model.sequence_length, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def run():
        with torch.autocast("cpu", dtype), torch.no_grad():
            tokens = model.generate(labels, uniforms, SamplingOptions(1.5))
            return tokens, model.logits(labels, tokens), model.sequence_logprob(labels, tokens)

    before = run()
    size = sum(p.nbytes for p in model.transformer.parameters())
    model.transformer.store_matrices(dtype)
    assert sum(p.nbytes for p in model.transformer.parameters()) < 0.75 * size
    assert all(torch.equal(a, b) for a, b in zip(before, run()))


def test_classes():
    assert [class_of(i, request()) for i in (0, 9, 10, 25)] == [0, 9, 0, 5]
    drawn = [class_of(i, request(order="random")) for i in range(2000)]
    assert drawn[:50] == [class_of(i, request(order="random")) for i in range(50)]
    counts = np.bincount(drawn, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_resizing_and_8_bit():
    model = load_model("llamagen-mini")
    images = in_batches(model, 4, request(4, size=20))
    assert images.shape == (4, 20, 20, 3) and images.dtype == np.uint8


def test_8_bit_conversions():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    assert load_model("var-mini").to_uint8(x).tolist() == [0, 127, 191, 255]
    assert load_model("llamagen-mini").to_uint8(x).tolist() == [0, 128, 191, 255]


@pytest.mark.parametrize("name", MODELS)
def test_processes_and_interruption_do_not_matter(name, tmp_path):
    options = ["sample.py", "--model", name, "--num-samples", 600, "--seed", 3]
    run(*options, "--output", tmp_path / "one.npz", "--grid", tmp_path / "grid.png")
    run(*options, "--output", tmp_path / "two.npz", "--batch-size", 50, processes=3)
    cut = tmp_path / "cut.npz"
    process = subprocess.Popen(
        command_line([*options, "--output", cut]), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL
    )
    parts = tmp_path / "cut.npz.parts"
    while process.poll() is None and len(list(parts.glob("*.npy"))) < 1:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(parts.glob("*.npy"))) >= 1 and not cut.exists()
    run(*options, "--output", cut)
    made = json.loads(cut.with_suffix(".json").read_text())["images_made_by_this_run"]
    assert made in (600 - 256, 600 - 512)
    with np.load(tmp_path / "one.npz") as one:
        assert one["arr_0"].shape == (600, 32, 32, 3) and one["arr_0"].dtype == np.uint8
        assert one["arr_1"].tolist() == [i % 10 for i in range(600)]
        for other in ("two.npz", "cut.npz"):
            with np.load(tmp_path / other) as file:
                different = (file["arr_0"] != one["arr_0"]).any((1, 2, 3))
                assert different.sum() <= 3  # 0.5 %: tokens flipped by rounding
                assert np.array_equal(file["arr_1"], one["arr_1"])
    assert not parts.exists() and (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_unfinished_run_with_other_options_is_refused(tmp_path):
    parts = tmp_path / "s.npz.parts"
    parts.mkdir()
    arguments = ["--model", "var-mini", "--num-samples", "10", "--output", str(tmp_path / "s.npz")]
    sample.main(arguments)
    (parts / "options.json").parent.mkdir()
    options = json.loads((tmp_path / "s.json").read_text())["options"]
    (parts / "options.json").write_text(json.dumps({"format": 1, "options": {**options, "seed": 5}}))
    with pytest.raises(UserError, match="unfinished run with seed 5 instead of 0"):
        sample.main(arguments)


@pytest.mark.slow
def test_fifty_thousand_in_bounded_memory(tmp_path):
    command = command_line(
        ["sample.py", "--model", "llamagen-mini", "--batch-size", 250, "--output", tmp_path / "s.npz"],
        processes=2,
    )
    # By a process between, since what this one has used would count as what its child has.
    measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    measure += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    measured = subprocess.run(
        [sys.executable, "-c", measure, *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        check=True,
    )
    assert int(measured.stdout.split()[-1]) < 1.5e6  # KiB, of the largest of its processes
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (50_000, 32, 32, 3) and (np.bincount(file["arr_1"]) == 5000).all()
    run(
        "eval_fid.py",
        "--samples",
        tmp_path / "s.npz",
        "--reference",
        REFERENCE,
        "--features",
        "mini",
        "--metrics",
        "fid",
        "--output",
        tmp_path / "r.json",
    )
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["samples"]["count"] == 50_000 and not any(
        "instead of 50,000" in note for note in report["notes"]
    )


def test_presets():
    arguments = sample.make_parser().parse_args(
        ["--model", "var-d16", "--preset", "published-cfg", "--top-k", "5", "--output", "s.npz"]
    )
    sample.apply_preset(arguments)
    assert (
        arguments.cfg_scale,
        arguments.top_k,
        arguments.top_p,
        arguments.dtype,
        arguments.class_order,
    ) == (2.5, 5, 0.96, "float16", "balanced")
    arguments = sample.make_parser().parse_args(
        ["--model", "llamagen-3b", "--preset", "published", "--output", "s.npz"]
    )
    sample.apply_preset(arguments)
    assert (arguments.cfg_scale, arguments.top_k, arguments.eval_size, arguments.class_order) == (
        1.0,
        0,
        256,
        "random",
    )


def test_too_little_space(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9, "total": 10**12}))
    with pytest.raises(UserError, match="has 1.0 GB free, the run needs 1.2 GB"):
        sample.main(["--model", "var-mini", "--num-samples", "200000", "--output", str(tmp_path / "s.npz")])


@pytest.mark.parametrize(
    "dtype, cause", [("float16", "float16 overflow is the likely cause"), ("float32", "")]
)
def test_overflow_stops_sampling(tmp_path, dtype, cause):
    """Weights within float32 and beyond float16: one line, and no images; in float32 they are drawn."""
    state = read_state_dict("assets/llamagen-mini.safetensors")
    save_published({**state, "output.weight": state["output.weight"].float() * 1e7}, tmp_path / "w.pt")
    arguments = ["--model", "llamagen-mini", "--weights", str(tmp_path / "w.pt"), "--num-samples", "4"]
    arguments += ["--dtype", dtype, "--output", str(tmp_path / "s.npz")]
    if cause:
        with pytest.raises(UserError, match=f"--dtype: the logits of 4 of 4 images are not finite; {cause}"):
            sample.main(arguments)
    else:
        sample.main(arguments)
    assert (tmp_path / "s.npz").exists() == (not cause)


def test_the_largest_seeds_differ():
    model = load_model("llamagen-mini")
    images = [in_batches(model, 2, request(2, seed=seed)) for seed in (2**62, 2**62 + 1, 2**63 - 1)]
    assert all((a != b).any() for a, b in zip(images, images[1:]))
