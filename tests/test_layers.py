"""Imports point one way. The tests read them from the source code."""

import ast
from pathlib import Path

import pytest
from commands import ROOT

# Each layer may import itself and the layers in its row. The longest matching prefix decides the layer.
BASIS = ("models", "cca.random_streams", "cca.distributed", "cca.config", "cca.losses", "cca.progress")
LAYERS = {
    "models": (),
    "models.__main__": ("models", "cca.cli"),  # a command
    "cca.random_streams": (),
    "cca.progress": (),
    "cca.distributed": ("models",),
    "cca.config": ("models",),
    "cca.losses": (),
    "cca.cli": ("models", "cca.distributed", "cca.progress"),
    "cca.data": ("models", "cca.random_streams", "cca.distributed", "cca.progress"),
    "cca.sampling": BASIS,
    "cca.evaluation": (*BASIS, "cca.cli", "cca.data"),
    "cca.training": (*BASIS, "cca.cli", "cca.data", "cca.sampling"),
    "cca": ("models", "cca"),
}
COMMANDS = ("sample", "eval_fid", "train_var_cca", "train_llamagen_cca", "scripts", "benchmarks", "tests")
FILES = [path.relative_to(ROOT) for folder in ("models", "cca") for path in (ROOT / folder).rglob("*.py")]


def layer_of(module: str) -> str | None:
    """Return the layer of a module, or None if it belongs to none."""
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len, default=None)


def imported_names(tree: ast.AST) -> list[str]:
    """Return the full names of all modules and objects that a file imports."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports alone"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def violations(file: Path, source: str) -> list[str]:
    """Return the imports in ``source`` that ``file`` must not contain, as text."""
    own = layer_of(".".join(file.with_suffix("").parts))
    wrong = []
    for name in imported_names(ast.parse(source)):
        other = layer_of(name)
        commands = name.split(".")[0] in COMMANDS
        if commands or (other and other != own and other not in LAYERS[own] and "cca" not in LAYERS[own]):
            wrong.append(f"{file} imports {name}")
    return wrong


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_one_way(file):
    assert violations(file, (ROOT / file).read_text()) == []


def test_wrong_import_is_detected():
    for file, line in (
        ("models/base.py", "from cca.losses import cca_loss"),
        ("models/var.py", "import cca"),
        ("cca/data/codes.py", "from cca.training import trainer"),
        ("cca/sampling/sampler.py", "import sample"),
    ):
        assert violations(Path(file), line) != []


def test_only_models_checks_the_backbone():
    """No other code calls isinstance with a backbone or compares a value with its name."""
    names = {"VAR", "LlamaGen", "VARTransformer", "LlamaGenTransformer"}
    for path in (
        p
        for p in ROOT.rglob("*.py")
        if not {".venv", "tests", "models", "runs"} & set(p.relative_to(ROOT).parts)
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "isinstance"
            ):
                assert not names & {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}, path
            if isinstance(node, ast.Compare):
                compared = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                compared |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                assert not {"var", "llamagen", *names} & compared, f"{path}:{node.lineno}"
