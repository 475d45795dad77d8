"""The documentation: what it names exists; its blocks marked `sh` run as they stand."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import cryorecon

_ROOT = Path(__file__).resolve().parents[1]
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]
# Small data need no more than this; the commands are the page's otherwise.
_SHORT = {
    "rmfn": ["half_rounds=2", "joint_rounds=1", "temperatures=[5.0,1.0]"],
    "amortized": ["half_rounds=2", "joint_rounds=1", "images_seen=1280"],
}


def _lines(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        yield " ".join(line.split())


@pytest.mark.parametrize("page", _PAGES, ids=lambda path: path.name)
def test_scripts_and_links_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(r"examples/[a-z_/]+\.(?:py|sh)", text):
        assert (_ROOT / name).exists(), name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_menu() -> None:
    menu = (_ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (_ROOT / "docs").glob("*.md"):
        assert f": {page.name}" in menu, page.name


def _scripts() -> list[Path]:
    return [page for page in _PAGES if "```sh\n" in page.read_text("utf-8")]


def _run(words: list[str]) -> str:
    """Run a command line; what went wrong, if anything did."""
    method = words[words.index("--method") + 1] if "--method" in words else "rmfn"
    if words[0].startswith("abinitio-"):
        method = words[0].removeprefix("abinitio-")
    if words[0].startswith("abinitio") and "--continue" not in words:
        words = [*words, *(f"--set={pair}" for pair in _SHORT.get(method, []))]
    if words[:2] == ["mra", "train"]:
        words = [*words, "--pairs", "512", "--epochs", "1"]
    ended = cryorecon(*words)
    return f"{' '.join(words)}: {ended.stderr}" if ended.returncode else ""


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as users have them: a RELION project, a cryoSPARC export, models and jobs."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(_ROOT / "cryorecon/data/4ake_chain_a_heavy.pdb", folder / "4ake.pdb")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        extract = "Extract/job012"
        small = ["--n", "80", "--box", "24", "--pixel-size", "6", "--snr", "1"]
        failed = _run(["simulate", "4ake.pdb", "-o", extract, *small])
        shutil.copy(f"{extract}/particles.star", "particles.star")
        failed += _run(["export", "particles.star", "-o", "p.cs", "--to", "cryosparc"])
        shutil.copytree(extract, "elsewhere")
        Path("J45").mkdir()
        shutil.move("p.cs", "J45/extracted_particles.cs")
        failed += _run(["abinitio", "particles.star", "-o", "finished"])
        _of_other_programs(extract)
        # As another program's map and poses.
        Path("relion").mkdir()
        shutil.copy("finished/initial_model.mrc", "relion/initial_model.mrc")
        shutil.copy("finished/initial_model.mrc", "run_it025_class001.mrc")
        shutil.copy("finished/run_data.star", "run_it025_data.star")
    assert not failed, failed
    return folder


def _of_other_programs(extract: str) -> None:
    """Files of cryoSPARC and cryoDRGN, and signals, as the pages name them."""
    Path("J46").mkdir()
    for name in ("particles", "passthrough_particles"):
        shutil.copy("J45/extracted_particles.cs", f"J46/{name}.cs")
    assert not _run(["export", "finished", "-o", "drgn", "--to", "cryodrgn"])
    for name, copy in (
        ("ctf.pkl", "ctf.pkl"),
        ("poses.pkl", "poses.pkl"),
        ("poses.pkl", "drgn/pose.30.pkl"),
    ):
        shutil.copy(f"drgn/{name}", copy)
    for name in ("ctf.pkl", "poses.pkl"):
        Path(f"drgn/{name}").unlink()
    shutil.copy(f"{extract}/particles.mrcs", "particles.mrcs")
    random = np.random.default_rng(0)
    signal = np.exp(-0.5 * ((np.arange(32) - 10) / 2) ** 2) * 3
    shifted = np.stack([np.roll(signal, shift) for shift in random.integers(0, 12, 20_000)])
    np.save("observed.npy", (shifted + random.standard_normal(shifted.shape)).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("page", _scripts(), ids=lambda path: path.name)
def test_blocks_run(page: Path, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "lab"
    shutil.copytree(lab, folder)
    text = page.read_text("utf-8")
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.S))
    for job in ("job001", "job002"):
        if not re.search(rf"-o {job}\b", blocks):
            shutil.copytree(folder / "finished", folder / job)
    monkeypatch.chdir(folder)
    for line in _lines(blocks):
        words = shlex.split(line, comments=True)
        if words and words[0] == "cd":
            monkeypatch.chdir(words[1])
        elif words:
            assert words[0] == "cryorecon", line
            failed = _run(words[1:])
            assert not failed, failed


def test_options_that_messages_name_are_there():
    """A remedy that does not exist is none."""
    known = set(re.findall(r"--[a-z0-9-]+", (_ROOT / "docs" / "commands.md").read_text("utf-8")))
    # torchrun's, RELION's, and the program's own before any command.
    known |= {"--nproc-per-node", "--select", "--pipeline", "--version"}
    unknown = set()
    for script in (_ROOT / "cryorecon").rglob("*.py"):
        for node in ast.walk(ast.parse(script.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", node.value)
                unknown |= {f"{script.name}: {name}" for name in named if name not in known}
    assert not unknown
