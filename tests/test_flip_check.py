"""Phases that were flipped without a word are noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import MODEL, at_true_poses

from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.io.particles import read_particles
from cryorecon.run.flip_check import look_flipped
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig

BOX, PIXEL_ANGST = 32, 2.4
CONFIG = RmfnConfig(diameter=0.8)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Images whose CTF changes its sign several times, at their true poses, and these."""
    folder = tmp_path_factory.mktemp("stack")
    settings = SimulateConfig(
        n_particles=400, box=BOX, pixel_size_angst=PIXEL_ANGST, snr=0.3,
        defocus_min_angst=10000.0, defocus_max_angst=25000.0,
    )  # fmt: skip
    simulate(MODEL, folder, settings)
    assert read_particles(folder / "particles.star").box == BOX
    images, state = at_true_poses(folder, CONFIG)
    # Of a job whose half maps ended early.
    state.fsc = torch.linspace(1.0, -1.0, BOX // 2 + 1, dtype=torch.float64)
    return images, state


def flipped(images):
    """As a program leaves them that multiplies by the sign of the CTF."""

    def source(rows, count):
        coefficients, ctf = images.source(rows, count)
        return coefficients * ctf.sign(), ctf

    return replace(images, source=source)


def test_flipped_phases_are_told_from_recorded_ones(recorded):
    images, state = recorded
    before = state.rotations.clone(), images.noise_power.clone()
    assert look_flipped(flipped(images), state, CONFIG)
    assert not look_flipped(images, state, CONFIG)
    assert torch.equal(state.rotations, before[0])
    assert torch.equal(images.noise_power, before[1])


def test_black_particles_are_not_flipped_ones(recorded):
    images, state = recorded
    gain = -images.gain
    assert not look_flipped(replace(images, gain=gain), state, CONFIG)


def test_half_maps_that_agree_far_are_not_asked(recorded, monkeypatch):
    images, state = recorded
    monkeypatch.setattr("cryorecon.run.flip_check._agreement", lambda *_: pytest.fail("asked"))
    right = replace(state, fsc=torch.ones(BOX // 2 + 1, dtype=torch.float64))
    assert not look_flipped(images, right, CONFIG)
