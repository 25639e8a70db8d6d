"""What the evaluator takes: folders of any kind, statistics, records beside samples."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from commands import REFERENCE, ROOT, TRAIN
from PIL import Image

import eval_fid
from cca.data.image_sets import NpzImages
from cca.evaluation.metrics import Gaussian, kernel_distance
from models.errors import UserError
from scripts import make_reference


@pytest.fixture
def files(tmp_path, monkeypatch):
    """60 images of each of the two bundled sets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, source in (("samples", TRAIN), ("reference", REFERENCE)):
        with np.load(ROOT / source) as file:
            np.savez(tmp_path / f"{name}.npz", arr_0=file["arr_0"][:60], arr_1=file["arr_1"][:60])
    return tmp_path


def evaluate(samples, *options, reference="reference.npz"):
    fixed = ["--features", "mini", "--samples", samples, "--reference", reference, "--output", "out.json"]
    eval_fid.main([*fixed, *options])
    report = json.loads(Path("out.json").read_text(), parse_constant=pytest.fail)
    return report["metrics"], " ".join(report["notes"]), report


def write_folder(path, images, labels=None, suffix=".png", bits=8):
    for i, image in enumerate(images):
        place = path / (f"{i:03d}{suffix}" if labels is None else f"{labels[i]}/{i:03d}{suffix}")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint16) * 257 if bits == 16 else image).save(place)


def arrays():
    with np.load("samples.npz") as file:
        return file["arr_0"], file["arr_1"]


def test_no_accuracy_of_classes_that_the_classifier_does_not_know(files):
    images, labels = arrays()
    np.savez("others.npz", arr_0=images, arr_1=np.where(labels == 9, 10, labels))
    assert "accuracy" in evaluate("samples.npz")[0] and "accuracy" not in evaluate("others.npz")[0]
    notes = evaluate("others.npz", "--metrics", "fid,accuracy")[1]
    assert "accuracy is left out: these files or features do not give it" in notes


def test_grey_of_16_bits_and_other_formats_give_the_same_figures(files):
    expected = evaluate("samples.npz")[0]["fid"]
    write_folder(files / "deep", arrays()[0], bits=16)
    write_folder(files / "tif", arrays()[0], suffix=".tif")
    assert evaluate("deep")[0]["fid"] == evaluate("tif")[0]["fid"] == expected


def test_linked_class_folders_count(files):
    images, labels = arrays()
    write_folder(files / "far", images, labels)
    (files / "near").mkdir()
    for folder in (files / "far").iterdir():
        (files / "near" / folder.name).symlink_to(folder)
    (files / "near" / "again").symlink_to(files / "near")
    (files / "near" / "list.txt").write_text("")
    _, notes, report = evaluate("near")
    assert report["samples"]["count"] == 60
    assert "left out, no image files: 1 (such as list.txt)" in notes
    options = ["--features", "mini", "--images", "near", "--output", "made.npz"]
    make_reference.main(options)
    assert len(NpzImages(files / "made.npz")) == 60


def test_classes_of_a_folder_of_samples(files):
    images, labels = arrays()
    expected = evaluate("samples.npz")[0]["accuracy"]
    some = np.isin(labels, (2, 5, 7))
    write_folder(files / "unpacked", images, labels)
    values, notes, report = evaluate("unpacked")
    assert "accuracy" not in values and "--classes-from" in notes and report["samples"]["classes"] is None
    (files / "unpacked.json").write_text('{"options": {"model": "var-mini"}}')
    values, _, report = evaluate("unpacked")
    assert values["accuracy"] == expected and report["samples"]["classes"]["9"] == 9
    write_folder(files / "some", images[some], labels[some])
    (files / "some.json").write_text('{"options": {"model": "llamagen-mini"}}')
    assert evaluate("some")[0]["accuracy"] > 0.8  # three of ten classes, by their numbers
    names = np.array([f"class-{label}" for label in labels])
    write_folder(files / "named", images, names)
    (files / "classes.json").write_text(json.dumps({f"class-{i}": i for i in range(10)}))
    assert evaluate("named", "--classes-from", "classes.json")[0]["accuracy"] == expected


def test_mixed_sizes_are_resized_and_loaded_by_several_processes(files):
    sizes = [(40, 48), (64, 33), (32, 32)]
    for name in ("mixed", "real"):
        (files / name).mkdir()
        with np.load("samples.npz" if name == "mixed" else "reference.npz") as file:
            for i, image in enumerate(file["arr_0"]):
                Image.fromarray(image).resize(sizes[i % 3]).save(files / name / f"{i:02d}.png")
    with pytest.raises(UserError, match="other images are 48 x 40; --resize"):
        evaluate("mixed")
    found, notes, _ = evaluate("mixed", "--resize", "32", reference="real")
    by_two = evaluate("mixed", "--resize", "32", "--workers", "2", "--batch-size", "7", reference="real")[0]
    assert by_two == pytest.approx(found, rel=1e-4, abs=1e-6)
    assert notes.count("are resized and cut to 32 x 32 (centre)") == 2
    # The reference's features in the cache are those of its size.
    assert evaluate("mixed", "--resize", "24", reference="real")[0] != found
    make_reference.main(
        [
            "--features",
            "mini",
            "--images",
            "real",
            "--image-size",
            "32",
            "--workers",
            "2",
            "--output",
            "made.npz",
        ]
    )
    assert evaluate("mixed", "--resize", "32", reference="made.npz")[0]["fid"] == pytest.approx(found["fid"])


