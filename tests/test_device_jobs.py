"""Whole jobs of every engine on a device that is only pretended, with every important option."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import simulated
from pretended_device import DEVICE, operations, pretended_device
from rich.console import Console

from cryorecon.engines import reconstruction
from cryorecon.engines.amortized import Amortized, AmortizedConfig
from cryorecon.engines.moments.config import MomentFitConfig
from cryorecon.engines.new_search import reassign
from cryorecon.engines.reconstruction import RefineConfig, assign, telling_grid
from cryorecon.engines.rmfn import RmfnConfig, Search
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import open_stack, read_map, stack_writer, write_map
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star, write_star
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.masks import Support
from cryorecon.run import abinitio as abinitio_module
from cryorecon.run import checkpoint, independent_halves, load
from cryorecon.run.abinitio import abinitio
from cryorecon.run.abinitio_input import AbinitioOptions
from cryorecon.run.load import load_observations
from cryorecon.run.moments import reconstruct as moment_reconstruct
from cryorecon.run.moments.estimate import MomentsOptions
from cryorecon.run.moments.reconstruct import MomentReconstructOptions, abinitio_moments

QUIET = Console(quiet=True)
TINY = RmfnConfig(
    n_starts=1,
    temperatures=(5.0, 1.0),
    search_nside=1,
    search_images=30,
    half_rounds=2,
    joint_rounds=1,
    final_steps=2,
    width=16,
)
# Every rung of the search, whatever poses are left.
HARD = replace(
    TINY, hard_poses=0, fine_epochs=2, hard_epochs=2, fine_images=40, hard_images=45, search_nside=2
)
SHORT = AmortizedConfig(images_seen=192, search_nside=1, half_rounds=1, joint_rounds=1, width=16)
BOX, PIXEL_SIZE_ANGST = 32, 2.4


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """60 particles, 20 px at 3.84 A, SNR 2."""
    return simulated(tmp_path_factory.mktemp("few"), 60, 20, 2.0) / "particles.star"


@pytest.fixture(scope="module")
def motley(tmp_path_factory):
    """60 particles of 32 px in two optics groups; some are bright, others show no fine detail."""
    folder = simulated(tmp_path_factory.mktemp("motley"), 60, BOX, 2.0)
    images = np.array(open_stack(folder / "particles.mrcs"))
    x = np.arange(BOX) - BOX // 2
    images[7] += 30 * images.std() * (np.hypot(x[:, None], x) < 6)
    k = np.fft.fftfreq(BOX, 1 / BOX)
    shown = np.hypot(k[:, None], k) <= 8
    images[1::2] = np.fft.ifft2(np.fft.fft2(images[1::2]) * shown).real
    with stack_writer(folder / "motley.mrcs", BOX, PIXEL_SIZE_ANGST) as written:
        written.append(images)
    tables = read_star(folder / "particles.star")
    optics = pd.concat([tables["optics"]] * 2, ignore_index=True)
    names = tables["particles"]["rlnImageName"].str.partition("@")[0] + "@motley.mrcs"
    group = np.where(np.arange(60) % 2 == 1, "2", "1")
    particles = tables["particles"].assign(rlnImageName=names, rlnOpticsGroup=group)
    optics = optics.assign(rlnOpticsGroup=["1", "2"])
    write_star(folder / "motley.star", {"optics": optics, "particles": particles})
    return folder / "motley.star"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No report, and one map of noise; the device has room for all images."""
    for module in (abinitio_module, moment_reconstruct):
        monkeypatch.setattr(module, "report_at_end", lambda *_: None)
    fewer = partial(independent_halves.chance_fsc, n_trials=1)
    monkeypatch.setattr(independent_halves, "chance_fsc", fewer)
    monkeypatch.setattr(load, "free_memory", lambda _: 1e9)


def job(star, folder, **options):
    """A job on the device; its map."""
    with pretended_device():
        abinitio(star, folder, AbinitioOptions(device="meta", **options), QUIET)
    return read_map(folder / "initial_model.mrc").data


def correlation(there, here):
    return np.corrcoef(there.ravel(), here.ravel())[0, 1]


