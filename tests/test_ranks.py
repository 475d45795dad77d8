"""Several processes on one job: the result of one process, and what happens when one dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import simulated

from cryorecon.engines.observations import ImageSet
from cryorecon.io.files import locked
from cryorecon.io.moments_file import read_moments_data
from cryorecon.io.mrc import read_map
from cryorecon.io.star import read_star
from cryorecon.physics.fourier import half_plane
from cryorecon.ranks import ALONE, Ranks

SMALL = ("search_images=60", "search_nside=2", "temperatures=[4.0, 1.0]", "half_rounds=2")
# The last mini-batch of 61 images is one image: the other process has none.
SMALL = (*SMALL, "joint_rounds=1", "final_steps=5", "width=16", "fine_images=61", "fine_epochs=3")
SEARCH = ["--starts", "1", *(word for pair in SMALL for word in ("--set", pair))]
REFINE = ["--set", "half_rounds=1", "--set", "joint_rounds=1"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


# The command, without what takes long and is tested elsewhere; every state that can be written is.
SCRIPT = """
import functools
from cryorecon.cli.main import main
from cryorecon.maps import align
from cryorecon.run import abinitio, checkpoint, independent_halves
from cryorecon.run.moments import reconstruct as moment_reconstruct

for module in (abinitio, moment_reconstruct):
    module.report_at_end = lambda *_: None
align._GRID_NSIDE = 3
fewer = functools.partial(independent_halves.chance_fsc, n_trials=1)
independent_halves.chance_fsc = fewer
checkpoint._EVERY_S = checkpoint._TIMES_ITS_COST = 0.0
main()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "quick.py"
    path.write_text(SCRIPT)
    return path


