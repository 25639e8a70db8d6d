"""Inputs of the evaluator: folders of images, statistics, descriptions of samples, and damaged .npz files."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from made_data import bundled
from PIL import Image

import eval_fid
from cca.data.image_sets import NpzImages
from cca.evaluation.metrics import Gaussian
from models.utils.errors import UserError
from scripts import make_reference

IMAGES = 60


def make_description(**options):
    """Return the content of a description as sample.py writes it."""
    return json.dumps({"format": 1, "kind": "samples", "options": {"num_samples": 60, **options}})


def test_no_accuracy_for_unknown_classes(evaluate):
    images, labels = bundled(IMAGES).values()
    np.savez("others.npz", arr_0=images, arr_1=np.where(labels == 9, 10, labels))
    assert "accuracy" in evaluate()["metrics"] and "accuracy" not in evaluate("others.npz")["metrics"]
    notes = evaluate("others.npz", "--metrics", "fid,accuracy")["notes"]
    assert "accuracy is left out" in " ".join(notes)


def test_classes_of_a_sample_folder(evaluate, write_folder):
    images, labels = bundled(IMAGES).values()
    expected = evaluate()["metrics"]["accuracy"]
    some = np.isin(labels, (2, 5, 7))
    write_folder("unpacked", images, labels)
    report = evaluate("unpacked")
    assert "accuracy" not in report["metrics"] and "--classes-from" in " ".join(report["notes"])
    assert report["samples"]["classes"] is None
    Path("unpacked.json").write_text(make_description(model="var-mini"))
    report = evaluate("unpacked")
    assert report["metrics"]["accuracy"] == expected and report["samples"]["classes"]["9"] == 9
    write_folder("some", images[some], labels[some])
    Path("some.json").write_text(make_description(model="llamagen-mini"))
    assert evaluate("some")["metrics"]["accuracy"] > 0.8  # folders 2, 5 and 7 of ten classes
    write_folder("named", images, [f"class-{label}" for label in labels])
    Path("classes.json").write_text(json.dumps({f"class-{i}": i for i in range(10)}))
    assert evaluate("named", "--classes-from", "classes.json")["metrics"]["accuracy"] == expected


def test_mixed_sizes_are_resized(evaluate):
    """Metrics do not depend on the number of data-loading workers or on the batch size."""
    sizes = [(40, 48), (64, 33), (32, 32)]
    for folder, file in (("mixed", "samples.npz"), ("real", "reference.npz")):
        Path(folder).mkdir()
        for i, image in enumerate(np.load(file)["arr_0"]):
            Image.fromarray(image).resize(sizes[i % 3]).save(f"{folder}/{i:02d}.png")
    Path("mixed/list.txt").touch()
    with pytest.raises(UserError, match="other images are 48 x 40; .*--resize"):
        evaluate("mixed")
    resized = ["mixed", "--resize", "32"]
    report = evaluate(*resized, reference="real")
    metrics = report["metrics"]
    with_workers = evaluate(*resized, "--workers", "2", "--batch-size", "7", reference="real")["metrics"]
    assert with_workers == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    notes = " ".join(report["notes"])
    assert notes.count("are resized and cropped to 32 x 32") == 2
    assert "1 other files are left out, such as list.txt" in notes
    # Cached features of the reference belong to one resolution.
    assert evaluate("mixed", "--resize", "24", reference="real")["metrics"] != metrics
    options = ["--features", "mini", "--images", "real", "--image-size", "32", "--workers", "2"]
    make_reference.main([*options, "--output", "made.npz"])
    assert evaluate(*resized, reference="made.npz")["metrics"]["fid"] == pytest.approx(metrics["fid"])


def save_reference(path, **changed):
    """Write the reference's images with statistics of random numbers; an array that is None is left out."""
    fit = Gaussian.of(np.random.default_rng(0).normal(size=(200, 96)))
    arrays = {"arr_0": np.load("reference.npz")["arr_0"], "mu": fit.mu, "sigma": fit.sigma, **changed}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


def test_mu_without_sigma_is_not_used(evaluate):
    save_reference("half.npz", sigma=None)
    report, notes = evaluate(reference="half.npz"), "half.npz holds mu but no sigma, so mu is not used"
    assert report["metrics"] == evaluate()["metrics"] and notes in report["notes"]
    assert "no mu and sigma of a whole training set" in " ".join(report["notes"])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"mu": np.full(96, np.nan)}, "bad.npz: mu holds values that are not finite"),
        (
            {"mu": np.zeros(2048), "sigma": np.eye(2048), "arr_0": None},
            "mu has 2048 dimensions; --features mini needs 96",
        ),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "mu has 2048 dimensions; --features mini needs 96"),
    ],
)
def test_statistics_are_checked_before_images(evaluate, changed, message, monkeypatch):
    save_reference("bad.npz", **changed)
    monkeypatch.setattr(NpzImages, "batches", lambda *_: pytest.fail("images were read"))
    with pytest.raises(UserError, match=message):
        evaluate(reference="bad.npz")


