"""The parser: ranges of numbers, exact integers, options without a value, and ``~`` in paths."""

import argparse

import pytest

from cca.cli.parser import Parser, count, number
from models.utils.errors import UserError


def test_range():
    assert number(0)("1e300") == 1e300 and number(0, 1)("1") == 1 and number(0, above=True)("1e-300") > 0
    for parse, text, message in (
        (number(0, above=True), "0", "0 must be above 0$"),
        (number(0, 1), "1.5", "must be at least 0 and at most 1$"),
        (number(0), "inf", "must be at least 0 and finite"),
        (number(0), "-inf", "-inf must be "),
        (number(0, 1), "nan", "nan must be "),
        (number(1e-6), "1e999", "1e999 must be "),
        (number(0, above=True), "Infinity", "Infinity must be "),
        (number(0), "1e", "'1e' is not a number"),
        (count(), "1.5", "'1.5' is not an integer"),
        (count(), "0", "0 must be at least 1$"),
        (count(0), str(2**63), "must be at least 0 and at most 9223372036854775807"),
        (count(0), "9" * 5000, "is not an integer"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            parse(text)


def test_seeds_are_exact():
    assert [count(0)(str(seed)) for seed in (0, 2**53 + 1, 2**63 - 1)] == [0, 2**53 + 1, 2**63 - 1]


@pytest.mark.parametrize("arguments", [["--seed=--"], ["--seed", "--"], ["--seed"], ["--seed=", "1"]])
def test_option_without_a_value(arguments):
    parser = Parser("made", "made")
    parser.add_argument("--seed", type=count(0))
    with pytest.raises(UserError, match="--seed: (expected one argument|'' is not an integer)"):
        parser.parse_args(arguments)


def test_tilde_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser("made", "made")
    parser.add_argument("--output")
    assert parser.parse_args(["--output=~/runs/x"]).output == "/home/me/runs/x"
    args = parser.parse_args(["--output", "a=~/x"])
    assert args.output == "a=~/x" and args.command == "made.py --output 'a=~/x'"
