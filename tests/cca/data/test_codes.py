"""Codes as the trainer reads them."""

import shutil

import numpy as np
from made_data import make_codes

from cca.data.codes import Codes
from models import load_model


def test_sister_folder_is_drawn_half_of_the_time(tmp_path):
    path = make_codes(tmp_path)
    shutil.copytree(path, tmp_path / "codes_105")
    shifted = np.load(path / "codes.npy") % 256
    np.save(path / "codes.npy", shifted)
    np.save(tmp_path / "codes_105" / "codes.npy", shifted + 256)
    source = Codes(path, load_model("llamagen-mini"))
    sister = [bool(source[epoch, index][0][0] >= 256) for epoch in range(10) for index in range(40)]
    assert 160 < sum(sister) < 240
