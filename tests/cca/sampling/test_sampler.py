"""Sampling: an image depends on (seed, index), not on batch size, number of ranks or interruptions."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import REFERENCE, ROOT, command_line, environment, run

import sample
from cca.config import SampleRequest
from cca.sampling.sampler import Sampler, class_of
from models import SamplingOptions, load_model

MODELS = ("llamagen-mini", "var-mini")


def request(samples=64, order="balanced", seed=0, size=None, **options):
    return SampleRequest(samples, tuple(range(10)), order, seed, size, "float32", SamplingOptions(**options))


def sample_images(model, batch_size, sample_request):
    sampler = Sampler(model, sample_request, batch_size, torch.device("cpu"))
    third, count = sample_request.num_samples // 3, sample_request.num_samples
    return np.concatenate([*sampler.images([range(third), range(third, count)])])


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 2.0, "top_k": 100, "top_p": 0.9, "temperature": 0.9}])
@pytest.mark.parametrize("name", MODELS)
def test_batch_size_does_not_matter(name, options):
    model = load_model(name)
    whole = sample_images(model, 24, request(24, **options))
    for batch_size in (1, 7):
        assert np.array_equal(sample_images(model, batch_size, request(24, **options)), whole)


@pytest.mark.parametrize("name", MODELS)
def test_seed_matters(name):
    model = load_model(name)
    first, other = (sample_images(model, 10, request(10, seed=seed)) for seed in (0, 1))
    assert (first != other).any((1, 2, 3)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_stored_weights_equal_autocast(name, dtype):
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
    classes = [class_of(i, request(order="random")) for i in range(2000)]
    assert classes[:50] == [class_of(i, request(order="random")) for i in range(50)]
    counts = np.bincount(classes, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_resized_images_are_uint8():
    model = load_model("llamagen-mini")
    images = sample_images(model, 4, request(4, size=20))
    assert images.shape == (4, 20, 20, 3) and images.dtype == np.uint8


def test_conversion_to_uint8():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    assert load_model("var-mini").to_uint8(x).tolist() == [0, 127, 191, 255]
    assert load_model("llamagen-mini").to_uint8(x).tolist() == [0, 128, 191, 255]


KILLED_AFTER_A_PART = """
import os, signal, sys
import sample
from cca.cli.parts import Parts
write = Parts.write
Parts.write = lambda *given: (write(*given), os.kill(os.getpid(), signal.SIGKILL))
sample.main(sys.argv[1:])
"""


@pytest.mark.parametrize("name", [MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)])
def test_ranks_and_interruption_do_not_matter(name, tmp_path):
    options = ["--model", name, "--num-samples", "600", "--seed", "3"]
    sample.main([*options, "--output", str(tmp_path / "one.npz"), "--grid", str(tmp_path / "grid.png")])
    run("sample.py", *options, "--output", tmp_path / "two.npz", "--batch-size", 50, processes=3)
    cut, parts = tmp_path / "cut.npz", tmp_path / "cut.npz.parts"
    command = command_line(["-c", KILLED_AFTER_A_PART, *options, "--output", cut])
    killed = subprocess.run(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL and not cut.exists()
    assert [path.name for path in parts.glob("*.npy")] == ["00000000.npy"]
    sample.main([*options, "--output", str(cut)])
    assert json.loads(cut.with_suffix(".json").read_text())["images_made_by_this_run"] == 600 - 256
    with np.load(tmp_path / "one.npz") as one:
        assert one["arr_0"].shape == (600, 32, 32, 3) and one["arr_0"].dtype == np.uint8
        assert one["arr_1"].tolist() == [i % 10 for i in range(600)]
        for other in ("two.npz", "cut.npz"):
            with np.load(tmp_path / other) as file:
                different = (file["arr_0"] != one["arr_0"]).any((1, 2, 3))
                assert different.sum() <= 3  # 0.5 %: rounding may change tokens
                assert np.array_equal(file["arr_1"], one["arr_1"])
    assert not parts.exists() and (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_memory_for_50_000_images(tmp_path):
    command = command_line(
        ["sample.py", "--model", "llamagen-mini", "--batch-size", 250, "--output", tmp_path / "s.npz"],
        processes=2,
    )
    # A process in between measures it: the peak memory of a child process includes the memory of its parent.
    measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    measure += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    measured = subprocess.run(
        [sys.executable, "-c", measure, *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        check=True,
    )
    assert int(measured.stdout.split()[-1]) < 1.5e6  # KiB, of the process that uses most
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


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            ["--model", "var-d16", "--preset", "published-cfg", "--top-k", "5"],
            {"cfg_scale": 2.5, "top_k": 5, "top_p": 0.96, "dtype": "float16", "class_order": "balanced"},
        ),
        (
            ["--model", "llamagen-3b", "--preset", "published"],
            {"cfg_scale": 1.0, "top_k": 0, "eval_size": 256, "class_order": "random"},
        ),
    ],
)
def test_presets(options, expected):
    arguments = sample.make_parser().parse_args([*options, "--output", "s.npz"])
    sample.apply_preset(arguments)
    assert vars(arguments).items() >= expected.items()
