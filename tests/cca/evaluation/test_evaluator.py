"""The evaluator as users run it: metrics, layouts of the inputs, cached features and notes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from commands import ROOT, run
from limits import memory_full
from made_data import bundled
from safetensors.torch import save_file
from torch.utils.data import Subset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from cca.evaluation.features import Extractor
from models.utils.errors import UserError
from scripts import make_reference

IMAGES = 600
GUIDED = {"num_samples": 600, "cfg_scale": 2.5, "model": "var-d16", "weights": "base"}


def test_agrees_with_torch_fidelity(evaluate):
    metrics = evaluate("samples.npz", "--metrics", "fid,is,kid")["metrics"]
    inputs = [torch.from_numpy(np.load(f"{name}.npz")["arr_0"]) for name in ("samples", "reference")]
    samples, reference = (Subset(pixels[:, None].expand(-1, 3, -1, -1), range(IMAGES)) for pixels in inputs)
    expected = torch_fidelity.calculate_metrics(
        input1=samples, input2=reference, fid=True, isc=True, isc_splits=1, kid=True, kid_subset_size=IMAGES,
        feature_extractor="mini", feature_layer_fid="96", feature_layer_kid="96", feature_layer_isc="logits",
        samples_shuffle=False, cuda=False, verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip
    assert metrics["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert metrics["is"] == pytest.approx(expected["inception_score_mean"], rel=1e-4)
    assert metrics["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)


@pytest.mark.parametrize(
    "place, message",
    [
        ("cca.evaluation.features.MiniFeatures.to", "--features: mini does not fit in GPU memory"),
        (
            "cca.evaluation.features.MiniFeatures.forward",
            "--batch-size: 250 images at once do not fit in GPU memory",
        ),
        (
            "cca.evaluation.evaluator.precision_recall",
            "--metrics: precision does not fit in GPU memory",
        ),
    ],
)
def test_out_of_memory_is_one_line(place, message, evaluate, monkeypatch):
    monkeypatch.setattr(place, memory_full)
    with pytest.raises(UserError) as caught:
        evaluate()
    assert str(caught.value).startswith(message) and not Path("out.json").exists()


@pytest.mark.slow
def test_layouts_give_the_same_metrics(evaluate, write_folder):
    expected = evaluate()["metrics"]
    paths = ["--samples", Path("samples.npz").resolve(), "--reference", Path("reference.npz").resolve()]
    output = Path("two.json").resolve()
    run(ROOT / "eval_fid.py", "--features", "mini", *paths, "--output", output, processes=2)
    assert json.loads(output.read_text())["metrics"] == pytest.approx(expected, rel=1e-6)
    del expected["accuracy"]
    images = bundled(IMAGES)["arr_0"]
    np.savez_compressed("compressed.npz", arr_0=images)
    np.savez("colour.npz", arr_0=np.repeat(images[..., None], 3, axis=3))
    write_folder("folder", images)
    for samples in ("compressed.npz", "colour.npz", "folder"):
        assert evaluate(samples)["metrics"] == pytest.approx(expected, rel=1e-6)


def test_reference_of_make_reference(evaluate):
    """Metrics equal those with the images; without images, metrics that need them are left out."""
    expected = evaluate()
    options = ["--images", "reference.npz", "--features", "mini", "--kept-images", "600"]
    make_reference.main([*options, "--output", "made.npz"])
    from_reference = evaluate(reference="made.npz")
    assert from_reference["metrics"]["fid"] == pytest.approx(expected["metrics"]["fid"], rel=1e-6)
    assert from_reference["metrics"]["precision"] == expected["metrics"]["precision"]
    assert "no mu and sigma" in " ".join(expected["notes"])
    assert "no mu and sigma" not in " ".join(from_reference["notes"])
    with np.load("made.npz") as file:
        np.savez("bare.npz", mu=file["mu"], sigma=file["sigma"])
    bare = evaluate(reference="bare.npz")
    assert set(bare["metrics"]) == {"fid", "is", "accuracy"}
    assert any("precision is left out" in note for note in bare["notes"])
    selected = evaluate("samples.npz", "--metrics", "kid,fid", reference="bare.npz")
    assert set(selected["metrics"]) == {"fid"} and "kid is left out" in " ".join(selected["notes"])


def test_reference_features_are_cached_by_content(evaluate, monkeypatch):
    first = evaluate()["metrics"]
    shutil.copy("reference.npz", "renamed.npz")
    monkeypatch.setattr("cca.evaluation.evaluator.extract", lambda *_: pytest.fail("extracted again"))
    assert evaluate(reference="renamed.npz")["metrics"] == first


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Return the path of random weights in torch-fidelity's format."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    # The extractor's constructor would download weights. With the patches it keeps its random ones.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch_fidelity.feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {}
        )
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save(FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict(), path)
    return path


def test_inception_features(evaluate, inception_weights):
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 256, 256, 3), np.uint8)
    for name, some in zip(("a.npz", "b.npz"), images):
        np.savez(name, arr_0=some)
    save_file(torch.load(inception_weights, weights_only=True), "inception.safetensors")
    own = ("--inception-weights", str(inception_weights)), ("--features", "inception.safetensors")
    first = evaluate("a.npz", reference="b.npz", features=own[0])
    again = evaluate("a.npz", "--metrics", "is,kid", reference="b.npz", features=own[1])
    assert set(first["metrics"]) == {"fid", "sfid", "is", "precision", "recall", "kid"}
    assert all(np.isfinite(value) for value in first["metrics"].values())
    assert again["metrics"].items() <= first["metrics"].items() and len(again["metrics"]) == 2
    assert again["features"] == first["features"]
    # Spatial features are flattened with channels last as in TensorFlow; mu_s and sigma_s have this order.
    extractor, branch = Extractor("inception", inception_weights, torch.device("cpu")), []
    extractor.module.Mixed_6d.branch1x1.register_forward_hook(lambda *arguments: branch.append(arguments[-1]))
    features = extractor(torch.from_numpy(images[0, :2]).permute(0, 3, 1, 2))
    assert features.pooled.shape == (2, 2048) and features.probabilities.shape == (2, 1008)
    assert features.spatial.shape == (2, 2023)
    assert torch.equal(features.spatial.view(2, 17, 17, 7)[:, 3, 5], branch[0][:, :7, 3, 5])


def test_notes(evaluate, write_folder):
    text = " ".join(evaluate()["notes"])
    for part in ("not Inception", "600 samples instead of 50,000", "no mu and sigma"):
        assert part in text
    assert "sorted" not in text and "unbalanced" not in text and "guidance" not in text
    images, labels = bundled(IMAGES).values()
    # Without labels, the classifier's predictions show the order.
    np.savez("sorted.npz", arr_0=images[np.argsort(labels, kind="stable")])
    skewed = np.sort(np.r_[np.flatnonzero(labels == 1), np.flatnonzero(labels != 1)[:100]])
    np.savez("skewed.npz", arr_0=images[skewed], arr_1=labels[skewed])
    write_folder("jpeg", images[:20], suffix=".jpg")
    Path("samples.json").write_text(json.dumps({"format": 1, "options": GUIDED}))
    for samples, note in (
        ("sorted.npz", "sorted by class"),
        ("skewed.npz", "unbalanced"),
        ("jpeg", "20 of 20 images of jpeg are JPEG"),
        ("samples.npz", "with guidance (--cfg-scale 2.5; VAR writes 1.5)"),
    ):
        assert note in " ".join(evaluate(samples)["notes"])


@pytest.mark.parametrize("newer", [False, True], ids=["legacy settings", "newer settings"])
def test_features_are_computed_without_tf32(newer):
    """The extractor disables TF32, whichever of PyTorch's settings enabled it, and restores the setting."""
    matmul, conv, seen = torch.backends.cuda.matmul, torch.backends.cudnn.conv, []
    extractor = Extractor("mini", None, torch.device("cpu"))

    def settings():
        return matmul.fp32_precision, conv.fp32_precision

    before = settings()
    try:
        if newer:
            matmul.fp32_precision = conv.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
        around = settings()
        extractor.module.register_forward_pre_hook(lambda *_: seen.append(settings()))
        extractor(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
        assert around == settings() == ("tf32", "tf32") and seen == [("ieee", "ieee")]
        assert newer or torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision, conv.fp32_precision = before


def test_spaces_between_names_of_metrics(evaluate):
    assert set(evaluate("samples.npz", "--metrics", "is, fid")["metrics"]) == {"fid", "is"}
