"""What ``sample.py`` says of its samples, read by those who take them."""

import os
from pathlib import Path
from typing import NoReturn

from models.files import parse_json


def report_path(samples: Path) -> Path:
    """Where ``sample.py`` describes an .npz of samples, or the folder that it was unpacked to."""
    path = Path(os.path.abspath(samples))
    return path.with_name(f"{path.name.removesuffix('.npz')}.json")


def read_sampling_report(path: Path) -> dict:
    """The JSON that ``sample.py`` wrote beside samples (an .npz or what was unpacked of it); else empty."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)  # NaN and infinity, which are no JSON

    try:
        content = parse_json(report_path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError):
        return {}
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict) or not isinstance(options.get("model", ""), str):
        return {}
    scale = options.get("cfg_scale", 1.0)
    return content if isinstance(scale, (int, float)) and not isinstance(scale, bool) else {}
