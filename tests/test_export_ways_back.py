"""Tables that come from cryoSPARC and go back: what RELION reads, and what must stay the same."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cryorecon.cli.main import app
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map, stack_writer
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star

BOX, COUNT, PIXEL = 24, 4, 2.5
STACKS = ("stacks/a.mrc", "stacks/b.mrcs")
RELION = shutil.which("relion_reconstruct")


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cryoSPARC project: p.cs names two images in each of two stacks, one of them ``.mrc``."""
    monkeypatch.chdir(tmp_path)
    Path("stacks").mkdir()
    random = np.random.default_rng(0)
    for name in STACKS:
        with stack_writer(tmp_path / name, BOX, PIXEL) as stack:
            stack.append(random.normal(size=(2, BOX, BOX)).astype(np.float32))
    fields = {
        "uid": np.array([7, 2**63 + 5, 9, 11], "u8"),
        "blob/path": np.array([f">{STACKS[k // 2]}".encode() for k in range(COUNT)]),
        "blob/idx": np.array([0, 1, 0, 1], "u4"),
        "blob/shape": np.full((COUNT, 2), BOX, "u4"),
        "blob/psize_A": np.full(COUNT, PIXEL, "f4"),
        "ctf/exp_group_id": np.array([3, 3, 8, 8], "u4"),
        "ctf/accel_kv": np.full(COUNT, 300, "f4"),
        "ctf/cs_mm": np.full(COUNT, 2.7, "f4"),
        "ctf/amp_contrast": np.full(COUNT, 0.1, "f4"),
        "ctf/df1_A": np.linspace(9e3, 12e3, COUNT, dtype="f4"),
        "ctf/df2_A": np.linspace(9e3, 12e3, COUNT, dtype="f4"),
        "ctf/df_angle_rad": np.zeros(COUNT, "f4"),
        "alignments3D/pose": random.normal(size=(COUNT, 3)).astype("f4"),
        "alignments3D/shift": np.zeros((COUNT, 2), "f4"),
    }
    table = np.zeros(COUNT, [(name, v.dtype, v.shape[1:]) for name, v in fields.items()])
    for name, values in fields.items():
        table[name] = values
    with Path("p.cs").open("wb") as file:
        np.save(file, table)
    return tmp_path


def names_of(star: str) -> list[str]:
    return next(list(t["rlnImageName"]) for t in read_star(star).values() if "rlnImageName" in t)


@pytest.mark.parametrize("dialect", [(), ("--relion30",)])
def test_relion_is_told_the_kind_of_stacks_named_mrc(
    folder: Path, dialect: tuple[str, ...]
) -> None:
    run("export", "p.cs", "-o", "p.star", "--to", "relion", *dialect)
    wanted = [f"{k % 2 + 1:06d}@{STACKS[k // 2]}{':mrcs' * (k < 2)}" for k in range(COUNT)]
    assert names_of("p.star") == wanted
    # Once is enough, and a table of either dialect gets it.
    run("export", "p.star", "-o", "again.star", "--to", "relion")
    assert names_of("again.star") == wanted
    Path("old.star").write_text(Path("p.star").read_text().replace(":mrcs", ":mrc"))
    run("export", "old.star", "-o", "mended.star", "--to", "relion")
    assert names_of("mended.star") == wanted
    first, second = read_particles("p.cs"), read_particles("p.star")
    np.testing.assert_array_equal(first.images(range(COUNT)), second.images(range(COUNT)))
    run("compare-poses", "p.cs", "p.star")


def test_other_programs_get_names_without_the_kind(folder: Path) -> None:
    run("export", "p.cs", "-o", "p.star", "--to", "relion")
    run("export", "p.star", "-o", "back.cs", "--to", "cryosparc")
    one, two = np.load("p.cs"), np.load("back.cs")
    assert [b">" + path for path in two["blob/path"]] == one["blob/path"].tolist()
    # Numbers that are made of names do not depend on it.
    bare = Path("p.star").read_text().replace("cryosparcUid", "myUid")
    Path("told.star").write_text(bare)
    Path("untold.star").write_text(bare.replace(":mrcs", ""))
    for name in ("told", "untold"):
        run("export", f"{name}.star", "-o", f"{name}.cs", "--to", "cryosparc")
    assert np.load("told.cs")["uid"].tolist() == np.load("untold.cs")["uid"].tolist()


