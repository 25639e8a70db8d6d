"""``python -m benchmarks.sampling`` on the mini models, so that it does not rot."""

import pytest

from benchmarks import sampling


@pytest.mark.parametrize("name", ["llamagen-mini", "var-mini"])
def test_both_ways_draw_the_same_tokens(name, capsys):
    sampling.main(["--model", name, "--batch-size", "4", "--rounds", "1"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "guid" in line]
    assert {way: share for way, *_, share in lines[:4]} == {
        f"{whose}, {how}": "0.00%" for whose in ("plain", "ours") for how in ("no guidance", "guided")
    }
