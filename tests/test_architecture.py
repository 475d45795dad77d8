"""The shape of the code: imports go down only, files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "cryorecon").rglob("*.py"))


def test_imports_go_down_only():
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_files_and_functions_stay_small():
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and "/cli/" not in str(path):
                first = node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
                length = (node.end_lineno or 0) - first.lineno + 1
                assert length <= 40, f"{path}: {node.name} has {length} lines"


def test_importing_cryorecon_does_nothing_else():
    code = "import sys, cryorecon; print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_nothing_loads_pickles_or_seeds_globally():
    for path in SOURCES:
        text = path.read_text()
        if path.name == "cryodrgn.py":  # It writes pickles, for another program; none loads them.
            text = text.replace("import pickle\n", "").replace("pickle.dump(", "")
        for forbidden in (
            "import pickle\n",
            "from pickle ",
            "pickle.load",
            "Unpickler",
            "allow_pickle",
        ):
            assert forbidden not in text, f"{path} uses {forbidden}"
        for forbidden in ("torch.manual_seed", "np.random.seed", "exec("):
            assert forbidden not in text, f"{path} uses {forbidden}"
        assert text.count("torch.load(") == text.count("weights_only=True")
