"""The evaluator as users run it: files in, table, JSON and warnings out."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch_fidelity
from commands import REFERENCE, ROOT, TRAIN, run
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import eval_fid
from cca.evaluation.comparability import class_order_notes
from cca.evaluation.features import make_extractor
from cca.evaluation.metrics import Gaussian, RunningGaussian
from models.errors import UserError
from scripts import make_reference


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def files(tmp_path, cache):
    """600 training and 600 test images, and the folder of the former."""
    for name, source in (("samples", TRAIN), ("reference", REFERENCE)):
        with np.load(ROOT / source) as file:
            images = np.repeat(file["arr_0"][:600, ..., None], 3, axis=3)
            np.savez(tmp_path / f"{name}.npz", arr_0=images, arr_1=file["arr_1"][:600])
    return tmp_path


def evaluate(files, *options, samples="samples.npz", reference="reference.npz"):
    eval_fid.main(
        [
            "--samples",
            str(files / samples),
            "--reference",
            str(files / reference),
            "--output",
            str(files / "out.json"),
            *options,
        ]
    )
    return json.loads((files / "out.json").read_text())


MINI = ("--features", "mini")


def test_agrees_with_torch_fidelity(files):
    found = evaluate(files, *MINI)["metrics"]

    class Images(torch.utils.data.Dataset):
        def __init__(self, name):
            self.images = torch.from_numpy(np.load(files / f"{name}.npz")["arr_0"]).permute(0, 3, 1, 2)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i]

    expected = torch_fidelity.calculate_metrics(
        input1=Images("samples"), input2=Images("reference"), fid=True, isc=True, isc_splits=1,
        feature_extractor="mini", feature_layer_fid="96", feature_layer_isc="logits",
        samples_shuffle=False, cuda=False, verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert found["is"] == pytest.approx(expected["inception_score_mean"], rel=1e-4)


@pytest.mark.parametrize(
    "place, message",
    [
        ("cca.evaluation.features.MiniFeatures.to", "--features: mini does not fit in the GPU's memory; end"),
        (
            "cca.evaluation.features.MiniFeatures.forward",
            "--batch-size: 250 images at once do not fit in the GPU's memory; take fewer",
        ),
        (
            "cca.evaluation.evaluator.precision_recall",
            "--metrics: precision does not fit in the GPU's memory; leave it out, or end",
        ),
    ],
)
def test_memory_that_runs_out_is_one_line(place, message, files, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setenv("XDG_CACHE_HOME", str(files / "cache"))  # else the features are taken from there
    monkeypatch.setattr(place, full)
    with pytest.raises(UserError) as caught:
        evaluate(files, *MINI)
    assert str(caught.value).startswith(message) and not (files / "out.json").exists()


def test_identical_sets(files):
    found = evaluate(files, *MINI, reference="samples.npz")["metrics"]
    assert abs(found["fid"]) < 1e-6 and found["precision"] == found["recall"] == 1
    assert found["accuracy"] > 0.85


def test_layouts_give_the_same_figures(files):
    expected = evaluate(files, *MINI)["metrics"]
    with np.load(files / "samples.npz") as file:
        np.savez_compressed(files / "compressed.npz", **file)
        (files / "folder").mkdir()
        for i, image in enumerate(file["arr_0"]):
            Image.fromarray(image).save(files / "folder" / f"{i:04d}.png")
    for samples in ("compressed.npz", "folder"):
        found = evaluate(files, *MINI, samples=samples)["metrics"]
        assert {k: v for k, v in found.items() if k != "accuracy"} == pytest.approx(
            {k: v for k, v in expected.items() if k != "accuracy"}, rel=1e-6
        )
    run(
        ROOT / "eval_fid.py",
        "--samples",
        files / "samples.npz",
        "--reference",
        files / "reference.npz",
        *MINI,
        "--output",
        files / "two.json",
        processes=2,
    )
    assert json.loads((files / "two.json").read_text())["metrics"] == pytest.approx(expected, rel=1e-6)


def test_made_reference_is_taken_at_its_word(files):
    expected = evaluate(files, *MINI)
    make_reference.main(
        [
            "--images",
            str(files / "reference.npz"),
            *MINI,
            "--kept-images",
            "600",
            "--output",
            str(files / "made.npz"),
        ]
    )
    found = evaluate(files, *MINI, reference="made.npz")
    assert found["metrics"]["fid"] == pytest.approx(expected["metrics"]["fid"], rel=1e-6)
    assert found["metrics"]["precision"] == expected["metrics"]["precision"]
    assert any("no mu and sigma" in note for note in expected["notes"]) and not any(
        "no mu and sigma" in note for note in found["notes"]
    )
    with np.load(files / "made.npz") as file:
        np.savez(files / "bare.npz", mu=file["mu"], sigma=file["sigma"])
    bare = evaluate(files, *MINI, reference="bare.npz")
    assert set(bare["metrics"]) == {"fid", "is", "accuracy"}
    assert any("precision is left out" in note for note in bare["notes"])


def test_reference_features_are_cached_by_content(files, monkeypatch, capsys):
    first = evaluate(files, *MINI)["metrics"]
    shutil.copy(files / "reference.npz", files / "renamed.npz")
    monkeypatch.setattr("cca.evaluation.evaluator.extract", _only_once())
    assert evaluate(files, *MINI, reference="renamed.npz")["metrics"] == first


def _only_once():
    from cca.evaluation.evaluator import extract

    calls = []

    def guarded(*arguments):
        calls.append(1)
        assert len(calls) == 1, "the reference was extracted again"
        return extract(*arguments)

    return guarded


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights in torch-fidelity's format."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    # The extractor's constructor downloads; here it keeps what it was initialised with.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch_fidelity.feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {}
        )
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict(), path)
    return path


def test_inception_path(files, inception_weights):
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(files / f"{name}.npz", arr_0=generator.integers(0, 256, (12, 256, 256, 3), np.uint8))
    report = evaluate(
        files, "--inception-weights", str(inception_weights), samples="a.npz", reference="b.npz"
    )
    assert set(report["metrics"]) == {"fid", "sfid", "is", "precision", "recall", "kid"}
    assert all(np.isfinite(v) for v in report["metrics"].values())
    assert (
        evaluate(files, "--features", str(inception_weights), samples="a.npz", reference="b.npz")["metrics"]
        == report["metrics"]
    )
    extractor = make_extractor("inception", inception_weights, torch.device("cpu"))
    save_file(torch.load(inception_weights, weights_only=True), files / "inception.safetensors")
    assert (
        make_extractor("inception", files / "inception.safetensors", torch.device("cpu")).weights_sha256
        == extractor.weights_sha256
    )
    images = torch.from_numpy(np.load(files / "a.npz")["arr_0"][:2]).permute(0, 3, 1, 2)
    found = extractor(images)
    assert (
        found.pooled.shape == (2, 2048)
        and found.probabilities.shape == (2, 1008)
        and found.spatial.shape == (2, 2023)
    )
    # Channels last, as TensorFlow flattens: mu_s and sigma_s of a reference file are in that order.
    branch = {}
    extractor.module.Mixed_6d.branch1x1.register_forward_hook(
        lambda m, i, output: branch.update(output=output)
    )
    again = extractor(images).spatial.view(2, 17, 17, 7)
    assert torch.equal(again[:, 3, 5], branch["output"][:, :7, 3, 5])


def test_notes(files):
    report = evaluate(files, *MINI)
    text = " ".join(report["notes"])
    for part in ("not Inception", "600 samples instead of 50,000", "no mu and sigma"):
        assert part in text
    assert "sorted" not in text and "unbalanced" not in text and "guidance" not in text
    with np.load(files / "samples.npz") as file:
        order = np.argsort(file["arr_1"], kind="stable")
        # Without labels: seen in what the classifier predicts.
        np.savez(files / "sorted.npz", arr_0=file["arr_0"][order])
        skewed = np.sort(np.r_[np.flatnonzero(file["arr_1"] == 1), np.flatnonzero(file["arr_1"] != 1)[:100]])
        np.savez(files / "skewed.npz", arr_0=file["arr_0"][skewed], arr_1=file["arr_1"][skewed])
    assert any("sorted by class" in note for note in evaluate(files, *MINI, samples="sorted.npz")["notes"])
    assert any("unbalanced" in note for note in evaluate(files, *MINI, samples="skewed.npz")["notes"])
    (files / "samples.json").write_text(
        json.dumps({"options": {"cfg_scale": 2.5, "model": "var-d16", "weights": "base"}})
    )
    assert any(
        "with guidance (--cfg-scale 2.5; VAR writes 1.5)" in note for note in evaluate(files, *MINI)["notes"]
    )
    (files / "jpeg").mkdir()
    for i, image in enumerate(np.load(files / "samples.npz")["arr_0"][:20]):
        Image.fromarray(image).save(files / "jpeg" / f"{i}.jpg")
    assert any(
        "20 of 20 images" in note and "JPEG" in note
        for note in evaluate(files, *MINI, samples="jpeg")["notes"]
    )


def test_class_order():
    assert class_order_notes(np.arange(1000).repeat(50), known=True)[0].startswith("the images are sorted")
    assert class_order_notes(np.tile(np.arange(1000), 50), known=True) == []
    assert class_order_notes(np.random.default_rng(0).integers(0, 1000, 50_000), known=True) == []


def test_compare(files, capsys):
    (files / "samples.json").write_text(
        json.dumps({"options": {"cfg_scale": 2.5, "model": "var-d16", "weights": "base"}})
    )
    fid = evaluate(files, *MINI)["metrics"]["fid"]
    capsys.readouterr()
    eval_fid.main(["--compare", str(files / "out.json")])
    row = capsys.readouterr().out.splitlines()[-1]
    assert "| 3.55 |" in row and f"{fid - 3.55:+.3f}" in row  # the published figure with guidance
    with pytest.raises(UserError, match="is not a result"):
        eval_fid.main(["--compare", str(files / "samples.json")])


def test_running_gaussian_far_from_zero():
    features = np.random.default_rng(0).normal(1e4, 1, (1000, 5))
    running = RunningGaussian()
    for part in np.array_split(features, 7):
        running.add(part)
    np.testing.assert_allclose(running.fit().sigma, np.cov(features, rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(Gaussian.of(features).mu, features.mean(0), rtol=1e-12)
