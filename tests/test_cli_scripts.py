"""The command line as other programs see it: JSON, pipes, exit codes, RELION's External job."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import GOLDEN, MODEL

from cryorecon.cli.console import new_console, prepare_folder
from cryorecon.cli.reference import commands
from cryorecon.errors import CryoreconError
from cryorecon.io.files import JOB_LOCK, METHODS_LOCK, locked
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.star import read_star
from cryorecon.physics.masks import soft_ball
from cryorecon.run.progress import stage_bar

STAR = GOLDEN / "relion31_32.star"
MAP = GOLDEN / "map_32.mrc"
COMMAND = [sys.executable, "-m", "cryorecon"]
FSC = ("fsc", MAP, MAP)
SHORT = ["--starts", 1, "--set", "temperatures=[5, 1]", "--set", "half_rounds=1",
         "--set", "joint_rounds=1"]  # fmt: skip
COMMANDS = {ctx.command_path: command for command, ctx in commands()}


@pytest.fixture
def as_json(cryorecon):
    """Runs a command with --json; its whole stdout is one object."""

    def run(*words):
        code, out, err = cryorecon(*words, "--json")
        assert code == 0, err
        assert "\x1b" not in out + err
        return json.loads(out)

    return run


def test_every_command_that_tells_numbers_has_json():
    without = {path for path, c in COMMANDS.items() if not any(p.name == "json" for p in c.params)}
    assert without == set()


def test_fsc_and_poses_as_json(as_json, tmp_path):
    told = as_json("fsc", MAP, MAP)
    assert told["resolution_angst"]["0.143"] == pytest.approx(5.2, abs=0.1)
    assert len(told["shells"]) == 17
    star = GOLDEN / "relion31_33.star"
    told = as_json("compare-poses", star, star)
    assert told["median_deg"] < 0.01
    again = tmp_path / "poses.json"
    assert as_json("compare-poses", star, star, "--json-file", again) == told
    assert json.loads(again.read_text()) == told


def test_what_a_command_reads_is_kept_whatever_it_is_to_write(cryorecon, tmp_path):
    """`fsc a.mrc b.mrc --json-file b.mrc` wrote over the map."""
    a, b, poses = tmp_path / "a.mrc", tmp_path / "b.mrc", tmp_path / "p.star"
    for path, source in ((a, MAP), (b, MAP), (poses, GOLDEN / "relion31_33.star")):
        path.write_bytes(Path(source).read_bytes())
    picture = tmp_path / "b.png"
    picture.symlink_to(b)
    for words in (
        ("fsc", a, b, "--json-file", b),
        ("fsc", a, b, "--plot", picture),
        ("compare-poses", poses, poses, "--json-file", poses),
        ("fsc", a, b, "--star", tmp_path / "c", "--xml", tmp_path / "c"),
        ("compare-poses", poses, poses, "--json-file", tmp_path / "no" / "p.json"),
        ("reconstruct", poses, "-o", tmp_path / "run_data.star", "--overwrite"),
        ("reconstruct", poses, "-o", tmp_path / "job.2"),
    ):
        code, out, err = cryorecon(*words)
        assert (code, out) == (1, "")
        assert re.search("would be written over|two outputs|does not exist|no name for a map", err)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.mrc", "b.mrc", "b.png", "p.star",
    ]  # fmt: skip
    assert b.read_bytes() == Path(MAP).read_bytes()


def test_json_with_a_file_name_writes_the_file_as_before(cryorecon, tmp_path):
    code, out, _ = cryorecon("fsc", MAP, MAP, "--json", tmp_path / "f.json")
    assert code == 0
    assert "FSC = " in out or "FSC >= " in out
    assert json.loads((tmp_path / "f.json").read_text())["box"] == 32


def test_simulate_reconstruct_and_export_as_json(as_json, tmp_path):
    told = as_json("simulate", MODEL, "-o", tmp_path / "sim", "-n", 30, "--box", 16)
    assert (told["particles"], told["box"]) == (30, 16)
    assert read_map(told["map"]).pixel_size_angst == pytest.approx(told["pixel_size_angst"])
    found = as_json("reconstruct", told["star"], "-o", tmp_path / "m.mrc", "--half-maps")
    assert found["particles"] == 30
    assert [Path(name).name for name in found["half_maps"]] == [
        "m_half1_unfil.mrc", "m_half2_unfil.mrc",
    ]  # fmt: skip
    assert found["resolution_angst"]["0.143"] > 2 * told["pixel_size_angst"] - 1e-3
    out = as_json("export", told["star"], "-o", tmp_path / "p.star", "--to", "relion")
    assert out == {"files": [str(tmp_path / "p.star")], "particles": 30}


def test_moments_as_json(as_json, tmp_path):
    told = as_json("moments", "estimate", STAR, "-o", tmp_path / "a.h5", "--max-radius", 4)
    assert told["images"] == len(read_star(STAR)["particles"])
    assert told["resolution_angst"] == pytest.approx(told["side_angst"] / 4)
    assert 0 < told["second_relative_error"] < 10


def test_mra_as_json(as_json, tmp_path, generator):
    signal = torch.randn(8, generator=generator)
    shifts = torch.randint(3, (20_000,), generator=generator)
    copies = torch.stack([signal.roll(s) for s in range(3)])[shifts]
    noisy = copies + 0.3 * torch.randn(copies.shape, generator=generator)
    np.save(tmp_path / "o.npy", noisy.numpy())
    told = as_json("mra", "solve", tmp_path / "o.npy", "-o", tmp_path / "s", "--threads", 1)
    assert told["observations"] == 20_000
    assert told["noise_std"] == pytest.approx(0.3, rel=0.05)


def test_a_job_as_json_and_in_relion(cryorecon, tmp_path, monkeypatch):
    """What RELION's External job calls, in a folder that RELION has made."""
    job = tmp_path / "External" / "job007"
    job.mkdir(parents=True)
    for name in ("job.star", "note.txt", "run.out", "run.err", "job_pipeline.star"):
        (job / name).write_text("RELION's\n")
    write_map(tmp_path / "ball.mrc", soft_ball(32, 10.0, 2.0, 3).numpy(), 2.6)
    words = ["abinitio", "--o", "External/job007/", "--in_parts", STAR, "--in_mask", "ball.mrc",
             "--offset_range", "5", "--json", "--j", "1", *SHORT]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        code, out, err = cryorecon(*words)
    finally:
        torch.set_num_threads(threads)
    assert code == 0, err
    told = json.loads(out)
    assert told["job"] == "External/job007"
    assert told["particles"] == 20
    assert told["fsc"]["resolution_angst"].keys() == {"0.5", "0.143"}
    assert len(told["fsc"]["values"]) == 17
    assert read_map(told["files"]["map"]).data.shape == (told["box"],) * 3
    assert "searching from random poses" in err
    assert "\x1b" not in err
    assert (job / "RELION_JOB_EXIT_SUCCESS").exists()
    assert yaml.safe_load((job / "job.yaml").read_text())["threads"] == 1
    assert (job / "note.txt").read_text() == "RELION's\n"
    with pytest.raises(CryoreconError, match="not empty"):
        prepare_folder(job, overwrite=False)


