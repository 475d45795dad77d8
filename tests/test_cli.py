"""Whole commands through the command line, with real files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import GOLDEN, MODEL, cryorecon
from typer.testing import CliRunner

from cryorecon.cli.main import app
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map
from cryorecon.io.star import read_star, write_star


def test_the_program_runs_as_a_module(tmp_path):
    """A process of its own: entry, streams and exit status. The other tests call its `main`."""
    for words, code in ((["--version"], 0), (["fsc", "none.mrc", "none.mrc"], 1), (["none"], 2)):
        command = [sys.executable, "-m", "cryorecon", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, words
        assert ("cryorecon 0." in done.stdout) == (code == 0)
        assert done.stderr.startswith("Error: ") == (code == 1)


def test_version_and_help():
    assert "cryorecon 0." in cryorecon("--version").stdout
    text = cryorecon("--help").stdout
    for name in ("simulate", "abinitio", "abinitio-rmfn", "reconstruct", "fsc", "compare-poses"):
        assert name in text


def test_simulate_reconstruct_fsc_and_compare(tmp_path):
    done = cryorecon(
        "simulate", MODEL, "-o", "sim", "--n", 300, "--box", 24, "--pixel-size", 3.2, "--snr", 1,
        "--shift", 5, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = cryorecon("reconstruct", "sim/particles.star", "-o", "r.mrc", "--halves", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "half maps, unmasked, poses as given: FSC" in done.stdout
    halves = [read_map(tmp_path / f"r_half{n}_unfil.mrc").data for n in (1, 2)]
    assert (halves[0] != halves[1]).any()
    done = cryorecon("fsc", "r.mrc", "sim/map.mrc", "--json", "f.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = json.dumps(json.loads((tmp_path / "f.json").read_text()))
    assert "0.5" in text
    done = cryorecon("compare-poses", "sim/particles.star", "sim/particles.star", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "median error" in done.stdout


def test_reconstruct_leaves_no_maps_of_an_earlier_run(few, tmp_path):
    words = ("reconstruct", few, "-o", tmp_path / "job", "--overwrite")
    maps = ["reconstruction.mrc", *(f"reconstruction_half{k}_unfil.mrc" for k in (1, 2))]
    for more, left in ((["--half-maps"], maps), ([], maps[:1])):
        assert cryorecon(*words, *more).returncode == 0
        assert sorted(path.name for path in (tmp_path / "job").glob("*.mrc")) == sorted(left)


def test_errors_are_two_sentences_and_exit_with_1(tmp_path):
    star = GOLDEN / "relion31_32.star"
    cases = [
        ("abinitio", tmp_path, "-o", "x"),
        ("abinitio", "none.star", "-o", "x"),
        ("reconstruct", tmp_path / "none.star", "-o", "x.mrc"),
        ("simulate", tmp_path / "none.pdb", "-o", "x"),
        ("fsc", GOLDEN / "map_32.mrc", GOLDEN / "map_33.mrc"),
        ("abinitio", star, "-o", "x", "--set", "fit.n_step=3"),
        ("abinitio", star, "-o", "x", "--diameter", 500),
    ]
    for case in cases:
        done = cryorecon(*case, cwd=tmp_path)
        assert done.returncode == 1, case
        assert "Traceback" not in done.stderr
        assert done.stderr.strip().startswith("Error: ")
        assert done.stderr.strip().endswith(".")
    assert "Did you mean n_steps" in cryorecon(*cases[5], cwd=tmp_path).stderr
    assert not (tmp_path / "x.mrc").exists()


def test_usage_errors_exit_with_2():
    assert cryorecon("abinitio").returncode == 2
    assert cryorecon("nonsense").returncode == 2


def test_a_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    done = cryorecon("simulate", MODEL, "-o", tmp_path, "--n", 5, "--box", 16)
    assert done.returncode == 1
    assert "--overwrite" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_reconstruct_needs_poses(tmp_path):
    tables = read_star(GOLDEN / "relion31_32.star")
    tables["particles"] = tables["particles"].drop(columns=["rlnAngleTilt"])
    tables["particles"]["rlnImageName"] = [
        f"{i + 1}@{GOLDEN / 'relion31_32.mrcs'}" for i in range(len(tables["particles"]))
    ]
    write_star(tmp_path / "p.star", tables)
    done = cryorecon("reconstruct", tmp_path / "p.star", "-o", tmp_path / "r.mrc")
    assert done.returncode == 1
    assert "rlnAngleTilt" in done.stderr
    assert not (tmp_path / "r.mrc").exists()


def test_the_first_line_comes_before_the_end(tmp_path):
    star = GOLDEN / "relion31_32.star"
    settings = ["temperatures=[5, 1]", "half_rounds=1", "joint_rounds=1", "final_steps=2"]
    settings = [word for setting in settings for word in ("--set", setting)]
    done = cryorecon("abinitio-rmfn", star, "-o", tmp_path / "job", "--starts", 1, *settings)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "20 particles, 32 px at 2.6 A" in lines[0]
    log = (tmp_path / "job" / "run.log").read_text()
    for words in ("searching from random poses", "log-likelihood", "half maps agree", "hand"):
        assert words in log


def test_amortized_runs_by_either_name(tmp_path):
    star = GOLDEN / "relion31_32.star"
    short = ["--set", "images_seen=256", "--set", "half_rounds=1", "--set", "joint_rounds=1"]
    for number, name in enumerate((["abinitio", "--method", "amortized"], ["abinitio-amortized"])):
        job = tmp_path / str(number)
        done = cryorecon(*name, star, "-o", job, *short)
        # Twenty images may or may not hold enough signal: both ends are told.
        assert done.returncode == 0 or "No signal found" in done.stderr, done.stderr
        log = (job / "run.log").read_text()
        assert "training on 16 images: dense encoder" in log
        assert "256 images seen" in log


def test_options_of_another_engine_or_machine_are_refused(tmp_path):
    star = GOLDEN / "relion31_32.star"
    done = cryorecon("abinitio", star, "-o", tmp_path / "a", "--method", "amortized", "--starts", 3)
    assert done.returncode == 2
    assert "--starts" in done.stderr
    done = cryorecon("abinitio-amortized", star, "-o", tmp_path / "b", "--device", "abacus")
    assert done.returncode == 1
    assert "--device abacus" in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_failed_job_says_so(tmp_path):
    tables = read_star(GOLDEN / "relion31_32.star")
    (tmp_path / "relion31_32.mrcs").write_bytes((GOLDEN / "relion31_32.mrcs").read_bytes())
    raw = bytearray((tmp_path / "relion31_32.mrcs").read_bytes())
    for image in range(2, 9):  # One NaN pixel each, in more images than are left out.
        raw[1024 + 4096 * image + 100 : 1024 + 4096 * image + 104] = b"\x00\x00\xc0\x7f"
    (tmp_path / "relion31_32.mrcs").write_bytes(bytes(raw))
    write_star(tmp_path / "p.star", tables)
    done = cryorecon("abinitio", tmp_path / "p.star", "-o", tmp_path / "job")
    assert done.returncode == 1
    assert "row 3: image 3" in done.stderr
    assert (tmp_path / "job" / "RELION_JOB_EXIT_FAILURE").exists()
    assert not (tmp_path / "job" / "initial_model.mrc").exists()


def test_an_interrupted_job_says_so_and_leaves_no_older_result(tmp_path):
    """Ctrl-C: exit 3, the marker, and no map of an earlier run."""
    job = tmp_path / "job"
    job.mkdir()
    (job / "initial_model.mrc").write_bytes(b"old")
    star = GOLDEN / "relion31_32.star"
    # A shell's background jobs ignore the signal, and so would their children.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from cryorecon.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "abinitio", str(star), "-o", str(job)]
    process = subprocess.Popen(
        [*command, "--overwrite", "--starts", "500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        for line in process.stdout:
            if "searching" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 3
    assert "Interrupted." in rest
    assert "Traceback" not in rest
    assert (job / "RELION_JOB_EXIT_ABORTED").exists()
    assert not (job / "initial_model.mrc").exists()


@pytest.fixture
def project(few, tmp_path):
    """A folder with particles of its own, two maps and a mask."""
    for name in ("particles.mrcs", "map.mrc"):
        shutil.copy(few.parent / name, tmp_path / name)
    tables = read_star(few)
    numbers = tables["particles"]["rlnImageName"].str.partition("@")[0]
    tables["particles"]["rlnImageName"] = numbers + "@particles.mrcs"
    write_star(tmp_path / "p.star", tables)
    shutil.copy(tmp_path / "map.mrc", tmp_path / "other.mrc")
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "reconstruct p.star -o stack.mrc --overwrite",
        "reconstruct p.star -o ./table.mrc --overwrite",
        "fsc map.mrc other.mrc --star map.mrc",
        "fsc map.mrc other.mrc --xml other.mrc",
        "fsc map.mrc other.mrc --aligned-map linked.mrc",
        "export p.star -o p.star --to relion --flip",
        "export map.mrc -o map.mrc --to mrc --flip",
        "simulate map.mrc -o . --overwrite -n 3 --pixel-size 6",
    ],
)
def test_no_command_writes_over_what_it_reads(project, words):
    for link, name in (("linked", "map.mrc"), ("stack", "particles.mrcs"), ("table", "p.star")):
        (project / f"{link}.mrc").symlink_to(name)
    before = {path.name: path.read_bytes() for path in project.iterdir()}
    done = cryorecon(*words.split(), cwd=project)
    assert done.returncode == 1, done.stdout
    assert "is what this command reads" in done.stderr
    assert {path.name: path.read_bytes() for path in project.iterdir()} == before


@pytest.mark.parametrize("name", ["particles.mrcs", "./p.star"])
def test_a_map_is_not_written_by_a_name_of_something_else(project, name):
    before = {path.name: path.read_bytes() for path in project.iterdir()}
    done = cryorecon("reconstruct", "p.star", "-o", name, "--overwrite", cwd=project)
    assert done.returncode == 1
    assert "is no name for a map" in done.stderr
    assert {path.name: path.read_bytes() for path in project.iterdir()} == before


@pytest.mark.parametrize(
    ("command", "words", "works"),
    [
        ("reconstruct", "p.star -o none/m.mrc", "cryorecon.run.reconstruct.reconstruct"),
        ("fsc", "map.mrc map.mrc --align --aligned-map none/m.mrc", "cryorecon.run.compare_maps"),
        ("fsc", "map.mrc map.mrc --plot none/m.png", "cryorecon.run.compare_maps"),
    ],
)
def test_a_missing_folder_is_told_before_the_work(project, monkeypatch, command, words, works):
    def worked(*_, **__):
        raise AssertionError("for nothing")

    target = works if works.endswith("reconstruct") else f"{works}.compare_maps"
    monkeypatch.setattr(target, worked)
    monkeypatch.chdir(project)
    result = CliRunner().invoke(app, [command, *words.split()])
    assert isinstance(result.exception, CryoreconError), result.output
    assert "The folder none does not exist" in result.exception.problem


def test_a_map_that_is_there_is_kept_unless_told(project):
    (project / "m.mrc").write_text("mine")
    done = cryorecon("reconstruct", "p.star", "-o", "m.mrc", cwd=project)
    assert done.returncode == 1
    assert "m.mrc exists" in done.stderr
    (project / "m.mrc").rename(project / "n_half2_unfil.mrc")
    done = cryorecon("reconstruct", "p.star", "-o", "n.mrc", "--half-maps", cwd=project)
    assert "n_half2_unfil.mrc exists" in done.stderr
    assert not (project / "n.mrc").exists()
    done = cryorecon(
        "reconstruct", "p.star", "-o", "n.mrc", "--half-maps", "--overwrite", cwd=project
    )
    assert done.returncode == 0, done.stderr
    assert read_map(project / "n_half2_unfil.mrc").data.shape == (24, 24, 24)


@pytest.mark.parametrize(
    "words",
    ["abinitio p.star -o j", "moments estimate p.star -o m.h5", "abinitio p.star -o j --dry-run"],
)
@pytest.mark.parametrize("diameter", [0.5, 1, 12])
def test_a_particle_of_hardly_a_pixel_is_refused(project, words, diameter):
    """Nanometres, or a share of the box."""
    done = cryorecon(*words.split(), "--diameter", diameter, cwd=project)
    assert done.returncode == 1
    assert "--diameter in angstrom" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_terminal_without_the_letters_of_a_path_is_no_reason_to_fail(project):
    folder = project / "ünï"
    folder.mkdir()
    words = ["-m", "cryorecon", "reconstruct", "p.star", "-o", "ünï/m.mrc"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, *words], cwd=project, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "m.mrc" in done.stdout
    assert (folder / "m.mrc").exists()