def run(script, *words, several=True):
    """What a job by one process or two has told."""
    start = [sys.executable, *(TWO if several else []), str(script)]
    done = subprocess.run(
        [*start, *map(str, words)], capture_output=True, text=True, timeout=300, env=ENVIRONMENT,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def both(script, words, folder):
    """The same job by one process and by two; the log of the second."""
    run(script, *words, "-o", folder / "one", several=False)
    return run(script, *words, "-o", folder / "two")


def same_maps(folder, name="initial_model.mrc"):
    one, two = (read_map(folder / job / name).data for job in ("one", "two"))
    return np.abs(one - two).max() / np.abs(one).max()


def alike(folder, other="two"):
    one, two = (read_map(folder / job / "initial_model.mrc").data for job in ("one", other))
    return np.corrcoef(one.ravel(), two.ravel())[0, 1]


# Rounding grows from round to round.
ROUNDING = 5e-3


@pytest.mark.slow
def test_two_processes_find_what_one_finds(script, few, tmp_path):
    told = both(script, ["abinitio-rmfn", few, *SEARCH, "--images", "memory"], tmp_path)
    assert told.count("searching from random poses") == 1
    assert same_maps(tmp_path) < ROUNDING
    tables = [read_star(tmp_path / job / "run_data.star")["particles"] for job in ("one", "two")]
    for name in ("rlnAngleRot", "rlnAngleTilt", "rlnOriginXAngst"):
        one, two = (table[name].astype(float).to_numpy() for table in tables)
        apart = np.abs((one - two + 180) % 360 - 180)
        assert np.median(apart) < 0.01, name
    rounds = [read_star(tmp_path / job / "rounds.star")["rounds"] for job in ("one", "two")]
    assert len(rounds[0]) == len(rounds[1]) == 3
    assert not list(tmp_path.glob("two/checkpoint*"))
    assert "processes: 2" in (tmp_path / "two/job.yaml").read_text()


# A new search from poses of which a third are wrong, and the maps that follow from it.
SEARCHED_AGAIN = """
import sys
from dataclasses import replace

import torch

from cryorecon.conventions import euler_to_matrix
from cryorecon.engines.new_search import reassign
from cryorecon.engines.reconstruction import Reconstruction, RefineConfig
from cryorecon.engines.rounds import refine_round
from cryorecon.io.particles import read_particles
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.masks import Support
from cryorecon.physics.rotations import random_rotations
from cryorecon.ranks import joined
from cryorecon.run.load import load_observations

star, sets, out = sys.argv[1:]
config, generator = RefineConfig(search_nside=2), torch.Generator().manual_seed(3)
with joined() as ranks:
    particles = read_particles(star)
    images = replace(load_observations(particles, config.diameter), ranks=ranks)
    rotations = euler_to_matrix(torch.from_numpy(particles.euler_deg())).float()
    offsets = torch.from_numpy(particles.origins_angst() / particles.pixel_size_angst).float()
    rows = torch.arange(len(particles))
    half = rows % 2 if sets == "mixed" else (rows >= len(rows) // 2).long()
    rotations[::3] = random_rotations(len(rows[::3]), generator, torch.float32)
    maps, support = [torch.zeros(24, 24, 24)] * 2, Support(config.diameter / 2)
    state = Reconstruction(rotations, offsets, half, maps, 8.0, support)
    refine_round(state, images, config, fsc_curve, joint=False, n_steps=0)
    reassign(state, images, config, fsc_curve, generator)
    refine_round(state, images, config, fsc_curve, joint=False, n_steps=2)
    drawn = generator.get_state()
    tables = [state.rotations, state.offsets_px, *state.rivals.tables()]
    torch.save([*tables, *state.maps, drawn], f"{out}_{ranks.index}of{ranks.count}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("sets", ["mixed", "one a process"])
def test_two_processes_search_anew_as_one_does(tmp_path, sets):
    """All processes know the same of all images, rivals among it."""
    star = simulated(tmp_path / "stack", 200, 24, 0.1) / "particles.star"
    script = tmp_path / "searched.py"
    script.write_text(SEARCHED_AGAIN)
    for several in (False, True):
        run(script, star, sets, tmp_path / "found", several=several)
    names = ("found_0of1.pt", "found_0of2.pt", "found_1of2.pt")
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in names)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert (one[4].sum(1) > 0.2).sum() > 20
    assert torch.equal(one[-1], first[-1])
    for mine, theirs in zip(one[:-1], first[:-1], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3 * float(mine.abs().max()), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("group", ["C1", "C2"])
def test_two_processes_take_one_half_set_each(script, few, tmp_path, group):
    words = ["abinitio-rmfn", few, *SEARCH, "--halves", "independent", "--images", "disk"]
    told = both(script, [*words, "--symmetry", group], tmp_path)
    assert told.count("both half sets at the same time") == 1
    assert told.count("half set 2, ") == 1
    # The second half set is moved onto the first until steps are small, axes are found in both.
    if group == "C1":
        assert same_maps(tmp_path, "run_half1_class001_unfil.mrc") < ROUNDING
        assert same_maps(tmp_path, "scale1.mrc") < 0.05
    assert alike(tmp_path) > 0.95
    stages = [
        list(read_star(tmp_path / job / "rounds.star")["rounds"]["cryoreconStage"])
        for job in ("one", "two")
    ]
    assert sorted(stages[0]) == sorted(stages[1])


@pytest.mark.slow
def test_two_processes_train_the_networks_of_one(script, few, tmp_path):
    words = ["abinitio-amortized", few, "--images-seen", "640", *REFINE, "--subset", "60"]
    both(script, words, tmp_path)
    # Where a gradient is nearly zero, its rounding decides the sign of Adam's first steps.
    assert alike(tmp_path) > 0.95


# Poses that no training tells apart: searched on from its map, and from random poses' map.
HARD = """
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.run import amortized_stages

search = {"search_nside": 2, "n_starts": 1, "temperatures": (4.0, 1.0), "width": 16}
hard = RmfnConfig(**search, fine_epochs=2, hard_poses=0, hard_epochs=1)
amortized_stages.TOLD_APART = 0
amortized_stages.AmortizedStages.search_config = hard
"""


@pytest.mark.slow
def test_two_processes_search_a_hard_set_as_one_does(few, tmp_path):
    script = tmp_path / "hard.py"
    script.write_text(HARD + SCRIPT)
    told = both(script, ["abinitio-amortized", few, "--images-seen", "640", *REFINE], tmp_path)
    assert told.count("searching from random poses") == 1
    assert told.count("searching on at") == 3
    assert alike(tmp_path) > 0.95


def fit_of(iterations):
    few = {"iterations": iterations, "settling": 5, "radius": 3}
    settings = [word for name, n in few.items() for word in ("--set", f"{name}={n}")]
    return ["--starts", "3", *settings, "--allow-ambiguous"]


@pytest.mark.slow
def test_two_processes_average_and_fit_what_one_does(script, few, tmp_path):
    both(script, ["abinitio", few, "--method", "moments", *fit_of(20)], tmp_path)
    sums = [read_moments_data(tmp_path / job / "moments.h5") for job in ("one", "two")]
    assert sums[0].attributes == sums[1].attributes
    for name, one in sums[0].arrays.items():
        assert np.allclose(one, sums[1].arrays[name], rtol=1e-4, atol=1e-5 * np.abs(one).max())
    starts = [read_star(tmp_path / job / "starts.star")["starts"] for job in ("one", "two")]
    misfit = [table["cryoreconMisfit"].astype(float).to_numpy() for table in starts]
    assert misfit[0] == pytest.approx(misfit[1], rel=1e-2)


def workers(parent):
    """The processes that torchrun has started, by rank."""
    found = {}
    for child in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found[int(child.environ()["RANK"])] = child
    return found


def killed(script, words, victim):
    """Kill one of two processes as soon as there is a state; what was told."""
    job = words[-1]
    begun = subprocess.Popen(
        [sys.executable, *TWO, str(script), *map(str, words)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not list(job.glob("checkpoint*.pt")):
        assert begun.poll() is None, begun.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers(begun.pid)[victim].send_signal(signal.SIGKILL)
    died = time.monotonic()
    told = begun.communicate(timeout=60)[0]
    assert time.monotonic() - died < 60
    assert begun.returncode != 0
    return told


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_job_which_goes_on(script, few, tmp_path, victim):
    job = tmp_path / "job"
    words = ["abinitio-amortized", few, "--images-seen", "6400", *REFINE, "-o", job]
    told = killed(script, words, victim)
    assert "Signal 9" in told
    assert "--nproc-per-node 2 -m cryorecon abinitio --continue" in told
    assert "asked to stop" in told or "has ended or cannot be reached" in told
    assert not (job / "RELION_JOB_EXIT_SUCCESS").exists()
    # Any number of processes goes on.
    assert "the training goes on after" in run(
        script, "abinitio", "--continue", job, several=victim == 1
    )
    assert (job / "RELION_JOB_EXIT_SUCCESS").exists()
    run(script, *words[:-1], tmp_path / "whole", several=False)
    whole, found = (
        read_map(tmp_path / name / "initial_model.mrc").data for name in ("whole", "job")
    )
    assert np.corrcoef(whole.ravel(), found.ravel())[0, 1] > 0.9


@pytest.mark.slow
def test_starts_that_several_processes_had_begun_go_on(script, few, tmp_path):
    """Each keeps its own state: a start may take longer than a queue gives."""
    job, fit = tmp_path / "job", ["abinitio", few, "--method", "moments", *fit_of(300)]
    killed(script, [*fit, "-o", job], 1)
    states = {path.name for path in job.glob("checkpoint*.pt")}
    assert states & {"checkpoint2.pt", "checkpoint3.pt"}
    assert "going on where they were left: start 1" in run(
        script, "abinitio", "--continue", job, several=False
    )
    assert not list(job.glob("checkpoint*.pt"))
    run(script, *fit, "-o", tmp_path / "whole", several=False)
    found, whole = (read_star(tmp_path / n / "starts.star")["starts"] for n in ("job", "whole"))
    np.testing.assert_allclose(
        found["cryoreconMisfit"].astype(float), whole["cryoreconMisfit"].astype(float), rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["anew", "continued"])
def test_several_processes_leave_a_folder_in_which_a_job_works(script, few, tmp_path, how):
    job = tmp_path / "job"
    if how == "continued":
        words = ["abinitio-amortized", few, "--images-seen", "6400", *REFINE, "-o", job]
        killed(script, words, 0)
    words = ["abinitio", "--continue", job] if how == "continued" else ["abinitio", few, "-o", job]
    with locked(job, "run.log"):
        before = {path.name: path.read_bytes() for path in job.iterdir()}
        began = time.monotonic()
        told = subprocess.run(
            [sys.executable, *TWO, str(script), *map(str, words)], capture_output=True, text=True,
            timeout=300, env=ENVIRONMENT, check=False,
        )  # fmt: skip
        assert time.monotonic() - began < 90
        assert told.returncode != 0
        assert (told.stdout + told.stderr).count("Another job is at work") == 1
        assert {path.name: path.read_bytes() for path in job.iterdir()} == before


# Stands in for SLURM's: two nodes, both of them this machine.
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait $first; one=$?
wait $second; two=$?
exit $((one | two))
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_slurm_script_runs_as_a_step_with_all_cores(nodes, tmp_path):
    """SLURM tells steps, not the script, of the time limit; and gives them cores only if asked."""
    said = '#!/bin/sh\necho "cores $SRUN_CPUS_PER_TASK, threads $OMP_NUM_THREADS: $@"\n'
    for name, body in (
        ("srun", said),
        ("scontrol", "#!/bin/sh\necho first\nsleep 0.2\necho second\n"),
    ):
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    slurm = Path(__file__).parents[1] / "examples/pipelines/slurm.sh"
    given = {"SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "-", "SLURM_JOB_ID": "7"}
    given |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32"}
    done = subprocess.run(
        ["bash", str(slurm), "p.star", str(tmp_path / "job"), "--seed", "3"], check=True,
        capture_output=True, text=True, env=given | {"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )  # fmt: skip
    where = "--standalone"
    if nodes > 1:
        where = "--nnodes 2 --rdzv-backend c10d --rdzv-id 7 --rdzv-endpoint first:29500"
    job = f"-m cryorecon abinitio p.star -o {tmp_path / 'job'} --seed 3"
    wanted = f"srun: --ntasks-per-node=1 torchrun {where} --nproc-per-node 4 {job}"
    assert f"srun: {done.stdout.partition(': ')[2]}".strip() == wanted
    assert done.stdout.startswith("cores 32, threads 8")


@pytest.mark.slow
def test_the_slurm_script_shares_a_job_between_two_nodes(few, tmp_path):
    for name, body in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho localhost\n")):
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    slurm = Path(__file__).parents[1] / "examples/pipelines/slurm.sh"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "-", "SLURM_JOB_ID": "7", "PROCESSES": "1"}
    given |= {"PORT": str(port), "PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"}
    told = ""
    for _ in range(2):  # The second time there is nothing left to do.
        done = subprocess.run(
            ["bash", str(slurm), str(few), str(tmp_path / "job"), *SEARCH], check=False,
            capture_output=True, text=True, env=ENVIRONMENT | given, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        told += done.stdout
    assert "processes: 2" in (tmp_path / "job/job.yaml").read_text()
    assert told.count("searching from random poses") == 1
    assert told.count("is finished: nothing to do") == 1


# Each process checks what it learns of the other.
TOGETHER = """
import torch
from cryorecon.ranks import joined

with joined() as ranks:
    mine, other = ranks.index, 1 - ranks.index
    values = torch.complex(torch.full((2, 3), 1.0 + mine), torch.ones(2, 3)).T
    ranks.add_up(values)
    assert torch.equal(values, torch.full((3, 2), 3 + 2j)), values
    assert ranks.any(mine == 1) and not ranks.any(False)
    assert ranks.total(mine + 1) == 3
    assert ranks.numbers(0.1 + mine, 7, source=1) == (1.1, 7.0)
    assert ranks.bytes_from(1, b"x" * mine) == b"x" and ranks.bytes_from(0, b"") == b""
    whole = torch.arange(10.0).reshape(5, 2)
    assert torch.equal(ranks.everyones(ranks.share(whole), ranks.sizes(5)), whole)
    assert torch.equal(ranks.everyones(whole[: 3 * mine], [0, 3]), whole[:3])
    makers = [lambda k=k: torch.full((2,), 10.0 * k + mine) for k in range(3)]
    found = torch.stack(ranks.made(makers, torch.empty(2)))[:, 0]
    assert found.tolist() == [0, 11, 20]
    number, team = ranks.split()
    assert (number, team.index, team.count, team.first) == (mine, 0, 1, True)
    assert team.total(mine + 5) == mine + 5
    ranks.wait()
print("done")
"""


# One step of the training by two processes has the gradients of one process.
STEP = """
import sys
from dataclasses import replace
import torch
from cryorecon.engines.amortized import Amortized, AmortizedConfig
from cryorecon.io.particles import read_particles
from cryorecon.ranks import ALONE, joined
from cryorecon.run.load import load_observations

config = AmortizedConfig(batch=31)
with joined() as ranks:
    particles = read_particles(sys.argv[1])
    images = load_observations(particles, config.diameter, keep="memory", ranks=ranks)
    found = []
    for shared in (images, replace(images, ranks=ALONE)):
        run = Amortized(config, shared, 3.2, torch.Generator().manual_seed(1))
        report = run.step()
        weights = [*run.reader.encoder.parameters(), *run.decoder.parameters()]
        found.append((report, torch.cat([w.grad.flatten() for w in weights])))
    (one, two), (first, second) = zip(*found)
    assert abs(one.gain / two.gain - 1) < 1e-4, found
    assert float((first - second).abs().max() / second.abs().max()) < 1e-4
print("done")
"""


def together(script, text, *words):
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, *TWO, str(script), *map(str, words)], capture_output=True, text=True,
        timeout=100, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.stdout.count("done") == 2, done.stdout + done.stderr


def test_processes_meet_and_exchange(tmp_path):
    together(tmp_path / "together.py", TOGETHER)


def test_two_processes_have_the_gradients_of_one(few, tmp_path):
    together(tmp_path / "step.py", STEP, few)


def test_commands_of_one_process_say_so(tmp_path):
    told = subprocess.run(
        [sys.executable, "-m", "cryorecon", "fsc", "a.mrc", "b.mrc"],
        env=ENVIRONMENT | {"RANK": "1", "WORLD_SIZE": "2"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert told.returncode == 1
    assert "rank 1: Error: cryorecon fsc a.mrc b.mrc runs in one process" in told.stderr


def test_one_process_has_everything():
    rows = torch.arange(7)
    assert torch.equal(ALONE.share(rows), rows)
    assert ALONE.everyones(rows, [7]) is rows
    assert ALONE.numbers(1.5, 2.0) == (1.5, 2.0)
    assert ALONE.made([lambda: rows], rows)[0] is rows
    assert ALONE.device("cuda:3") == "cuda:3"


@pytest.mark.parametrize(("n", "count"), [(7, 2), (2, 3), (0, 4), (1000, 7)])
def test_every_row_belongs_to_one_process(n, count):
    rows = torch.randperm(n)
    shares = [Ranks(index, count).share(rows) for index in range(count)]
    assert torch.equal(torch.cat(shares), rows)
    sizes = [len(share) for share in shares]
    assert sizes == Ranks(0, count).sizes(n)
    assert max(sizes) - min(sizes) <= 1


def test_a_team_shares_its_own_images():
    """Half sets may be sorted in the file: by place among all, one process would have them all."""
    plane, half = half_plane(8), torch.arange(10, 20)
    noise, group = torch.ones(1, plane.n_shells), torch.zeros(20, dtype=torch.int32)
    images = ImageSet(plane, list, noise, group, torch.ones(20), torch.arange(20), total=20)
    rows = torch.arange(10)
    for index in (0, 1):
        team = Ranks(index, 2, offset=2, team="a process group")
        assert torch.equal(images.apart(half, team).mine(rows), rows[5 * index : 5 * index + 5])
        everyone = Ranks(index, 2)
        assert len(images.apart(half, everyone).mine(rows)) == 10 * index
