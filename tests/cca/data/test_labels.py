"""The class of each class folder."""

import json
from pathlib import Path

import pytest

from cca.data.labels import number_classes, read_classes
from models.utils.errors import UserError

DATA = Path("data")


def test_numbers_are_the_classes():
    assert number_classes(DATA, ["7", "2", "5"], 10) == {"2": 2, "5": 5, "7": 7}
    assert number_classes(DATA, ["0", "10", "9"], 11) == {"0": 0, "9": 9, "10": 10}
    padded = [f"{i:04d}" for i in range(1000)]
    assert number_classes(DATA, padded, 1000) == {name: i for i, name in enumerate(padded)}


@pytest.mark.parametrize("name", ["10", "-1", "9" * 18])
def test_number_out_of_range_is_refused(name):
    with pytest.raises(UserError, match="outside 0 … 9; .*--classes-from"):
        number_classes(DATA, ["1", name], 10)


def test_wordnet_ids_are_looked_up():
    found = number_classes(DATA, ["n01440764", "n15075141", "n01443537"], 1000)
    assert found == {"n01440764": 0, "n01443537": 1, "n15075141": 999}
    # WordNet ids need a model with the 1,000 classes of ImageNet-1k.
    with pytest.raises(UserError, match="--classes-from"):
        number_classes(DATA, ["n01440764", "n15075141"], 10)


def test_other_names_are_numbered():
    """Names are numbered in sorted order if there is one name per class."""
    assert number_classes(DATA, ["cat", "ant", "bee"], 3) == {"ant": 0, "bee": 1, "cat": 2}
    mixed = (["cat", "ant"], ["cat", "ant", "bee", "dog"], ["cat", "1", "bee"])
    for names in mixed:
        with pytest.raises(UserError, match="--classes-from") as caught:
            number_classes(DATA, names, 3)
        assert len(str(caught.value).splitlines()) == 1
    thousand = ["n01440764", *(f"x{i}" for i in range(999))]
    with pytest.raises(UserError, match="WordNet"):
        number_classes(DATA, thousand, 1000)


def test_classes_from_file(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"cat": 7, "kitten": 7, "dog": 2}))
    classes = read_classes(path)
    assert number_classes(DATA, ["kitten", "cat"], 10, classes) == {"cat": 7, "kitten": 7}
    with pytest.raises(UserError, match="does not name bird"):
        number_classes(DATA, ["bird", "cat"], 10, classes)
    with pytest.raises(UserError, match="class 7 of the folder cat .* outside 0 … 4"):
        number_classes(DATA, ["cat"], 5, classes)


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "{}", '{"a": "1"}', '{"a": 1.5}', '{"a": true}', '{"a": 1, "a": 2}', "[" * 100_000, "\xff"],
)
def test_invalid_mapping_is_refused(tmp_path, content):
    (tmp_path / "classes.json").write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match="--classes-from: "):
        read_classes(tmp_path / "classes.json")