RMFN = {
    "grid": {"engine": replace(TINY, volume="grid")},
    "hard": {"engine": HARD},
    "scales": {"engine": replace(TINY, update_scale=True), "keep": "memory"},
    "no halves": {"engine": TINY, "halves": "none"},
    "black": {"engine": TINY, "contrast": "black"},
    "read": {"engine": TINY, "subset": 40, "assign": "read"},
    "left out": {"engine": TINY, "subset": 40, "assign": "none"},
    "halves in C2": {"engine": TINY, "halves": "independent", "symmetry": "C2"},
    "halves in D2": {"engine": replace(HARD, volume="grid"), "halves": "independent",
                     "symmetry": "D2"},
}  # fmt: skip
AMORTIZED = {
    "small": {"engine": replace(SHORT, encoder="small")},
    "log-grid": {"engine": replace(SHORT, decoder="log-grid")},
    "rmfn": {"engine": replace(SHORT, decoder="rmfn")},
    "fouriernet": {"engine": replace(SHORT, decoder="fouriernet", images_seen=1280)},
    "siren": {"engine": replace(SHORT, decoder="siren", images_seen=1280)},
    "positional": {"engine": replace(SHORT, decoder="positional")},
    "plain": {"engine": replace(SHORT, loss="l2", symmetric=False, reverse=0, reweighted=False)},
    "halves": {"engine": SHORT, "halves": "independent"},
    "read": {"engine": SHORT, "subset": 40, "assign": "read", "keep": "disk"},
    "unfinished": {"engine": replace(SHORT, finish=False)},
}


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures", "coarse_alignment")
@pytest.mark.parametrize("case", RMFN)
def test_engine_rmfn_runs_on_a_device_with_any_options(few, tmp_path, case):
    assert np.isfinite(job(few, tmp_path / "there", **RMFN[case])).all()


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures", "coarse_alignment")
@pytest.mark.parametrize("case", AMORTIZED)
def test_engine_amortized_runs_on_a_device_with_any_options(few, tmp_path, case):
    assert np.isfinite(job(few, tmp_path / "there", **AMORTIZED[case])).all()


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_cropped_images_of_several_groups_give_the_map_of_the_cpu(motley, tmp_path, keep):
    """Some of them bright, and half of them without fine detail; inside a mask, from a map."""
    corner, start = np.ones((BOX,) * 3, np.float32), motley.parent / "start.mrc"
    corner[:4, :4, :4] = 0
    write_map(motley.parent / "mask.mrc", corner, PIXEL_SIZE_ANGST)
    write_map(start, read_map(motley.parent / "map.mrc").data, PIXEL_SIZE_ANGST)
    options = {"box": 20, "keep": keep, "mask": motley.parent / "mask.mrc", "init_map": start}
    there = job(motley, tmp_path / "there", engine=TINY, **options)
    abinitio(motley, tmp_path / "here", AbinitioOptions(engine=TINY, **options), QUIET)
    assert "brighter than the others" in (tmp_path / "there" / "run.log").read_text()
    here = read_map(tmp_path / "here" / "initial_model.mrc").data
    assert correlation(there, here) > 0.999


MOMENTS = [
    ("steerable", {"volume": "grid"}),
    ("steerable", {"volume": "fouriernet", "third_radius": 0}),
    ("steerable", {"density": "free"}),
    ("steerable", {"density": "encoder"}),
    ("full", {"volume": "rmfn"}),
    ("full", {"density": "free"}),
    ("full", {"density": "encoder"}),
]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures", "coarse_alignment")
@pytest.mark.parametrize(("form", "options"), MOMENTS, ids=str)
def test_moments_are_fitted_on_a_device_with_any_model(few, tmp_path, form, options):
    engine = MomentFitConfig(
        starts=2,
        iterations=2,
        settling=2,
        first_iterations=2,
        radius=3,
        beads=8,
        width=8,
        **options,
    )
    wanted = MomentsOptions(form=form, max_radius=4, device="meta")
    solve = MomentReconstructOptions(engine, allow_ambiguous=True, device="meta")
    with pretended_device():
        abinitio_moments(few, tmp_path / "there", wanted, solve, QUIET)
    assert np.isfinite(read_map(tmp_path / "there" / "initial_model.mrc").data).all()


