"""What ``sample.py`` says of its samples, read by those who take them."""

import os
from pathlib import Path
from typing import NoReturn

from models.utils.files import parse_json


def report_path(samples: Path) -> Path:
    """Where ``sample.py`` describes an .npz of samples, or the folder that it was unpacked to."""
    path = Path(os.path.abspath(samples))
    return path.with_name(f"{path.name.removesuffix('.npz')}.json")


def read_sampling_options(samples: Path) -> dict:
    """The options that samples were made with, as ``sample.py`` wrote them beside an .npz (or what was
    unpacked of it); empty where there is no such file, or another JSON."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)  # NaN and infinity, which are no JSON

    try:
        content = parse_json(report_path(samples).read_text(encoding="utf-8"), parse_constant=refuse)
        options = content["options"]
        ours = content["format"] == 1 and "num_samples" in options
        fits = isinstance(options.get("model", ""), str) and type(options.get("cfg_scale", 1)) in (int, float)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return options if ours and fits else {}
