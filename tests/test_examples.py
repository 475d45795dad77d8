"""Scripts beside the package use what the package has."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_imports_is_there(script):
    """Inside functions, too, where only a run that takes minutes would tell."""
    beside = {path.stem: path for path in script.parent.glob("*.py")}
    missing = []
    for node in ast.walk(ast.parse(script.read_text("utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        wanted = [name.name for name in node.names]
        if node.module.partition(".")[0] == "cryorecon":
            found = importlib.import_module(node.module)
            missing += [name for name in wanted if not has(found, name)]
        elif node.module in beside:
            missing += sorted(set(wanted) - names_in(beside[node.module]))
    assert not missing


def has(module, name):
    if hasattr(module, name):
        return True
    try:
        importlib.import_module(f"{module.__name__}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def names_in(script):
    """What a script defines, or imports itself, at its top."""
    found = set()
    for node in ast.parse(script.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(name.asname or name.name).partition(".")[0] for name in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                found |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found
