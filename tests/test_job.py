"""A job directory belongs to one job at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from cryorecon.cli.console import prepare_folder
from cryorecon.errors import CryoreconError
from cryorecon.io import files
from cryorecon.run.endings import finished
from cryorecon.run.job import Task, open_job
from cryorecon.run.moments.reconstruct import MomentReconstructOptions

QUIET = Console(quiet=True)


@pytest.fixture
def task(tmp_path):
    (tmp_path / "particles.star").write_text("data_\n")
    return Task("abinitio", tmp_path / "particles.star", 1, {}, {}, 0)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_job_leaves_the_first_ones_folder_alone(task, tmp_path, resume):
    folder = tmp_path / "job"
    with open_job(folder, QUIET, task) as job:
        job.say("first")
        (folder / "initial_model.mrc").touch()
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with (
            pytest.raises(CryoreconError, match=r"at work in .*job"),
            open_job(folder, QUIET, task, resume=resume),
        ):
            pytest.fail("two jobs in one folder")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert finished(folder)
    with open_job(folder, QUIET, task) as job:
        job.say("second")
    assert "first" not in (folder / "run.log").read_text()


@pytest.mark.parametrize("name", ["initial_model.mrc", "initial_model_mask.mrc", "run_data.star"])
def test_a_job_does_not_remove_what_it_reads(task, tmp_path, name):
    folder = tmp_path / "job"
    with open_job(folder, QUIET, task) as job:
        (folder / name).write_text("found")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    options = MomentReconstructOptions(reference=folder / name)
    given = {"inputs": folder / name}, {"options": {"fit": options}}, {"options": options}
    for changes in given:
        with (
            pytest.raises(CryoreconError, match=rf"{name} is the result of an earlier job"),
            open_job(folder, QUIET, replace(task, **changes)),
        ):
            pytest.fail("begun")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with open_job(tmp_path / "other", QUIET, replace(task, inputs=folder / name)) as job:
        job.say("begun")
    assert (folder / name).read_text() == "found"


def test_a_job_that_was_killed_holds_nothing(task, tmp_path):
    folder = tmp_path / "job"
    program = (
        "import sys, time; from pathlib import Path; from rich.console import Console\n"
        "from cryorecon.run.job import Task, open_job\n"
        "task = Task('abinitio', Path(sys.argv[1]), 1, {}, {}, 0)\n"
        "with open_job(Path(sys.argv[2]), Console(quiet=True), task) as job:\n"
        "    job.say('begun')\n"
        "    time.sleep(600)\n"
    )
    words = [sys.executable, "-c", program, str(task.inputs), str(folder)]
    with subprocess.Popen(words) as other:
        try:
            end = time.monotonic() + 60
            while not ((folder / "run.log").exists() and (folder / "run.log").read_text()):
                assert time.monotonic() < end
                time.sleep(0.1)
            with pytest.raises(CryoreconError, match="at work"), open_job(folder, QUIET, task):
                pytest.fail("two jobs in one folder")
        finally:
            other.kill()
    with open_job(folder, QUIET, task, resume=True) as job:
        job.say("goes on")
    assert "begun" in (folder / "run.log").read_text()


@pytest.mark.parametrize("json", [False, True])
def test_a_job_whose_messages_nobody_reads_goes_on(task, tmp_path, json):
    program = (
        "import sys; from pathlib import Path; from cryorecon.cli.console import messages\n"
        "from cryorecon.run.job import Task, open_job\n"
        "task = Task('abinitio', Path(sys.argv[1]), 1, {}, {}, 0)\n"
        f"with open_job(Path(sys.argv[2]), messages({json}), task) as job:\n"
        "    for number in range(3):\n"
        "        job.say(f'line {number}')\n"
        "messages(False).print('done')\n"
    )
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-c", program, str(task.inputs), str(tmp_path / "job")]
    kept = {"stdout": subprocess.PIPE, "stderr": write} if json else {"stdout": write}
    done = subprocess.run(words, **{"stderr": subprocess.PIPE, **kept}, text=True, check=False)
    os.close(write)
    assert done.returncode == 0
    assert done.stdout == ("done\n" if json else None)
    assert not done.stderr
    assert (tmp_path / "job/run.log").read_text().count("line") == 3
    assert finished(tmp_path / "job")


def test_a_disk_that_cannot_lock_is_no_obstacle(task, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with open_job(tmp_path / "job", QUIET, task) as job:
        job.say("done")
    assert finished(tmp_path / "job")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_command_is_told_that_a_job_works_before_that_it_has_not_finished(
    task, tmp_path, overwrite
):
    folder = tmp_path / "job"
    with open_job(folder, QUIET, task):
        (folder / "checkpoint.pt").touch()
        with pytest.raises(CryoreconError, match=r"Another job is at work in .*job"):
            prepare_folder(folder, overwrite)
    prepare_folder(folder, overwrite=True)
