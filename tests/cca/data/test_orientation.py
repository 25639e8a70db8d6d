"""``--exif-orientation``: each command that reads images from folders applies and records it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

import eval_fid
from models import UserError
from scripts import extract_codes, make_reference, reconstruct


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """Write the same 12 images to two folders; ``lying`` stores two of them rotated, with EXIF data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        for name in ("upright", "lying"):
            Path(name, str(i % 10)).mkdir(parents=True, exist_ok=True)
            image, path = Image.fromarray(pixels), f"{name}/{i % 10}/{i:02d}.png"
            if name == "lying" and i < 2:
                image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
            else:
                image.save(path)


def codes(folder):
    return np.load(folder / "codes" / "codes.npy").tolist()


def pixels(folder):
    with np.load(folder / "out.npz") as file:
        return {name: file[name].tolist() for name in file.files}


def fid(folder):
    return round(json.loads((folder / "out.json").read_text())["metrics"]["fid"], 3)


COMMANDS = [
    (extract_codes, ["--model", "llamagen-mini", "--data"], "codes", "codes/header.json", codes),
    (reconstruct, ["--model", "var-mini", "--images"], "out.npz", "out.json", pixels),
    (make_reference, ["--features", "mini", "--images"], "out.npz", "out.json", pixels),
    (eval_fid, ["--features", "mini", "--reference", "upright", "--samples"], "out.json", "out.json", fid),
]


@pytest.mark.parametrize("command, arguments, output, record, result", COMMANDS)
def test_exif_orientation_of_each_command(photographs, capsys, command, arguments, output, record, result):
    """A command rotates the images, records the option, and refuses another value for the same output."""
    results = []
    for place, images, options in (
        ("first", "upright", []),
        ("as-they-lie", "lying", []),
        ("turned", "lying", ["--exif-orientation"]),
    ):
        line = [*arguments, images, "--output", f"{place}/{output}"]
        command.main([*line, *options])
        messages = "".join(capsys.readouterr())
        assert ("2 of 12 checked images have an EXIF rotation" in messages) == (images == "lying")
        content = json.loads(Path(place, record).read_text())
        assert content.get("options", content)["exif_orientation"] == bool(options)
        results.append(result(Path(place)))
    assert results[0] == results[2] != results[1]
    with pytest.raises(UserError, match="exif_orientation True instead of False"):
        command.main(line)
    np.savez("images.npz", arr_0=np.zeros((12, 32, 32, 3), np.uint8), arr_1=np.arange(12) % 10)
    arguments = ["images.npz" if text == "upright" else text for text in arguments]
    with pytest.raises(UserError, match="--exif-orientation: applies to folders"):
        command.main([*arguments, "images.npz", "--output", "other.npz", "--exif-orientation"])
