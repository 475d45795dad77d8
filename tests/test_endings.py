"""How jobs of several processes end, one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from rich.console import Console

from cryorecon.cli import console
from cryorecon.cli import main as program
from cryorecon.errors import CryoreconError, LostRankError
from cryorecon.io.files import remove_unfinished
from cryorecon.io.star import read_star
from cryorecon.ranks import Ranks
from cryorecon.run import endings
from cryorecon.run.checkpoint import Checkpoint
from cryorecon.run.continuing import threads_of
from cryorecon.run.endings import ended, marked, reason_of
from cryorecon.run.job import Task, open_job
from cryorecon.run.stopping import Stop, StoppedError

FIRST, SECOND = Ranks(0, 2), Ranks(1, 2)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(endings, "_AFTER_THE_FIRST_S", 0.1)


def end(folder, ranks, error):
    with pytest.raises(type(error)), marked(folder, ranks):
        raise error


def test_another_process_that_fails_says_why(tmp_path):
    """The first one learns no more than that it is gone."""
    end(tmp_path, SECOND, CryoreconError("particles.star, row 7: no number", "Correct it"))
    assert ended(tmp_path) == "failure"
    assert (tmp_path / "run.log").read_text() == (
        "process 1: particles.star, row 7: no number. Correct it.\n"
    )


def test_what_all_processes_meet_the_first_one_says(tmp_path):
    error = CryoreconError("No signal found", "Check the images")
    end(tmp_path, FIRST, error)
    end(tmp_path, SECOND, error)
    assert not (tmp_path / "run.log").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["RELION_JOB_EXIT_FAILURE"]


@pytest.mark.parametrize(
    ("ends", "how"),
    [
        ((StoppedError("asked"), LostRankError("gone", "see there")), "aborted"),
        ((CryoreconError("bad image", "remove it"), KeyboardInterrupt()), "failure"),
    ],
)
def test_a_job_has_one_marker(tmp_path, ends, how):
    """Of two processes, the second loses the first, or is stopped by torchrun."""
    end(tmp_path, SECOND, ends[0])
    end(tmp_path, FIRST, ends[1])
    assert [p.name for p in tmp_path.glob("RELION*")] == [f"RELION_JOB_EXIT_{how.upper()}"]


def test_why_a_process_ends_is_what_ended_the_other(tmp_path):
    lost, stopped = LostRankError("gone", "see there"), KeyboardInterrupt()
    assert reason_of(tmp_path, lost, FIRST) is lost
    (tmp_path / "RELION_JOB_EXIT_ABORTED").touch()
    assert isinstance(reason_of(tmp_path, lost, FIRST), StoppedError)
    assert reason_of(tmp_path, stopped, FIRST) is stopped
    (tmp_path / "RELION_JOB_EXIT_ABORTED").rename(tmp_path / "RELION_JOB_EXIT_FAILURE")
    assert isinstance(reason_of(tmp_path, stopped, FIRST), LostRankError)
    assert reason_of(tmp_path, stopped, Ranks()) is stopped


WAITS = """
import signal, sys, time
from cryorecon.ranks import joined

with joined() as ranks:
    begun = time.monotonic()
    heard = []
    signal.signal(signal.SIGALRM, lambda *_: heard.append(time.monotonic() - begun))
    if ranks.first:
        time.sleep(3)
    else:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    ranks.wait()
    if not ranks.first:
        print("heard after", heard[0], flush=True)
"""


def test_a_process_that_waits_for_another_hears_signals(tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *words, str(tmp_path / "waits.py")], capture_output=True, text=True,
        timeout=120, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("heard after")[1]) < 2


def test_what_the_second_half_set_had_told_is_in_the_log_when_a_job_goes_on(tmp_path):
    inputs = tmp_path / "p.star"
    inputs.write_text("data_\n")
    task = Task("abinitio", inputs, 1, {}, {}, 0)
    folder, quiet = tmp_path / "job", Console(quiet=True)
    with pytest.raises(StoppedError), open_job(folder, quiet, task) as job:
        team = job.for_team(1, Ranks(0, 1, 1))
        team.ranks = SECOND
        team.say("half set 2, 40 images, by itself")
        team.record_round("half-set-2-half-maps", 1, {"cryoreconPoseChange": 2.5})
        assert "half set 2" not in (folder / "run.log").read_text()
        raise StoppedError("asked")
    kept = (folder / "half_set2.jsonl").read_text()
    assert len([json.loads(line) for line in kept.splitlines()]) == 2
    (folder / "half_set2.jsonl").write_text(kept + '{"line": "not wh')
    with open_job(folder, quiet, task, resume=True):
        assert "s  half set 2, 40 images" in (folder / "run.log").read_text()
        rounds = read_star(folder / "rounds.star")["rounds"]
        assert list(rounds["cryoreconStage"]) == ["half-set-2-half-maps"]
        assert not (folder / "half_set2.jsonl").exists()


def test_other_processes_let_go_of_the_state_that_they_went_on_from(tmp_path):
    writer = Checkpoint(tmp_path / "checkpoint.pt", Stop())
    writer.put("map", lambda: {"poses": torch.zeros(10)}, force=True)
    for ranks in (Ranks(0, 1), Ranks(1, 1)):
        again = Checkpoint(tmp_path / "checkpoint.pt", Stop(), resume=True, ranks=ranks)
        assert again.get("map") is not None
        again.put("map", lambda: {"poses": torch.ones(10)}, force=True)
        assert again.get("map") is None


@pytest.mark.parametrize(("processes", "threads"), [(1, 3), (2, None)])
def test_threads_are_those_of_as_many_processes(tmp_path, monkeypatch, processes, threads):
    monkeypatch.delenv("RANK", raising=False)
    needed = dict.fromkeys(("kind", "input", "input_sha256", "options", "directory"), "x")
    record = {**needed, "threads": 3, "processes": processes}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(record))
    assert threads_of(tmp_path) == threads


def test_a_rank_alone_is_no_other_process(monkeypatch, capsys):
    """Some clusters set it for every job."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    console.print_json({"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    monkeypatch.setenv("WORLD_SIZE", "2")
    console.print_json({"a": 1})
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("abinitio p.star -o all", False),
        ("abinitio perturbed -o out --method rmfn", False),
        ("abinitio p.star -o out --dry_run", True),
        ("abinitio p.star -o out --method all", True),
        ("abinitio p.star -o out --init=perturbed", True),
        ("fsc a.mrc b.mrc", True),
    ],
)
def test_what_only_one_process_can_do_is_refused_in_several(monkeypatch, words, refused):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if not refused:
        program._refuse_in_several(words.split())
        return
    with pytest.raises(CryoreconError, match="runs in one process"):
        program._refuse_in_several(words.split())


def test_what_killed_processes_had_begun_to_write_is_removed(tmp_path):
    names = [".a.h5.123.tmp", ".a2.h5.77.tmp", ".mine.tmp", "a.h5"]
    for name in names:
        (tmp_path / name).touch()
    remove_unfinished(tmp_path, "a.h5")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])
    remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.tmp", "a.h5"]
