"""Folders of images: what is read, what is left out, and pictures of every depth."""

import os

import numpy as np
import pytest
from made_data import make_picture
from PIL import Image

from cca.data.datasets import open_labelled_images
from cca.data.image_folders import find_images, read_image
from cca.data.image_sets import FolderOfImages
from models import load_model
from models.transforms import TenCrops
from models.utils.errors import UserError


@pytest.fixture(scope="module")
def model():
    return load_model("var-mini")


def labels_of(data):
    return data.labels(np.arange(len(data))).tolist()


def test_some_of_the_classes_train_as_themselves(tmp_path, model):
    for name in ("2/a", "5/a", "7/a", ".ipynb_checkpoints/a", "outside"):
        make_picture(tmp_path / f"{name}.png")
    data = open_labelled_images(tmp_path, model)
    assert labels_of(data) == [2, 5, 7] and data.classes == {"2": 2, "5": 5, "7": 7}
    assert data.notes() == [f"{tmp_path}: 1 images in no class folder are left out"]


def test_numbered_folders_in_the_order_of_their_names(tmp_path, model):
    """The image behind an index stays what it was, whatever class it has now."""
    for name in ("0", "1", "10", "9"):
        make_picture(tmp_path / "train" / name / "a.png")
    with pytest.raises(UserError, match="class 10 .* outside 0 … 9"):
        open_labelled_images(tmp_path, model)
    (tmp_path / "train" / "10").rename(tmp_path / "train" / "08")
    data = open_labelled_images(tmp_path, model)
    assert data.files == ["0/a.png", "08/a.png", "1/a.png", "9/a.png"] and labels_of(data) == [0, 8, 1, 9]


def test_one_list_of_suffixes_and_links_followed_once(tmp_path, model):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    suffixes = ("png", "JPG", "jpeg", "webp", "bmp", "tif", "tiff", "ppm", "pgm")
    for name in (*(f"0/a.{suffix}" for suffix in suffixes), "0/.hidden.png", "../elsewhere/b.png"):
        make_picture(data / name)
    for link, target in (("1", elsewhere), ("0/loop", data), ("0/self", "self"), ("0/gone.png", "none")):
        (data / link).symlink_to(target)
    (data / "0" / "list.txt").write_text("")
    os.mkfifo(data / "0" / "pipe.png")
    files, left_out = find_images(data)
    assert sorted(files) == sorted([*(f"0/a.{suffix}" for suffix in suffixes), "1/b.png"])
    assert left_out == f"{data}: left out, no image files: 4 (such as 0/gone.png)"
    assert len(FolderOfImages(data)) == len(open_labelled_images(data, model)) == 10
    assert left_out in FolderOfImages(data).notes() and left_out in open_labelled_images(data, model).notes()


def test_unreadable_images_are_replaced_by_others_of_their_class(tmp_path, model):
    for name in ("0/a", "1/a", "1/b", "1/c"):
        make_picture(tmp_path / f"{name}.png", grey=40 * len(name) + ord(name[-1]))
    (tmp_path / "1" / "c.png").write_bytes(b"no picture")
    data = open_labelled_images(tmp_path, model, transform=TenCrops(16, 2))
    for index, stands_in in ((0, 0), (1, 1), (3, 1)):
        pixels, replaced = data[0, index]
        assert replaced == (index != stands_in) and bool((pixels == data[0, stands_in][0]).all())
    assert data.unreadable == {3}
    for name in ("a", "b"):
        (tmp_path / "1" / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1/c.png and the 99 images after it cannot be read"):
        data.item(0, 3)


def test_grey_of_16_bits_is_scaled(tmp_path, model):
    levels = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    expected = np.rint(levels / 257).astype(np.uint8)
    for name in ("0/a.png", "1/a.tif", "2/a.pgm"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(levels).save(tmp_path / name)
    Image.fromarray(levels.astype(np.int32)).save(tmp_path / "0" / "b.tif")
    images = np.concatenate(list(FolderOfImages(tmp_path).batches(slice(0, 4), 2)))
    assert (images == expected[..., None]).all()
    crops = open_labelled_images(tmp_path, model, transform=TenCrops(16, 2)).item(0, 2)
    assert np.array_equal(crops[0, 0], expected[:16, :16])


@pytest.mark.parametrize(
    "pixels, message",
    [(np.zeros((4, 4), np.float32), "floating-point"), (np.full((4, 4), 70_000, np.int32), "65,535")],
)
def test_other_depths_are_refused(tmp_path, pixels, message):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=message):
        read_image(tmp_path / "a.tif")


def test_long_and_huge_pictures_are_refused(tmp_path, monkeypatch):
    make_picture(tmp_path / "a.png", size=(400_000, 1))
    with pytest.raises(UserError, match="400000 x 1 pixels: too long"):
        FolderOfImages(tmp_path, side=256)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="not a readable image"):
        read_image(tmp_path / "a.png")
