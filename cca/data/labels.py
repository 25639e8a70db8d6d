"""Labels: the class of each class folder, and checks of label arrays."""

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cca.data.archives import Archive
from cca.data.image_folders import Folder, normalised_name
from models import UserError
from models.utils.errors import printable
from models.utils.files import parse_json, reason, require_regular_file
from models.zoo.hub import ASSETS
from models.zoo.registry import class_name

WORDNET_IDS = ASSETS / "imagenet1k-wordnet-ids.txt"
WHOLE_NUMBER = re.compile("-?[0-9]{1,18}")
LISTED = "dataset.json"
HINT = "give the class of each folder with --classes-from FILE.json"


def add_classes_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--classes-from",
        type=Path,
        metavar="FILE.json",
        help='class number of each class folder, such as {"cat": 281, "dog": 207} (default: from the '
        "folders' names: numbers, WordNet ids, or any names in sorted order if there is one per class)",
    )


def read_classes(path: Path | None) -> dict[str, int] | None:
    """Return the class of each folder from ``--classes-from``; None without a path. Raise UserError."""
    if path is None:
        return None

    try:
        pairs = parse_json(require_regular_file(path).read_text(encoding="utf-8"), object_pairs_hook=tuple)
    except FileNotFoundError:
        raise UserError(f"--classes-from: {path}: no such file") from None
    except (OSError, ValueError):
        raise UserError(f"--classes-from: {path} is not a readable JSON file") from None
    if not isinstance(pairs, tuple) or not pairs or not all(type(label) is int for _, label in pairs):
        raise UserError(
            f'--classes-from: {path} does not map folders to classes; expected for example {{"cat": 281}}'
        )
    classes = [(normalised_name(name), label) for name, label in pairs]
    name, times = Counter(name for name, _ in classes).most_common(1)[0]
    if times > 1:
        raise UserError(f"--classes-from: {path} names {name!r} twice")
    return dict(classes)


def read_listed_classes(folder: Folder | Archive) -> dict[str, int]:
    """Return the class of each image from ``dataset.json``; empty without that file.

    The tools of EDM and StyleGAN write it, with folders that are not classes. Raise UserError for a list that
    does not give one class to each image.
    """
    if not folder.is_file(LISTED):
        return {}
    path = folder.root / LISTED
    try:
        with folder.open(LISTED) as file:
            content = parse_json(file.read())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not readable JSON ({reason(error)})") from None
    if not isinstance(content, dict) or "labels" not in content:
        return {}  # another program wrote it
    labels = content["labels"]
    try:
        listed = {normalised_name(name): label for name, label in labels or ()}
    except (TypeError, ValueError):
        listed = {}
    if not listed or len(listed) < len(labels) or not all(type(label) is int for label in listed.values()):
        raise UserError(
            f"{path}: does not list one class for each image; list them as [[file, class], …], or remove "
            "that file if the folders are the classes"
        )
    return listed


def wordnet_classes(num_classes: int | None) -> dict[str, int]:
    """Return the class of each WordNet id of ImageNet-1k; empty unless ``num_classes`` is 1,000."""
    names = WORDNET_IDS.read_text().split()
    return {name: number for number, name in enumerate(names)} if num_classes == len(names) else {}


def class_folder(file: str) -> str:
    """Return the first folder of an image's path below the root, NFC-normalised."""
    return normalised_name(file.split("/")[0])


