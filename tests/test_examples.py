"""Scripts beside the package use what the package has."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import simulated

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


@pytest.fixture(scope="module")
def small_stack(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("scripts") / "stack", 1200, 32, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["limits.py", "STACK", "--diameter", "61"], '"true_map_pose_error_deg"'),
        (["parts.py", "STACK", "--diameter", "61"], "| map from its equations |"),
        (["amortized_parts.py", "STACK"], "poses are read at"),
        (["scaling.py", "--boxes", "16", "20", "--counts", "250"], "power of the box"),
        (["reading.py", "OUT", "--images", "2000"], "| moments |"),
        (["score.py", "STACK", "true=STACK/map.mrc,STACK/particles.star"], "| true | "),
        (["memory.py", "OUT", "--counts", "2000", "--averaged", "500"], "| moments | 2000 |"),
    ],
    ids=lambda value: value[0].partition(".")[0] if isinstance(value, list) else "",
)
def test_measurements_run(words, told, small_stack, tmp_path):
    """What they find is not judged here."""
    places = {"STACK": str(small_stack), "OUT": str(tmp_path / "out")}
    script, *rest = words
    for name, place in places.items():
        rest = [word.replace(name, place) for word in rest]
    command = [sys.executable, str(EXAMPLES / "benchmarks" / script), *rest]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
