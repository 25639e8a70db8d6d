"""mu and sigma of a reference file: valid statistics are read, invalid ones are refused."""

import numpy as np
import pytest

from cca.data.image_sets import NpzImages
from models.utils.errors import UserError

RANDOM = np.random.default_rng(0)
MU, ROWS = RANDOM.normal(size=6), RANDOM.normal(size=(40, 6))
SIGMA = np.cov(ROWS, rowvar=False)


def with_value(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    "mu, sigma, message",
    [
        (with_value(MU, 2, np.nan), SIGMA, "mu holds values that are not finite"),
        (MU, with_value(SIGMA, (1, 1), np.inf), "sigma holds values that are not finite"),
        (with_value(MU, 1, -1e200), SIGMA, r"mu holds 1e\+200; expected at most 1e\+100"),
        (MU, 1e300 * np.eye(6), r"sigma holds 1e\+300; expected at most 1e\+100"),
        (MU, with_value(SIGMA, (0, 5), 3.0), "sigma is not symmetric"),
        (MU, np.triu(SIGMA), "not symmetric"),
        (MU, with_value(SIGMA, (3, 3), -1.0), "negative variances"),
        (MU, SIGMA.astype(complex), "sigma is complex128"),
        (MU.astype(str), SIGMA, "mu is <U.*; expected a mean"),
        (MU[None], SIGMA, r"mu is float64 \[1, 6\]"),
        (MU, SIGMA[:3], r"sigma is float64 \[3, 6\]"),
        (MU, SIGMA[:5, :5], "expected a mean"),
        (np.zeros(0), np.zeros((0, 0)), "expected a mean"),
    ],
)
def test_invalid_statistics_are_refused(tmp_path, mu, sigma, message):
    np.savez(tmp_path / "r.npz", mu=mu, sigma=sigma)
    with pytest.raises(UserError, match=f"r.npz: {message}|r.npz: .*{message}"):
        _ = NpzImages(tmp_path / "r.npz").statistics


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_statistics_are_read(tmp_path, dtype):
    centred = (ROWS - ROWS.mean(0)).astype(dtype)
    np.savez(tmp_path / "r.npz", mu=MU.astype(dtype), sigma=(centred.T @ centred) / dtype(39))
    found = NpzImages(tmp_path / "r.npz").statistics
    assert found["sigma"].dtype == np.float64 and np.allclose(found["sigma"], SIGMA, atol=1e-5)
