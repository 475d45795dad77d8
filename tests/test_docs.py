"""The documentation: every command in it exists; blocks marked `sh` run as they stand."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cryorecon.cli.main import app

_ROOT = Path(__file__).resolve().parents[1]
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]
_CODE = re.compile(r"```[a-z]*\n(.*?)```|`([^`\n]+(?:\n[^`\n]+)?)`", re.S)
# Small data need no more than this; the commands are the page's otherwise.
_SHORT = {
    "rmfn": ["--set", "half_rounds=2", "--set", "joint_rounds=1", "--set", "temperatures=[5.0,1.0]"],
    "amortized": ["--set", "images_seen=1280", "--set", "half_rounds=2", "--set", "joint_rounds=1"],
}


def _lines(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        yield " ".join(line.split())


def _mentioned(page: Path) -> Iterator[list[str]]:
    """Words of each `cryorecon ...` in code, inline or in a block."""
    for block, inline in _CODE.findall(page.read_text("utf-8")):
        for line in _lines(block) if block else [" ".join(inline.split())]:
            if line.startswith("cryorecon "):
                yield re.split(r"\s*[|;&]\s", line)[0].split()[1:]


def _command(words: list[str]) -> tuple[Any, list[str]] | None:
    """The command that words name, and the words that are left; None for `cryorecon --help`."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands") and rest and re.fullmatch(r"[a-z][a-z-]*", rest[0]):
        name = rest.pop(0)
        assert name in command.commands, f"there is no command {name} in {words}"
        command = command.commands[name]
    return None if hasattr(command, "commands") else (command, rest)


@pytest.mark.parametrize("page", _PAGES, ids=lambda path: path.name)
def test_commands_and_options_exist(page: Path) -> None:
    for words in _mentioned(page):
        found = _command(words)
        if found is None:
            continue
        command, rest = found
        known = {"--help"}
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
        given = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        assert given <= known, f"{' '.join(words)}: {given - known}"


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


def _run(words: list[str]) -> int:
    method = words[words.index("--method") + 1] if "--method" in words else "rmfn"
    if words[0].startswith("abinitio-"):
        method = words[0].removeprefix("abinitio-")
    if words[0].startswith("abinitio"):
        words = [*words, *_SHORT.get(method, [])]
    try:
        return typer.main.get_command(app)(words, standalone_mode=False) or 0
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as users have them: a RELION project, a cryoSPARC export, models and jobs."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(_ROOT / "cryorecon/data/4ake_chain_a_heavy.pdb", folder / "4ake.pdb")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        extract = "Extract/job012"
        small = ["--n", "80", "--box", "24", "--pixel-size", "6", "--snr", "1"]
        assert _run(["simulate", "4ake.pdb", "-o", extract, *small]) == 0
        shutil.copy(f"{extract}/particles.star", "particles.star")
        assert _run(["export", "particles.star", "-o", "p.cs", "--to", "cryosparc"]) == 0
        Path("J45").mkdir()
        shutil.move("p.cs", "J45/extracted_particles.cs")
        assert _run(["abinitio", "particles.star", "-o", "finished"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", _scripts(), ids=lambda path: path.name)
def test_blocks_run(
    page: Path, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lab"
    shutil.copytree(lab, folder)
    text = page.read_text("utf-8")
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.S))
    if "-o job001 " not in blocks and "-o job001\n" not in blocks:
        shutil.copytree(folder / "finished", folder / "job001")
    monkeypatch.chdir(folder)
    for line in _lines(blocks):
        words = shlex.split(line, comments=True)
        if words and words[0] == "cd":
            monkeypatch.chdir(words[1])
        elif words:
            assert words[0] == "cryorecon", line
            assert _run(words[1:]) == 0, line
