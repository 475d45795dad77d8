"""Whole jobs on a device that is only pretended: no tensor of the CPU meets one of the device."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import MODEL
from pretended_device import DEVICE, OnDevice, pretended_device
from rich.console import Console

from cryorecon.engines.amortized import AmortizedConfig
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.io.mrc import read_map
from cryorecon.run import abinitio as abinitio_module
from cryorecon.run import stages
from cryorecon.run.abinitio import AbinitioOptions, abinitio
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig

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
    update_scale=True,
)
SHORT = AmortizedConfig(images_seen=192, search_nside=1, half_rounds=2, joint_rounds=1)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """60 particles, 20 px at 4 A, SNR 2."""
    folder = tmp_path_factory.mktemp("few")
    config = SimulateConfig(n_particles=60, box=20, pixel_size_angst=4.0, snr=2.0, seed=4)
    simulate(MODEL, folder, config)
    return folder / "particles.star"


def test_the_pretended_device_refuses_what_a_gpu_refuses():
    with pretended_device() as waits:
        there, here = torch.arange(6.0, device=DEVICE), torch.arange(6.0)
        assert isinstance(there, OnDevice)
        assert (there * 2 + torch.tensor(1.0)).tolist() == [1, 3, 5, 7, 9, 11]
        assert (there.to("cpu") + here).tolist() == [0, 2, 4, 6, 8, 10]
        for mix in (
            lambda: there + here,
            lambda: here + there.sum(),
            lambda: there[torch.tensor([1])],
            lambda: torch.cat([there, here]),
            lambda: there.index_add_(0, torch.tensor([1]), there[:1]),
        ):
            with pytest.raises(RuntimeError, match="of the CPU among"):
                mix()
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        weight = torch.nn.Linear(6, 1).to(DEVICE)
        weight(there).sum().backward()
        assert isinstance(weight.weight.grad, OnDevice)
    assert not waits  # of the program; these lines are of a test


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Reports are drawn on the CPU, from files."""
    monkeypatch.setattr(abinitio_module, "report_at_end", lambda *_: None)


def job(star, folder, **options):
    with pretended_device() as waits:
        abinitio(star, folder, AbinitioOptions(device="meta", **options), QUIET)
    return waits


# What each image, step or batch goes through: not to wait for a device there.
LOOPS = ("engines/accumulate", "engines/refine", "engines/pose_reader", "physics/fourier")
LOOPS += ("physics/projection", "physics/rotations", "networks/")


@pytest.mark.usefixtures("no_pictures")
def test_engine_rmfn_runs_on_a_device(few, tmp_path):
    """To the map of the CPU, and without waiting for the device in inner loops."""
    waits = job(few, tmp_path / "there", engine=TINY)
    abinitio(few, tmp_path / "here", AbinitioOptions(engine=TINY), QUIET)
    there, here = (read_map(tmp_path / f / "initial_model.mrc").data for f in ("there", "here"))
    assert np.corrcoef(there.ravel(), here.ravel())[0, 1] > 0.9999
    assert waits
    assert not [line for line in waits if line.startswith(LOOPS)]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures", "coarse_alignment")
@pytest.mark.parametrize(
    "options",
    [
        {"halves": "independent", "engine": replace(TINY, volume="grid")},
        {"symmetry": "C2", "subset": 40, "engine": TINY},
        {"engine": SHORT},
    ],
    ids=["halves", "symmetry", "amortized"],
)
def test_the_other_ways_run_on_a_device(few, tmp_path, options, monkeypatch):
    monkeypatch.setattr(stages, "chance_fsc", partial(stages.chance_fsc, n_trials=1))
    waits = job(few, tmp_path / "there", **options)
    assert (tmp_path / "there" / "initial_model.mrc").exists()
    assert not [line for line in waits if line.startswith(LOOPS)]
