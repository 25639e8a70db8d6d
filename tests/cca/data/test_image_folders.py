"""Folders of images: which files are read, bit depths, fingerprints, names and EXIF orientation."""

import os
import unicodedata

import numpy as np
import pytest
from made_data import make_picture
from PIL import ExifTags, Image

from cca.data.datasets import open_labelled_images
from cca.data.image_folders import FileList, Folder, find_images
from cca.data.image_sets import open_image_set
from models import load_model
from models.transforms import TenCrops
from models.utils.errors import UserError


@pytest.fixture(scope="module")
def model():
    return load_model("var-mini")


def labels_of(data):
    return data.labels(np.arange(len(data))).tolist()


def test_folders_of_some_classes(tmp_path, model):
    for name in ("2/a", "5/a", "7/a", ".ipynb_checkpoints/a", "outside"):
        make_picture(tmp_path / f"{name}.png")
    data = open_labelled_images(tmp_path, model)
    assert labels_of(data) == [2, 5, 7] and data.classes == {"2": 2, "5": 5, "7": 7}
    assert data.notes() == [f"{tmp_path}: 1 images outside class folders are left out"]


def test_numbered_folders_are_sorted_by_name(tmp_path, model):
    """The index of an image depends on the names of the folders, not on their classes."""
    for name in ("0", "1", "10", "9"):
        make_picture(tmp_path / "train" / name / "a.png")
    with pytest.raises(UserError, match="class 10 .* outside 0 … 9"):
        open_labelled_images(tmp_path, model)
    (tmp_path / "train" / "10").rename(tmp_path / "train" / "08")
    data = open_labelled_images(tmp_path, model)
    assert data.source.names == ["0/a.png", "08/a.png", "1/a.png", "9/a.png"] and labels_of(data) == [
        0,
        8,
        1,
        9,
    ]