@pytest.mark.skipif(RELION is None, reason="RELION is not installed")
def test_relion_reads_what_came_from_cryosparc(folder: Path) -> None:
    run("export", "p.cs", "-o", "p.star", "--to", "relion")
    command = [str(RELION), "--i", "p.star", "--o", "r.mrc", "--ctf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert np.abs(read_map("r.mrc").data).max() > 0


def test_experiment_groups_come_back(folder: Path) -> None:
    """RELION counts its optics groups from 1; cryoSPARC's numbers are in their names."""

    def group_ids(text: str) -> list[int]:
        Path("x.star").write_text(text)
        run("export", "x.star", "-o", "x.cs", "--to", "cryosparc", "--overwrite")
        return np.load("x.cs")["ctf/exp_group_id"].tolist()

    run("export", "p.cs", "-o", "p.star", "--to", "relion")
    text = Path("p.star").read_text()
    assert group_ids(text) == [3, 3, 8, 8]
    # Names that are not all cryoSPARC's, or hold no number of its kind, say nothing.
    for name in ("mine", "expGroup", "expGroup99999999999", "expGroup-3", "expGroup3b"):
        assert group_ids(text.replace("expGroup8", name)) == [1, 1, 2, 2], name


def test_missing_stacks_are_listed_to_the_end(folder: Path) -> None:
    """The message ended in a comma."""
    lines = Path("p.star")
    run("export", "p.cs", "-o", lines, "--to", "relion")
    text = lines.read_text()
    for row in range(COUNT):
        text = text.replace(f"@{STACKS[row // 2]}", f"@gone{row}.mrcs", 1)
    lines.write_text(text)
    with pytest.raises(CryoreconError) as caught:
        read_particles(lines)
    told = "p.star names 4 of 4 stacks that do not exist: gone0.mrcs, gone1.mrcs, gone2.mrcs and 1 "
    assert str(caught.value).startswith(f"{told}more. Run from the project folder")


def test_what_is_cut_off_in_a_message_ends_in_an_ellipsis() -> None:
    assert str(CryoreconError("It names xxx...", "Rename it. ")) == "It names xxx... Rename it."
    assert str(CryoreconError("It is bad.", "Mend it..")) == "It is bad. Mend it."


def content(name: str) -> bytes:
    """Of a file, of STAR files without the line that tells the time."""
    text = Path(name).read_bytes()
    return text.split(b"\n", 1)[1] if name.endswith(".star") else text


def test_tables_go_out_without_their_stacks(folder: Path) -> None:
    """A job's folder that was copied alone: what goes out needs nothing of the images."""
    run("export", "p.cs", "-o", "p.star", "--to", "relion")
    words = {
        "x.star": ("--to", "relion"),
        "y.star": ("--to", "relion", "--relion30", "--flip"),
        "x.cs": ("--to", "cryosparc"),
        "drgn": ("--to", "cryodrgn"),
    }
    files = ("x.star", "y.star", "x.cs", "drgn/ctf.pkl", "drgn/poses.pkl")
    for name, options in words.items():
        assert "WARNING" not in run("export", "p.star", "-o", name, *options)
    with_stacks = [content(name) for name in files]
    shutil.rmtree("stacks")
    for name, options in words.items():
        told = run("export", "p.star", "-o", name, *options, "--overwrite").split()
        assert "WARNING: p.star names 2 of 2 stacks that do not exist: stacks/a.m" in " ".join(told)
        assert "images were not checked." in " ".join(told)
    assert [content(name) for name in files] == with_stacks


def test_stacks_are_needed_where_they_alone_tell_the_box(folder: Path) -> None:
    run("export", "p.cs", "-o", "old.star", "--to", "relion", "--relion30")
    shutil.rmtree("stacks")
    result = CliRunner().invoke(app, ["export", "old.star", "-o", "x.star", "--to", "relion"])
    assert isinstance(result.exception, CryoreconError)
    assert "do not exist" in result.exception.problem
    assert not Path("x.star").exists()
