"""Labels: which class a class folder is, by one set of rules for all that read such; what labels may be."""

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
HINT = "--classes-from FILE.json says which class each folder is"


def add_classes_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--classes-from",
        type=Path,
        metavar="FILE.json",
        help='class number of each class folder, such as {"cat": 281, "dog": 207} (default: from the '
        "folders' names: numbers, WordNet ids, or any names in sorted order if there is one per class)",
    )


def read_classes(path: Path | None) -> dict[str, int] | None:
    """The mapping of ``--classes-from``, folder -> class; None without a path. Raises UserError."""
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
            f'--classes-from: {path} is not an object of folder and class, such as {{"cat": 281}}'
        )
    classes = [(normalised_name(name), label) for name, label in pairs]
    name, times = Counter(name for name, _ in classes).most_common(1)[0]
    if times > 1:
        raise UserError(f"--classes-from: {path} names {name!r} twice")
    return dict(classes)


def read_listed_classes(folder: Folder | Archive) -> dict[str, int]:
    """Return the class of each image as ``dataset.json`` lists them; empty without such a file.

    EDM's and StyleGAN's tools write it, beside folders that are no classes. Raises UserError for a list that
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
        return {}  # of another program
    labels = content["labels"]
    try:
        listed = {normalised_name(name): label for name, label in labels or ()}
    except (TypeError, ValueError):
        listed = {}
    if not listed or len(listed) < len(labels) or not all(type(label) is int for label in listed.values()):
        raise UserError(
            f"{path}: does not list one class of each image; list them as [[file, class], …], or remove that "
            "file if the folders are the classes"
        )
    return listed


def wordnet_classes(num_classes: int | None) -> dict[str, int]:
    """WordNet id -> class, where the classes are as many as ImageNet-1k's; empty where they are not."""
    names = WORDNET_IDS.read_text().split()
    return {name: number for number, name in enumerate(names)} if num_classes == len(names) else {}


def class_folder(file: str) -> str:
    """The class folder that an image's path below its root begins with, in one spelling."""
    return normalised_name(file.split("/")[0])


def number_classes(
    folder: Path, names: Iterable[str], num_classes: int | None, given: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The class of each class folder.

    Without ``given``: names that are whole numbers are the class; of 1,000 classes, WordNet ids of
    ImageNet-1k are looked up; other names are numbered in sorted order if there are ``num_classes``.

    Args:
        folder: where the class folders lie, for messages.
        names: of the class folders in one spelling (see ``class_folder``), each once or more often.
        num_classes: of the model; None where it is not known: then ``given`` is needed.
        given: the user's own mapping, which may name other folders too.

    Raises:
        UserError: a class outside 0 … num_classes - 1, or folders of which these rules do not tell it.
    """
    names, known = sorted(set(names)), wordnet_classes(num_classes)
    if given is not None:
        if missing := [name for name in names if name not in given]:
            raise UserError(f"--classes-from: does not name {_some(missing)} of {folder}")
        numbers = {name: given[name] for name in names}
    elif num_classes is None:
        raise UserError(f"{folder}: of how many classes these are is not known; {HINT}")
    elif all(WHOLE_NUMBER.fullmatch(name) for name in names):
        numbers = {name: int(name) for name in names}
    elif all(name in known for name in names):
        numbers = {name: known[name] for name in names}
    elif len(names) == num_classes and not any(WHOLE_NUMBER.fullmatch(n) or n in known for n in names):
        numbers = {name: number for number, name in enumerate(names)}
    else:
        rules = f"numbers 0 … {num_classes - 1}" + (", WordNet ids" if known else "")
        raise UserError(
            f"{folder}: the {len(names)} class folders ({_some(names)}) are neither {rules} "
            f"nor {num_classes} other names; {HINT}"
        )
    limits = f"0 … {num_classes - 1}" if num_classes else "0, 1, …"
    for name, number in numbers.items():
        if not 0 <= number < (num_classes or math.inf):
            text = f"class {number} of the folder {_some([name])} of {folder} is outside {limits}"
            raise UserError(f"--classes-from: {text}" if given else f"{text}; {HINT}")
    return numbers


def numbering_notes(
    classes: Mapping[str, int] | None, num_classes: int | None, given: Mapping[str, int] | None
) -> list[str]:
    """What to tell of classes that are the place of a folder's name in their sorted order."""
    known = wordnet_classes(num_classes)
    if given is not None or not classes or any(WHOLE_NUMBER.fullmatch(n) or n in known for n in classes):
        return []
    numbers = ", ".join(f"{number} {name}" for name, number in classes.items())
    return [printable(f"classes are numbered in the order of their folders' names: {numbers}")]


def class_folders(noted: object) -> dict[str, int] | None:
    """The class of each class folder that a file keeps under ``classes``; None where it keeps no such."""
    classes = noted.get("classes") if isinstance(noted, dict) else None
    fits = isinstance(classes, dict) and all(type(label) is int for label in classes.values())
    return classes if fits else None


def class_names(noted: object, num_classes: int) -> list[str]:
    """Return the name of each class, [num_classes].

    Class folders that a file notes (see ``class_folders``) name theirs, several of one class together, unless
    their names are numbers or, of 1,000 classes, WordNet ids of ImageNet-1k.
    """
    known = wordnet_classes(num_classes)
    own: dict[int, list[str]] = {}
    for name, label in sorted((class_folders(noted) or {}).items()):
        if not WHOLE_NUMBER.fullmatch(name) and name not in known:
            own.setdefault(label, []).append(name)
    return [", ".join(own.get(label, [class_name(label, num_classes)])) for label in range(num_classes)]


def whole_numbers(labels: np.ndarray, path: str | Path) -> np.ndarray:
    """Labels [N] as int64. Raises UserError for another shape, or for what are no whole numbers."""
    if labels.ndim != 1:
        hint = "; take argmax(1) of one-hot labels" if labels.ndim == 2 and labels.shape[1] > 1 else ""
        raise UserError(f"{path}: labels are {list(labels.shape)}; expected classes [N]{hint}")
    whole = labels.dtype.kind in "iu" or (
        labels.dtype.kind == "f"
        and bool((np.abs(labels) < 2**31).all() and (labels == np.rint(labels)).all())
    )
    if not whole:
        raise UserError(f"{path}: labels are {labels.dtype}; expected whole numbers")
    return np.ascontiguousarray(labels, np.int64)


def check_labels(labels: np.ndarray, num_classes: int, path: str | Path) -> Tensor:
    """Return labels [N] as int64. Raises UserError for another shape or kind, and for other classes."""
    values = whole_numbers(labels, path)
    if len(values) == 0 or not 0 <= int(values.min()) <= int(values.max()) < num_classes:
        raise UserError(f"{path}: labels must lie in 0 … {num_classes - 1}")
    return torch.from_numpy(values)


def _some(names: Sequence[str]) -> str:
    return printable(", ".join(names[:3])) + (", …" if len(names) > 3 else "")