def statistics(**changed):
    features = np.random.default_rng(0).normal(size=(200, 96))
    fit = Gaussian.of(features)
    with np.load("reference.npz") as file:
        held = {"arr_0": file["arr_0"], "mu": fit.mu, "sigma": fit.sigma, **changed}
        return {name: value for name, value in held.items() if value is not None}


def test_mean_without_covariance_is_not_taken(files):
    expected = evaluate("samples.npz")[0]
    np.savez("half.npz", **statistics(sigma=None))
    values, notes, _ = evaluate("samples.npz", reference="half.npz")
    assert values == expected
    assert "half.npz holds mu and no sigma" in notes and "no mu and sigma of a whole training set" in notes


BAD = [
    ({"mu": np.full(96, np.nan)}, "mu holds numbers that are not finite"),
    ({"sigma": np.full((96, 96), np.inf)}, "sigma holds numbers that are not finite"),
    ({"mu": np.full(96, -1e200)}, r"mu holds 1e\+200, which is out of all proportion"),
    ({"sigma": np.diag(np.full(96, 1e300))}, r"sigma holds 1e\+300, which is out of all proportion"),
    ({"sigma": np.triu(np.ones((96, 96)))}, "sigma is not symmetric"),
    ({"sigma": np.eye(96) * 1j}, "sigma is complex128"),
    ({"sigma": -np.eye(96)}, "negative variances"),
    ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "do not fit"),
    ({"sigma": np.eye(95)}, "do not fit"),
    ({"mu": np.zeros((1, 96))}, r"mu is float64 \[1, 96\]"),
    ({"mu": np.array(["a"] * 96)}, "expected real numbers"),
    (
        {"mu": np.zeros(2048), "sigma": np.eye(2048), "arr_0": None},
        "mu has 2048 dimensions, --features mini gives 96",
    ),
    ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "mu has 2048 dimensions, --features mini gives 96"),
]


@pytest.mark.parametrize("changed, message", BAD, ids=lambda value: None)
def test_statistics_that_are_none_are_refused(files, changed, message, monkeypatch):
    """Before any features are computed."""
    np.savez("bad.npz", **statistics(**changed))
    monkeypatch.setattr(NpzImages, "batches", lambda *_: pytest.fail("images were read"))
    with pytest.raises(UserError, match=message):
        evaluate("samples.npz", reference="bad.npz")


def test_record_of_any_shape(files):
    """A JSON file beside samples that sample.py did not write plays no part."""
    expected = evaluate("samples.npz")[0]
    for content in (
        "", "[]", "1", "null", '"options"', "{}", '{"options": null}', '{"options": []}', '{"options": "x"}',
        '{"options": {"cfg_scale": "2"}}', '{"options": {"cfg_scale": null}}',
        '{"options": {"cfg_scale": [1]}}',
        '{"options": {"cfg_scale": NaN}}', '{"options": {"seed": Infinity}}', '{"options": {"model": []}}',
        '{"options": {"model": {}}}', "[" * 100_000, "\xff", '{"options": {"cfg_scale": 1%s}}' % ("0" * 400),
    ):  # fmt: skip
        (files / "samples.json").write_bytes(content.encode("latin1"))
        values, _, report = evaluate("samples.npz")
        assert values == expected and not report["samples"]["sampling"]
        with pytest.raises(UserError, match="is not a result"):
            eval_fid.main(["--compare", "samples.json"])
    for content in ('{"metrics": {"fid": "1"}, "samples": {"file": 3}}', '{"metrics": 1, "samples": []}',
                    '{"metrics": {"fid": null}, "samples": {"file": "a"}}',
                    '{"metrics": {"fid": 1%s}, "samples": {"file": "a"}}' % ("0" * 400),
                    '{"metrics": {}, "samples": {"file": "a", "sampling": {"model": []}}}'):  # fmt: skip
        (files / "samples.json").write_text(content)
        with pytest.raises(UserError, match="is not a result"):
            eval_fid.main(["--compare", "samples.json"])


def archive(compression=zipfile.ZIP_STORED, array=None, damage=lambda data: data):
    buffer, content = io.BytesIO(), io.BytesIO()
    np.save(content, np.zeros((9, 32, 32), np.uint8) if array is None else array)
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("arr_0.npy", content.getvalue())
    return damage(bytearray(buffer.getvalue()))


