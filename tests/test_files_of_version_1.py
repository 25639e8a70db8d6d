"""Files that version 1.0.0 wrote keep working: they are resumed, recognised as finished, and read.

``PYTHONPATH=.:tests python tests/test_files_of_version_1.py FOLDER`` wrote them. Do not run it again: later
versions must read the files in ``fixtures/version-1.0.0`` and ``fixtures/specimens/codes``.
"""

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from commands import metrics
from specimens import SPECIMENS, extract, register, weights

import eval_fid
import sample
import train_var_cca
from cca.training.trainer import Trainer

WRITTEN = Path(__file__).parent / "fixtures" / "version-1.0.0"
TRAIN = [*weights("var"), "--data", "few.npz", "--output", "run", "--max-steps", "4", "--save-every", "2"]
SAMPLE = [*weights("var"), "--num-samples", "12", "--seed", "1", "--output", "samples.npz"]
EVALUATE = ["--samples", "samples.npz", "--reference", "images.npz", "--features", "mini"]
EVALUATE += ["--metrics", "fid", "--output", "results.json"]


def write_outputs() -> None:
    """Write one output of each kind into the current folder. Training stops after two of four steps."""
    step = Trainer.optimizer_step

    def stopping_step(trainer, done, batch):
        if done == 2:
            raise KeyboardInterrupt
        return step(trainer, done, batch)

    with mock.patch.object(Trainer, "optimizer_step", stopping_step), pytest.raises(KeyboardInterrupt):
        train_var_cca.main(TRAIN)
    shutil.rmtree("run/tensorboard")
    extract("codes", "few.npz")
    sample.main(SAMPLE)
    eval_fid.main(EVALUATE)


@pytest.fixture
def written(disk):
    shutil.copytree(WRITTEN, disk, dirs_exist_ok=True)
    return disk


@pytest.mark.parametrize("name", ["run/config.json", "codes/header.json", "samples.json", "results.json"])
def test_files_record_version(written, name):
    content = json.loads(Path(name).read_text())
    assert content["format"] == 1 and content["version"] == "1.0.0" and content["kind"]


def test_training_resumes(written):
    before = metrics(Path("run"))
    train_var_cca.main(TRAIN)
    assert len(before) == 2 and metrics(Path("run"))[:2] == before
    assert len(metrics(Path("run"))) == 4 and Path("run/model.pth").exists()


def test_finished_outputs_are_kept(written, capsys):
    names = ("codes/codes.npy", "samples.npz", "results.json")
    before = [Path(name).read_bytes() for name in names]
    extract("codes", "few.npz")
    sample.main(SAMPLE)
    eval_fid.main(EVALUATE)
    assert capsys.readouterr().out.count("is finished already") == 3
    assert [Path(name).read_bytes() for name in names] == before
    eval_fid.main(["--compare", "results.json"])
    assert "specimen-var" in capsys.readouterr().out
    with np.load("samples.npz") as file:
        assert file["arr_0"].shape == (12, 8, 8, 3) and file["arr_1"].dtype == np.int64


if __name__ == "__main__":
    import os

    place = Path(sys.argv[1]).absolute()
    shutil.copytree(SPECIMENS, place)
    os.chdir(place)
    shutil.rmtree("codes")
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        write_outputs()
    for file in SPECIMENS.iterdir():
        if file.is_file():
            (place / file.name).unlink()