class Killed(BaseException):
    """In place of SIGKILL: nothing in the program handles it."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*to a meta parameter")  # It is none, and takes the numbers.
@pytest.mark.usefixtures("no_pictures", "coarse_alignment")
@pytest.mark.parametrize("engine", [replace(HARD, update_scale=True), SHORT], ids=["rmfn", "amor"])
@pytest.mark.parametrize("places", [("meta", "meta"), ("cpu", "meta"), ("meta", "cpu")])
def test_a_job_goes_on_from_each_state_on_a_device(few, tmp_path, monkeypatch, engine, places):
    """Where it began on another, too; states lie on the CPU."""
    put, stops = checkpoint.Checkpoint.put, iter((2, 3, 4, 4, 4))
    left = next(stops)

    def dying(self, part, pack, *, force=False, hold=False):
        nonlocal left
        put(self, part, pack, force=force, hold=hold)
        left -= 1
        if left == 0:
            raise Killed

    # As a GPU, which the optimiser of a state that the CPU wrote is made for.
    fused = "_get_fused_kernels_supported_devices"
    monkeypatch.setattr(
        sys.modules["torch.optim.optimizer"], fused, lambda: ["cpu", "cuda", "meta"]
    )
    for name in ("_EVERY_S", "_TIMES_ITS_COST"):
        monkeypatch.setattr(checkpoint, name, 0.0)
    monkeypatch.setattr(checkpoint.Checkpoint, "put", dying)
    ended, number = False, 0
    while not ended:
        place = places[min(number, 1)]
        options = AbinitioOptions(device=place, engine=engine)
        try:
            with pretended_device():
                abinitio(few, tmp_path / "job", options, QUIET, resume=number > 0)
            ended = True
        except Killed:
            left, number = next(stops, -1), number + 1
    assert number > 1
    assert (tmp_path / "job" / "initial_model.mrc").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_job_of_a_gpu_says_so_where_there_is_none(few, tmp_path):
    """It goes on on another machine; the device is what its record says."""
    engine = MomentFitConfig(starts=2, iterations=2, settling=2, first_iterations=2, radius=3)
    solve = MomentReconstructOptions(engine, allow_ambiguous=True, device="cuda:7")
    wanted = MomentsOptions(max_radius=4, device="cuda:7")
    with pytest.raises(CryoreconError, match="--device cuda:7 cannot be used"):
        abinitio_moments(few, tmp_path / "job", wanted, solve, QUIET)
    assert not (tmp_path / "job").exists()


def waited(waits: Counter[str], lines: str) -> int:
    return sum(n for line, n in waits.items() if re.match(lines, line))


def test_a_mini_batch_hardly_waits_for_a_device(few):
    """A search: for how many poses there are, and for what it tells. A training: for that."""
    with pretended_device() as waits:
        images = load_observations(read_particles(few), 0.8, device=DEVICE)
        config = replace(TINY, diameter=0.8)
        run = Search(config, images.whole(4.0), torch.Generator().manual_seed(0))
        run.step(torch.arange(20), 1.0)
        waits.clear()
        operations.clear()
        run.step(torch.arange(20, 40), 1.0)
        assert sum(waits.values()) <= 3, waits
        # As docs/scaling.md has them, where a GPU's optimiser takes two for all parameters.
        assert operations.total() < 750
        train = Amortized(SHORT, images, 3.84, torch.Generator().manual_seed(0))
        train.step()
        waits.clear()
        operations.clear()
        train.step()
        assert operations.total() < 1050
        assert waited(waits, r"(?!.*stream)") <= 1, waits


def test_a_grid_of_rotations_is_taken_to_a_device_once(few, monkeypatch):
    """Of every block of images it would take the CPU longer than all else."""
    monkeypatch.setattr(reconstruction, "TURNED_TOGETHER", 10)
    grids = r".* (rotations|so3_grid_on)$"
    with pretended_device() as waits:
        images = load_observations(read_particles(few), 0.8, device=DEVICE)
        config, generator = RefineConfig(search_nside=2), torch.Generator().manual_seed(0)
        volume = torch.randn(20, 20, 20, generator=generator).to(DEVICE)
        grid = telling_grid(images, volume, config, 5.0)
        half = torch.arange(60) % 2
        state = assign(volume, Support(0.4), images, half, config, grid, generator)
        assert waited(waits, grids) <= 2, waits
        state.fsc = torch.ones(11)
        state.halves = [volume, volume]
        reassign(state, images, config, fsc_curve, generator)
        assert waited(waits, grids) <= 4, waits


TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# The command on the pretended device, as several processes on a GPU each.
SCRIPT = """
import functools, sys
from pretended_device import pretended_device
from cryorecon.cli.main import main
from cryorecon.maps import align
from cryorecon.run import abinitio, independent_halves, load

abinitio.report_at_end = lambda *_: None
align._GRID_NSIDE = 3
fewer = functools.partial(independent_halves.chance_fsc, n_trials=1)
independent_halves.chance_fsc = fewer
load.free_memory = lambda _: 1e9
with pretended_device():
    main()
"""
SMALL = ("search_nside=1", "half_rounds=2", "joint_rounds=1")
SEARCH = ("search_images=30", "temperatures=[5.0,1.0]", "final_steps=2", "width=16", "n_starts=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "settings", "more"),
    [
        ("abinitio-rmfn", SEARCH, ["--halves", "independent"]),
        ("abinitio-rmfn", SEARCH, ["--images", "disk"]),
        ("abinitio-amortized", ("images_seen=192",), []),
    ],
    ids=["halves", "disk", "amortized"],
)
def test_processes_exchange_what_lies_on_devices(few, tmp_path, command, settings, more):
    chosen = [word for pair in (*SMALL, *settings) for word in ("--set", pair)]
    two_processes(tmp_path, [command, few, "-o", tmp_path / "job", *more, *chosen])
    assert (tmp_path / "job" / "initial_model.mrc").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["steerable", "full"])
def test_processes_exchange_moments_that_lie_on_devices(few, tmp_path, form):
    moments, small = tmp_path / "moments.h5", ("radius=3", "iterations=2", "settling=2", "beads=8")
    chosen = [word for pair in (*small, "starts=3") for word in ("--set", pair)]
    radius = ["--form", form, "--max-radius", "4"]
    two_processes(tmp_path, ["moments", "estimate", few, "-o", moments, *radius])
    words = ["moments", "reconstruct", moments, "-o", tmp_path / "job", "--allow-ambiguous"]
    two_processes(tmp_path, [*words, *chosen])
    assert (tmp_path / "job" / "initial_model.mrc").exists()


def two_processes(tmp_path, words):
    """Run a command on two devices."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *TWO, str(script), *map(str, words), "--device", "meta"],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