def number_classes(
    folder: Path, names: Iterable[str], num_classes: int | None, user_classes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the class of each class folder.

    Without ``user_classes``, a name that is an integer is the class. With 1,000 classes, WordNet ids of
    ImageNet-1k are looked up. Other names are numbered in sorted order if there are ``num_classes`` of them.

    Args:
        folder: the folder of the class folders, for messages.
        names: names of the class folders (see ``class_folder``), with or without repetitions.
        num_classes: number of classes of the model; if None, ``user_classes`` is needed.
        user_classes: the user's class of each folder; it may name other folders too.

    Raises:
        UserError: a class is outside 0 … num_classes - 1, or a folder has no class by these rules.
    """
    names, wordnet = sorted(set(names)), wordnet_classes(num_classes)
    if user_classes is not None:
        if missing := [name for name in names if name not in user_classes]:
            raise UserError(f"--classes-from: does not name {_first_names(missing)} of {folder}")
        numbers = {name: user_classes[name] for name in names}
    elif num_classes is None:
        raise UserError(
            f"{folder}: the model of these images, and so its number of classes, is unknown; {HINT}"
        )
    elif all(WHOLE_NUMBER.fullmatch(name) for name in names):
        numbers = {name: int(name) for name in names}
    elif all(name in wordnet for name in names):
        numbers = {name: wordnet[name] for name in names}
    elif len(names) == num_classes and not any(WHOLE_NUMBER.fullmatch(n) or n in wordnet for n in names):
        numbers = {name: number for number, name in enumerate(names)}
    else:
        rules = f"numbers 0 … {num_classes - 1}" + (", WordNet ids" if wordnet else "")
        raise UserError(
            f"{folder}: the {len(names)} class folders ({_first_names(names)}) are neither {rules} "
            f"nor {num_classes} other names; {HINT}"
        )
    limits = f"0 … {num_classes - 1}" if num_classes else "0, 1, …"
    for name, number in numbers.items():
        if not 0 <= number < (num_classes or math.inf):
            text = f"class {number} of the folder {_first_names([name])} of {folder} is outside {limits}"
            raise UserError(f"--classes-from: {text}" if user_classes else f"{text}; {HINT}")
    return numbers


def numbering_notes(
    classes: Mapping[str, int] | None, num_classes: int | None, user_classes: Mapping[str, int] | None
) -> list[str]:
    """Return a note if the class folders are numbered by the sorted order of their names."""
    wordnet = wordnet_classes(num_classes)
    if user_classes is not None or not classes:
        return []
    if any(WHOLE_NUMBER.fullmatch(name) or name in wordnet for name in classes):
        return []
    numbers = ", ".join(f"{number} {name}" for name, number in classes.items())
    return [printable(f"classes are numbered by the sorted names of their folders: {numbers}")]


def class_folders(record: object) -> dict[str, int] | None:
    """Return the class of each class folder from ``classes`` of a JSON record; None if it has none."""
    classes = record.get("classes") if isinstance(record, dict) else None
    fits = isinstance(classes, dict) and all(type(label) is int for label in classes.values())
    return classes if fits else None


def class_names(record: object, num_classes: int) -> list[str]:
    """Return the name of each class, [num_classes].

    A class has the names of its class folders in the record (see ``class_folders``), except integers and
    WordNet ids. Without such a folder it has its default name.
    """
    wordnet = wordnet_classes(num_classes)
    own: dict[int, list[str]] = {}
    for name, label in sorted((class_folders(record) or {}).items()):
        if not WHOLE_NUMBER.fullmatch(name) and name not in wordnet:
            own.setdefault(label, []).append(name)
    return [
        ", ".join(own[label]) if label in own else class_name(label, num_classes)
        for label in range(num_classes)
    ]


def whole_numbers(labels: np.ndarray, path: str | Path) -> np.ndarray:
    """Return labels [N] as int64. Raise UserError for another shape, or for values that are not integers."""
    if labels.ndim != 1:
        hint = "; take argmax(1) of one-hot labels" if labels.ndim == 2 and labels.shape[1] > 1 else ""
        raise UserError(f"{path}: labels have shape {list(labels.shape)}; expected classes [N]{hint}")
    whole = labels.dtype.kind in "iu" or (
        labels.dtype.kind == "f"
        and bool((np.abs(labels) < 2**31).all() and (labels == np.rint(labels)).all())
    )
    if not whole:
        raise UserError(f"{path}: labels are {labels.dtype}; expected integers")
    return np.ascontiguousarray(labels, np.int64)


def check_labels(labels: np.ndarray, num_classes: int, path: str | Path) -> Tensor:
    """Return labels [N] as int64. Raise UserError for another shape or dtype, or a class out of range."""
    values = whole_numbers(labels, path)
    if len(values) == 0 or not 0 <= int(values.min()) <= int(values.max()) < num_classes:
        raise UserError(f"{path}: labels must be in 0 … {num_classes - 1}")
    return torch.from_numpy(values)


def _first_names(names: Sequence[str]) -> str:
    return printable(", ".join(names[:3])) + (", …" if len(names) > 3 else "")
