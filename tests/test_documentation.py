"""README and docs: every command parses, every Python block runs, every relative link leads to a file."""

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
    """Return the module and the options of a command line."""
    name, options = COMMANDS.match(line).groups(default="")
    return importlib.import_module(name.removeprefix("-m ").removesuffix(".py")), shlex.split(options)


def command_lines(page):
    """Yield the lines of a page's shell blocks, with continued lines joined and comments removed."""
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.partition("  #")[0].strip()


LINES = [(page, line) for page in PAGES for line in command_lines(page) if not line.startswith("#")]


@pytest.mark.parametrize("page, line", [pair for pair in LINES if COMMANDS.match(pair[1])])
def test_commands_parse(page, line):
    module, options = module_and_options(line)
    module.make_parser().parse_args(options)


@pytest.mark.parametrize("page, line", [pair for pair in LINES if not COMMANDS.match(pair[1])])
def test_other_lines_name_existing_scripts(page, line):
    """Lines that are no Python command call a script that exists, or a common shell command."""
    words = itertools.dropwhile(re.compile("[A-Z_]+=").match, shlex.split(line.replace(">", " ")))
    first, *rest = words
    assert first in ("bash", "sbatch", "source", "echo", "pip", "hf"), line
    if first in ("bash", "sbatch"):
        script = (ROOT / next(word for word in rest if word.startswith("scripts/"))).read_text()
        if experiment := re.search(r"scripts\.reproduce ([a-z-]+)", script):
            reproduce.make_parser().parse_args([experiment[1], *rest[1:]])


def python_blocks():
    """Yield the Python blocks of all pages, except the script in docs/data.md, which takes arguments."""
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
def test_relative_links_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), target
