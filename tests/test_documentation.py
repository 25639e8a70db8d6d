"""README and docs: every command parses, every Python block runs, every link leads somewhere."""

import importlib
import itertools
import re
import shlex
import tempfile

import pytest
from commands import ROOT

from scripts import reproduce

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
COMMANDS = re.compile(r"^(?:torchrun [^|]*?|python )(-m [a-z_.]+|[a-z_]+\.py)( .*)?$")


def module_and_options(line):
    """Of a command as it is shown."""
    name, options = COMMANDS.match(line).groups(default="")
    return importlib.import_module(name.removeprefix("-m ").removesuffix(".py")), shlex.split(options)


def command_lines(page):
    """Of the page's shell blocks, continued lines joined, comments gone."""
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.partition("  #")[0].strip()


LINES = [(page, line) for page in PAGES for line in command_lines(page) if not line.startswith("#")]


@pytest.mark.parametrize("page, line", [pair for pair in LINES if COMMANDS.match(pair[1])])
def test_commands_are_parsed(page, line):
    """By the parsers of the commands themselves."""
    module, options = module_and_options(line)
    module.make_parser().parse_args(options)


@pytest.mark.parametrize("page, line", [pair for pair in LINES if not COMMANDS.match(pair[1])])
def test_other_lines_name_what_is_there(page, line):
    """Scripts that exist; what else is shown is the shell's own."""
    words = itertools.dropwhile(re.compile("[A-Z_]+=").match, shlex.split(line.replace(">", " ")))
    first, *rest = words
    assert first in ("bash", "sbatch", "source", "echo", "pip", "hf"), line
    if first in ("bash", "sbatch"):
        script = (ROOT / next(word for word in rest if word.startswith("scripts/"))).read_text()
        if experiment := re.search(r"scripts\.reproduce ([a-z-]+)", script):
            reproduce.make_parser().parse_args([experiment[1], *rest[1:]])


def python_blocks():
    """Of all pages, but scripts that take arguments (docs/data.md), which have a test of their own."""
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            if "sys.argv" not in block:
                yield pytest.param(block, id=page)


@pytest.mark.parametrize("block", list(python_blocks()))
def test_python_blocks_run(block, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    exec(compile(block, "block", "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), target
