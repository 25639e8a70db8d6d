"""The layers point one way: what may import what, read from the source."""

import ast
from pathlib import Path

import pytest
from commands import ROOT

# Each may import itself and what stands behind it; the longest prefix counts.
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
FILES = [path.relative_to(ROOT) for folder in ("models", "cca") for path in (ROOT / folder).rglob("*.py")]


def layer_of(module: str) -> str | None:
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len, default=None)


def imported(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports alone"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def violations(file: Path, source: str) -> list[str]:
    own = layer_of(".".join(file.with_suffix("").parts))
    wrong = []
    for name in imported(ast.parse(source)):
        other = layer_of(name)
        commands = name.split(".")[0] in ("sample", "eval_fid", "scripts", "benchmarks", "tests")
        if commands or (other and other != own and other not in LAYERS[own] and "cca" not in LAYERS[own]):
            wrong.append(f"{file} imports {name}")
    return wrong


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_one_way(file):
    assert violations(file, (ROOT / file).read_text()) == []


def test_a_wrong_import_is_seen():
    for file, line in (
        ("models/base.py", "from cca.losses import cca_loss"),
        ("models/var.py", "import cca"),
        ("cca/data/codes.py", "from cca.training import trainer"),
        ("cca/sampling/sampler.py", "import sample"),
    ):
        assert violations(Path(file), line) != []


def test_backbones_are_not_asked_for_by_name_outside_models():
    """No isinstance of a backbone, and no comparison with its name."""
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