def set_field(offset, value):
    """Set a 16-bit field of the local header, and of the central directory, 2 bytes further there."""

    def damage(data):
        central = data.index(b"PK\x01\x02")
        for at in (offset, central + 2 + offset):
            data[at : at + 2] = value.to_bytes(2, "little")
        return data

    return damage


ARCHIVES = [
    archive(damage=set_field(6, 1)),  # encrypted
    archive(damage=set_field(8, 99)),  # unknown compression
    archive(zipfile.ZIP_LZMA)[:-200],
    archive(zipfile.ZIP_DEFLATED, damage=lambda data: data[:60] + b"\xff" * 20 + data[80:]),
    archive(zipfile.ZIP_BZIP2, damage=lambda data: data[:60] + b"\xff" * 20 + data[80:]),
    archive(array=np.zeros((9, 32, 32, 1), np.uint8)),
    archive(array=np.zeros((9, 32, 32, 4), np.uint8)),
    archive(array=np.zeros((9, 0, 32, 3), np.uint8)),
    archive(array=np.zeros((), np.uint8)),
    archive(array=np.asfortranarray(np.zeros((9, 32, 32), np.uint8))),
    archive(array=np.array(["x", None], object)),
    archive(array=np.zeros(9, [("a", "u1")])),
    archive(damage=lambda data: data.replace(b"'shape'", b"'shapf'")),
    archive(damage=lambda data: data.replace(b"(9, 32, 32)", b"((((((((((("[:11])),
]


@pytest.mark.parametrize("content", ARCHIVES, ids=range(len(ARCHIVES)))
def test_archives_of_other_kinds_get_their_line(files, content):
    (files / "odd.npz").write_bytes(content)
    for options in ({"samples": "odd.npz"}, {"samples": "samples.npz", "reference": "odd.npz"}):
        with pytest.raises(UserError, match="odd.npz: ") as caught:
            evaluate(**options)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "labels", [np.eye(10)[np.zeros(60, int)], np.zeros((60, 1)), np.full(60, -1), np.zeros(5)]
)
def test_labels_of_samples_are_checked(files, labels):
    np.savez("odd.npz", arr_0=arrays()[0], arr_1=labels)
    with pytest.raises(UserError, match="odd.npz"):
        evaluate("odd.npz")


@pytest.mark.parametrize("member", ["arr_1", "mu"])
def test_a_member_that_is_no_array(files, member):
    """numpy hands the bytes of such a member on."""
    np.savez("odd.npz", **{**statistics(arr_1=np.zeros(60, np.int64)), member: np.zeros(3)})
    with zipfile.ZipFile("odd.npz") as before, zipfile.ZipFile("made.npz", "w") as made:
        for name in before.namelist():
            made.writestr(name, b"junk" if name == f"{member}.npy" else before.read(name))
    with pytest.raises(UserError, match=f"made.npz: {member} is not readable"):
        evaluate(
            **(
                {"samples": "made.npz"}
                if member == "arr_1"
                else {"samples": "samples.npz", "reference": "made.npz"}
            )
        )


def test_inputs_are_not_overwritten(files):
    write_folder(files / "folder", arrays()[0])
    for samples, output in (("samples.npz", "./samples.npz"), ("samples.npz", "reference.npz"),
                            ("samples.npz", "samples.json"), ("folder", "folder.json")):  # fmt: skip
        with pytest.raises(UserError, match="--output: "):
            evaluate(samples, "--output", output)
    with pytest.raises(UserError, match="--output: "):
        make_reference.main(["--features", "mini", "--images", "samples.npz", "--output", "samples.npz"])


def test_kernel_distance_is_torch_fidelitys(files):
    class Images(torch.utils.data.Dataset):
        def __init__(self, name):
            pixels = torch.from_numpy(np.load(f"{name}.npz")["arr_0"])
            self.images = pixels[:, None].expand(-1, 3, -1, -1)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i]

    expected = torch_fidelity.calculate_metrics(
        input1=Images("samples"), input2=Images("reference"), kid=True, kid_subset_size=60,
        feature_extractor="mini", feature_layer_kid="96", save_cpu_ram=True,
        cuda=False, verbose=False, cache=False,
    )  # fmt: skip
    found = evaluate("samples.npz", "--metrics", "kid,fid")[0]
    assert found["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    np.savez("bare.npz", **statistics(arr_0=None))
    values, notes, _ = evaluate("samples.npz", "--metrics", "kid,fid", reference="bare.npz")
    assert set(values) == {"fid"} and "kid is left out" in notes


def test_kernel_distance_is_unbiased():
    generator = np.random.default_rng(0)
    same, other = generator.normal(size=(2, 3000, 8)).astype(np.float32)
    assert abs(kernel_distance(same, other)) < 0.02 and kernel_distance(same, other + 1) > 1