NO_DESCRIPTIONS = [
    "", "[]", "1", "null", '"options"', "{}", '{"format": 1, "options": null}',
    '{"format": 1, "options": []}', '{"format": 1, "options": "num_samples"}', '{"format": 1, "options": {}}',
    '{"options": {"num_samples": 60, "cfg_scale": 2.0}}',
    '{"format": 2, "options": {"num_samples": 60, "cfg_scale": 2.0}}',
    make_description(cfg_scale="2"), make_description(cfg_scale=None), make_description(cfg_scale=[1]),
    make_description(cfg_scale=float("nan")), make_description(seed=float("inf")),
    make_description(model=[]), make_description(model={}),
    "[" * 100_000, "\xff", make_description(cfg_scale="?").replace('"?"', "1" + "0" * 400),
]  # fmt: skip
NO_RESULTS = [
    '{"format": 1, "metrics": {"fid": "x"}, "samples": {"file": "a", "sampling": null}}',
    '{"format": 1, "metrics": {"fid": 1}, "samples": {"file": 3, "sampling": null}}',
    '{"format": 1, "metrics": 1, "samples": []}',
    '{"format": 1, "metrics": {"fid": null}, "samples": {"file": "a", "sampling": null}}',
    '{"format": 1, "metrics": {"fid": 1%s}, "samples": {"file": "a", "sampling": null}}' % ("0" * 400),
    '{"format": 1, "metrics": {}, "samples": {"file": "a", "sampling": {"model": []}}}',
    '{"metrics": {"fid": 1}, "samples": {"file": "a", "sampling": null}}',
]


def test_json_of_other_programs(evaluate):
    """A JSON file of another program beside samples is ignored, and ``--compare`` refuses it."""
    expected = evaluate()["metrics"]
    for content in (*NO_DESCRIPTIONS, *NO_RESULTS):
        Path("samples.json").write_bytes(content.encode("latin1"))
        with pytest.raises(UserError, match="is not a result"):
            eval_fid.main(["--compare", "samples.json"])
        if content in NO_DESCRIPTIONS:
            report = evaluate()
            assert report["metrics"] == expected and not report["samples"]["sampling"]


def test_description_is_not_overwritten(evaluate, write_folder):
    """Results may have the name of a description if sample.py did not write one."""
    write_folder("photos", bundled(IMAGES)["arr_0"])
    for _ in range(2):
        assert evaluate("photos", output="photos.json")["samples"]["sampling"] is None
    for samples, output in (("photos", "photos.json"), ("samples.npz", "./samples.json")):
        Path(output).write_text(make_description())
        with pytest.raises(UserError, match="--output: .*json describes 'samples', not results"):
            evaluate(samples, output=output)
        assert Path(output).read_text() == make_description()


def make_archive(compression=zipfile.ZIP_STORED, array=None, damage=lambda data: data):
    buffer, content = io.BytesIO(), io.BytesIO()
    np.save(content, np.zeros((9, 32, 32), np.uint8) if array is None else array)
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("arr_0.npy", content.getvalue())
    return damage(bytearray(buffer.getvalue()))


def set_field(offset, value):
    """Return a function that sets a 16-bit field of a .zip member.

    ``offset`` is the offset in the local header; the one in the central directory is 2 bytes larger.
    """

    def damage(data):
        central = data.index(b"PK\x01\x02")
        for at in (offset, central + 2 + offset):
            data[at : at + 2] = value.to_bytes(2, "little")
        return data

    return damage


ARCHIVES = [
    make_archive(damage=set_field(6, 1)),  # encrypted
    make_archive(damage=set_field(8, 99)),  # unknown compression
    make_archive(zipfile.ZIP_LZMA)[:-200],
    make_archive(zipfile.ZIP_DEFLATED, damage=lambda data: data[:60] + b"\xff" * 20 + data[80:]),
    make_archive(zipfile.ZIP_BZIP2, damage=lambda data: data[:60] + b"\xff" * 20 + data[80:]),
    make_archive(array=np.zeros((9, 32, 32, 1), np.uint8)),
    make_archive(array=np.zeros((9, 32, 32, 4), np.uint8)),
    make_archive(array=np.zeros((9, 0, 32, 3), np.uint8)),
    make_archive(array=np.zeros((), np.uint8)),
    make_archive(array=np.asfortranarray(np.zeros((9, 32, 32), np.uint8))),
    make_archive(array=np.array(["x", None], object)),
    make_archive(array=np.zeros(9, [("a", "u1")])),
    make_archive(damage=lambda data: data.replace(b"'shape'", b"'shapf'")),
    make_archive(damage=lambda data: data.replace(b"(9, 32, 32)", b"((((((((((("[:11])),
]


@pytest.mark.parametrize("content", ARCHIVES, ids=range(len(ARCHIVES)))
def test_invalid_npz_is_one_line(evaluate, content):
    Path("odd.npz").write_bytes(content)
    for options in ({"samples": "odd.npz"}, {"reference": "odd.npz"}):
        with pytest.raises(UserError, match="odd.npz: ") as caught:
            evaluate(**options)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "labels", [np.eye(10)[np.zeros(60, int)], np.zeros((60, 1)), np.full(60, -1), np.zeros(5)]
)
def test_labels_of_samples_are_checked(evaluate, labels):
    np.savez("odd.npz", arr_0=bundled(IMAGES)["arr_0"], arr_1=labels)
    with pytest.raises(UserError, match="odd.npz"):
        evaluate("odd.npz")


@pytest.mark.parametrize("member", ["arr_1", "mu"])
def test_member_that_is_not_an_array(evaluate, member):
    """numpy returns the bytes of a member that is not an array, without an error."""
    save_reference("odd.npz", **{"arr_1": np.zeros(60, np.int64), member: None})
    with zipfile.ZipFile("odd.npz", "a") as file:
        file.writestr(f"{member}.npy", b"junk")
    with pytest.raises(UserError, match=f"odd.npz: {member} is not readable"):
        evaluate("odd.npz", reference="odd.npz")