def test_a_job_that_fails_before_it_begins_tells_relion(cryorecon, tmp_path):
    for number, (words, status) in enumerate(
        [(["--in_parts", tmp_path / "none.star"], 1), (["--in_parts", STAR, "--diamter", 3], 2)]
    ):
        job = tmp_path / str(number)
        job.mkdir()
        code, out, err = cryorecon("abinitio-amortized", "--o", f"{job}/", *words, "--j", 1)
        assert code == status, err
        assert not out
        assert [p.name for p in job.iterdir()] == ["RELION_JOB_EXIT_FAILURE"]


@pytest.mark.parametrize("name", [JOB_LOCK, METHODS_LOCK])
def test_relion_is_not_told_that_a_job_failed_which_still_works(cryorecon, tmp_path, name):
    job = tmp_path / "job"
    job.mkdir()
    with locked(job, name):
        code, _, err = cryorecon("abinitio", "--o", f"{job}/", "--in_parts", STAR, "--overwrite")
        assert code == 1
        assert "Another job is at work" in err
        assert [p.name for p in job.iterdir()] == [name]


def test_relion_is_told_of_a_failure_where_nobody_can_look(cryorecon, tmp_path):
    job = tmp_path / "job"
    (job / JOB_LOCK).mkdir(parents=True)
    code, _, err = cryorecon("abinitio", "--o", f"{job}/", "--in_parts", STAR, "--overwrite")
    assert code == 1, err
    assert (job / "RELION_JOB_EXIT_FAILURE").exists()