def test_suffixes_and_links(tmp_path, model):
    """Training and evaluation read files with the same suffixes, and follow each link once."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    suffixes = ("png", "JPG", "jpeg", "webp", "bmp", "tif", "tiff", "ppm", "pgm")
    for name in (*(f"0/a.{suffix}" for suffix in suffixes), "0/.hidden.png", "../elsewhere/b.png"):
        make_picture(data / name)
    for link, target in (("1", elsewhere), ("0/loop", data), ("0/self", "self"), ("0/gone.png", "none")):
        (data / link).symlink_to(target)
    (data / "0" / "list.txt").write_text("")
    os.mkfifo(data / "0" / "pipe.png")
    files, left_out = find_images(Folder(data))
    assert sorted(files) == sorted([*(f"0/a.{suffix}" for suffix in suffixes), "1/b.png"])
    assert left_out == f"{data}: 4 other files are left out, such as 0/gone.png"
    assert len(open_image_set(data)) == len(open_labelled_images(data, model)) == 10
    assert left_out in open_image_set(data).notes() and left_out in open_labelled_images(data, model).notes()


def test_unreadable_image_is_replaced_within_its_class(tmp_path, model):
    for name in ("0/a", "1/a", "1/b", "1/c"):
        make_picture(tmp_path / f"{name}.png", grey=40 * len(name) + ord(name[-1]))
    (tmp_path / "1" / "c.png").write_bytes(b"no picture")
    data = open_labelled_images(tmp_path, model, transform=TenCrops(16, 2))
    for index, replacement in ((0, 0), (1, 1), (3, 1)):
        pixels, replaced = data[0, index]
        assert replaced == (index != replacement) and bool((pixels == data[0, replacement][0]).all())
    assert data.unreadable == {3}
    for name in ("a", "b"):
        (tmp_path / "1" / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1/c.png and the next images of its class cannot be read"):
        data.item(0, 3)


def test_16_bit_grey_is_scaled(tmp_path, model):
    levels = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    expected = np.rint(levels / 257).astype(np.uint8)
    for name in ("0/a.png", "1/a.tif", "2/a.pgm"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(levels).save(tmp_path / name)
    Image.fromarray(levels.astype(np.int32)).save(tmp_path / "0" / "b.tif")
    images = np.concatenate(list(open_image_set(tmp_path).batches(slice(0, 4), 2)))
    assert (images == expected[..., None]).all()
    crops = open_labelled_images(tmp_path, model, transform=TenCrops(16, 2)).item(0, 2)
    assert np.array_equal(crops[0, 0], expected[:16, :16])


@pytest.mark.parametrize(
    "pixels, message",
    [(np.zeros((4, 4), np.float32), "floating-point"), (np.full((4, 4), 70_000, np.int32), "65,535")],
)
def test_other_bit_depths_are_refused(tmp_path, pixels, message):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=message):
        FileList(Folder(tmp_path), ["a.tif"]).image(0)


def test_long_and_huge_images_are_refused(tmp_path, monkeypatch):
    make_picture(tmp_path / "a.png", size=(400_000, 1))
    with pytest.raises(UserError, match="400000 x 1 pixels: too long"):
        open_image_set(tmp_path, resolution=256)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="not a readable image"):
        FileList(Folder(tmp_path), ["a.png"]).image(0)


def test_fingerprint_depends_on_contents(tmp_path):
    """The fingerprint reads 1,000 of 1,400 files (at i * 1,400 // 1,000), and all files of a small set."""
    names = [f"{i:04d}.bmp" for i in range(1400)]
    for name in names:
        (tmp_path / name).write_bytes(b"a" * 70)
    files = FileList(Folder(tmp_path), names)
    before, opened = files.fingerprint(), {i * 1400 // 1000 for i in range(1000)}
    for index, is_seen in [(0, True), (1, True), (3, False), (1398, True), (1399, False)]:
        assert is_seen == (index in opened)
        alone = FileList(Folder(tmp_path), names[index : index + 1])
        alone_before = alone.fingerprint()
        (tmp_path / names[index]).write_bytes(b"b" * 70)
        assert (files.fingerprint() != before) == is_seen and alone.fingerprint() != alone_before
        (tmp_path / names[index]).write_bytes(b"a" * 70)
    assert files.fingerprint() == before


def test_nfc_and_nfd_names_are_equal(tmp_path, model):
    results = []
    for form in ("NFC", "NFD"):
        for name in ("2/z\u00e9", "2/zf", "2/zd", "2/\u00e9/a"):
            make_picture(
                tmp_path / form / f"{unicodedata.normalize(form, name)}.png", grey=ord(name[-1]) % 200
            )
        for i, folder in enumerate(("caf\u00e9", "cafz", "cafa")):
            make_picture(tmp_path / form / unicodedata.normalize(form, folder) / "a.png", grey=i)
        classes_of_folders = {"2": 2, "caf\u00e9": 3, "cafz": 4, "cafa": 5}
        data = open_labelled_images(tmp_path / form, model, classes=classes_of_folders)
        pixels = np.concatenate(list(open_image_set(tmp_path / form).batches(slice(0, 7), 7)))
        results.append((data.classes, labels_of(data), data.fingerprint(), pixels.tobytes()))
        results[-1] += (
            open_image_set(tmp_path / form).content_hash(),
            open_image_set(tmp_path / form).fingerprint(),
        )
    assert results[0] == results[1]


def test_folders_without_images_are_not_classes(tmp_path, model, monkeypatch):
    for i in range(10):
        make_picture(tmp_path / f"class{i}" / "a.png")
    for name in ("annotations", "train/notes"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "list.txt").touch()
    data = open_labelled_images(tmp_path, model)
    assert labels_of(data) == list(range(10))
    assert data.notes()[-1].endswith(
        "names of their folders: " + ", ".join(f"{i} class{i}" for i in range(10))
    )
    with_classes = open_labelled_images(tmp_path, model, classes={f"class{i}": i for i in range(10)})
    assert not any("numbered" in note for note in with_classes.notes())


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(tmp_path, model, suffix):
    upright = Image.new("RGB", (48, 32))
    upright.paste((250, 250, 250), (0, 0, 24, 8))
    turns = Image.Transpose
    stored_as = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
        6: turns.ROTATE_90, 7: turns.TRANSVERSE, 8: turns.ROTATE_270,
    }  # fmt: skip
    (tmp_path / "2").mkdir()
    for value in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = value
        lying = upright.transpose(stored_as[value]) if value > 1 else upright
        lying.save(tmp_path / "2" / f"{value}.{suffix}", exif=exif, quality=95)
    images = open_image_set(tmp_path, resolution=32, upright=True)
    first, *others = next(images.batches(slice(0, 8), 8)).astype(int)
    assert all(np.abs(first - other).max() < 60 and np.abs(first - other).mean() < 2 for other in others)
    plain = open_image_set(tmp_path, resolution=32)
    lying = next(plain.batches(slice(0, 8), 8)).astype(int)
    if suffix == "tif":  # Pillow itself rotates TIFFs
        assert not any("EXIF" in note for note in plain.notes()) and (lying == lying[0]).all()
        return
    assert np.array_equal(lying[0], first) and all(np.abs(first - other).mean() > 9 for other in lying[1:])
    assert "7 of 8 checked images have an EXIF rotation" in plain.notes()[-1]
    assert plain.content_hash() != images.content_hash()
    for turned in (False, True):
        data = open_labelled_images(tmp_path, model, transform=TenCrops(16, 2), upright=turned)
        crops = [data.item(0, index) for index in (0, 5)]
        assert (np.abs(crops[0].numpy().astype(int) - crops[1].numpy()).mean() < 2) == turned
        assert "7 of 8" in data.notes()[-1] and data.exif_orientation == turned
    # Damaged EXIF data do not rotate the image.
    upright.save(tmp_path / "2" / f"9.{suffix}", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05broken")
    assert FileList(Folder(tmp_path), [f"2/9.{suffix}"], upright=True).image(0).size == (48, 32)