def test_reconstruct_into_a_job_directory(cryorecon, tmp_path):
    job = tmp_path / "job009"
    job.mkdir()
    code, _, err = cryorecon("reconstruct", "--o", f"{job}/", "--in_parts", STAR, "--j", 1)
    assert code == 0, err
    nodes = read_star(job / "RELION_OUTPUT_NODES.star")["output_nodes"]
    assert nodes["rlnPipeLineNodeName"][0] == str(job / "reconstruction.mrc")
    assert (job / "RELION_JOB_EXIT_SUCCESS").exists()
    whole = tmp_path / "map.mrc"
    assert cryorecon("reconstruct", STAR, "-o", whole)[0] == 0
    np.testing.assert_array_equal(read_map(whole).data, read_map(job / "reconstruction.mrc").data)


@pytest.mark.parametrize(
    ("command", "given", "taken"),
    [
        ("abinitio", "--o J/ --in_parts p.star --j 4", "p.star --output J/ --threads 4"),
        ("abinitio", "--o=J --in_parts=p.star --j=4", "p.star --output=J --threads=4"),
        ("abinitio-rmfn", "--in_3dref a.mrc --in_mask m.mrc", "--init-map a.mrc --mask m.mrc"),
        ("abinitio", "--offset_range 5 p.star", "--offset-range 5 p.star"),
        ("abinitio", "p.star --pipeline_control J/ -o J", "p.star -o J"),
        ("abinitio-amortized", "--decoder siren --first-angst 9 --last-angst 7",
         "--volume siren --first-resolution 9 --last-resolution 7"),
        ("simulate", "m.pdb --shift 3 --n 5", "m.pdb --offset-range 3 --n 5"),
        ("moments reconstruct", "m.h5 --radius 6", "m.h5 --max-radius 6"),
        ("reconstruct", "p.star --halves", "p.star --half-maps"),
        ("abinitio", "p.star --halves none", "p.star --halves none"),
        ("fsc", "a b --json", "a b --json"),
        ("fsc", "--json a b", "--json a b"),
        ("fsc", "--json x.json a b", "--json-file x.json a b"),
        ("fsc", "a b -- --o", "a b -- --o"),
        ("fsc", "a b --in_parts c --o d", "a b --in_parts c --o d"),
        ("abinitio", "--in_parts", ""),
    ],
)  # fmt: skip
def test_names_of_relion_and_of_old_are_understood(command, given, taken):
    todays = COMMANDS[f"cryorecon {command}"].todays_names(given.split())
    assert " ".join(todays) == taken


def test_exit_codes(cryorecon, monkeypatch, tmp_path):
    cases = [
        ((), 0), (("--version",), 0), (("fsc", "-h"), 0), (("fsc", MAP, MAP), 0),
        (("fsc", MAP, tmp_path / "none.mrc"), 1), (("fsc", MAP), 2), (("fsc", MAP, MAP, "--no"), 2),
        (("moments",), 2), (("nonsense",), 2), (("fsc", MAP, MAP, "--threads", 0), 2),
        (("moments", "estimate", STAR, "-o", "x.h5", "--form", "round"), 2),
    ]  # fmt: skip
    for words, status in cases:
        code, out, err = cryorecon(*words)
        assert code == status, words
        assert bool(out) == (status == 0), words
        assert bool(err) == (status != 0), words
    for error, status in ((KeyboardInterrupt(), 3), (OSError("disk full"), 1), (EOFError(), 1)):

        def broken(*_, error=error, **__):
            raise error

        monkeypatch.setattr("cryorecon.run.compare_maps.compare_maps", broken)
        code, out, err = cryorecon("fsc", MAP, MAP)
        assert (code, out) == (status, "")
        assert err.strip()
        assert "Traceback" not in err


def test_an_interruption_while_the_program_loads_is_quiet():
    script = """
import sys

class Stop:
    def find_spec(self, name, path, target=None):
        if name == "cryorecon.cli.main":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stop())
from cryorecon.__main__ import start
start()
"""
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "Interrupted.\n")


@pytest.mark.parametrize(
    "words",
    [(), *(pytest.param(w, marks=pytest.mark.slow) for w in (FSC, (*FSC, "--json")))],
)
def test_a_reader_that_leaves_is_no_error(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, *map(str, words)], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.slow
def test_a_job_goes_on_when_its_reader_leaves(tmp_path):
    words = ["abinitio", STAR, "-o", tmp_path / "job", "--threads", 1, *SHORT]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, *map(str, words)], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "job/RELION_JOB_EXIT_SUCCESS").exists()
    assert (tmp_path / "job/report.html").exists()


@pytest.mark.parametrize(
    "words", [["fsc", MAP, MAP, "--json"], ["compare-poses", STAR, STAR], ["--help"]]
)
def test_a_command_whose_output_is_closed_ends_well(words):
    shell = ["sh", "-c", 'exec "$@" >&-', "sh"]
    done = subprocess.run(
        [*shell, *COMMAND, *map(str, words)], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def on_terminal(*words: object, **env: str) -> str:
    """What a command writes where both outputs are a terminal."""
    keeper, terminal = pty.openpty()
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        [*COMMAND, *map(str, words)], stdout=terminal, stderr=terminal,
        env={**plain, "TERM": "xterm", **env},
    ) as process:  # fmt: skip
        os.close(terminal)
        seen = b""
        try:
            while part := os.read(keeper, 65536):
                seen += part
        except OSError:  # the other end is closed
            pass
    os.close(keeper)
    assert process.returncode == 0, seen
    return seen.decode()


@pytest.mark.slow
def test_colours_and_bars_are_for_terminals_only(tmp_path):
    words = ["reconstruct", STAR, "-o", tmp_path / "r.mrc", "--overwrite"]
    shown = on_terminal(*words)
    assert "\x1b[1m" in shown
    assert "Backprojecting" in shown
    shown = on_terminal("fsc", MAP, MAP, NO_COLOR="1")
    assert "\x1b" not in shown
    assert "FSC" in shown
    done = subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, text=True, check=True,
        env={**os.environ, "FORCE_COLOR": "1"},
    )  # fmt: skip
    assert done.stderr == ""


class Terminal(io.StringIO):
    """Takes text as a terminal does."""

    def isatty(self):
        return True


def test_no_color_and_pipes_are_plain(monkeypatch):
    def printed(stream, **env):
        for name in ("NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm", **env}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdout", stream)
        made = new_console(stderr=False)
        made.print("[bold red]words[/]")
        with stage_bar(made, "Reading", 3) as bar:
            bar(3)
        monkeypatch.undo()
        return stream.getvalue()

    assert "\x1b[1;31mwords" in printed(Terminal())
    assert printed(Terminal(), NO_COLOR="1").startswith("words\n")
    assert "\x1b[1;31m" not in printed(Terminal(), NO_COLOR="1")
    assert printed(io.StringIO()) == "words\n"
    assert "Reading" in printed(Terminal())
    assert "Reading" not in printed(Terminal(), TERM="dumb")
    assert "Reading" not in printed(io.StringIO(), FORCE_COLOR="1")
