"""Which grid of poses images are compared with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import simulated

from cryorecon.conventions import euler_to_matrix
from cryorecon.engines.reconstruction import (
    PoseGrid,
    grid_poses,
    offsets_for,
    outline_offsets,
    telling_grid,
)
from cryorecon.engines.rmfn import RmfnConfig, scaled_to_images
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.physics.rotations import geodesic_distance_deg
from cryorecon.physics.symmetry import symmetry_group
from cryorecon.run.load import load_observations

BOX, COUNT = 32, 60
CONFIG = RmfnConfig(search_nside=3)
COARSE, FINER, FINEST = (PoseGrid(band, 4) for band in (CONFIG.assign_band(BOX), 8, 10))


def observed(folder, snr):
    folder = simulated(folder / "stack", COUNT, BOX, snr)
    particles = read_particles(folder / "particles.star")
    images = load_observations(particles, CONFIG.diameter)
    truth = torch.from_numpy(read_map(folder / "map.mrc").data)
    return images, scaled_to_images(truth, images, CONFIG), particles


@pytest.mark.parametrize(
    ("snr", "limit", "wanted"),
    [(1.0, 16.0, COARSE), (0.01, 8.0, FINER), (0.01, 7.5, COARSE), (0.01, 10.0, FINEST)],
    ids=["told apart", "not by the coarse one", "map says no more", "not by the finer one either"],
)
def test_the_finer_grid_is_for_images_that_leave_many_poses(tmp_path, snr, limit, wanted):
    images, truth, _ = observed(tmp_path, snr)
    found = telling_grid(images, truth, CONFIG, limit)
    assert (found.band, found.nside) == (wanted.band, wanted.nside)


def test_images_that_are_not_finite_are_left_to_the_round_that_names_them(tmp_path):
    images, truth, _ = observed(tmp_path, 1.0)
    source = images.source

    def broken(rows, count):
        coefficients, ctf = source(rows, count)
        return coefficients * torch.where(rows == 0, torch.nan, 1.0)[:, None], ctf

    images = replace(images, source=broken)
    assert telling_grid(images, truth, CONFIG, 16.0).candidates > 0


def test_the_more_poses_are_likely_the_more_are_tried(tmp_path):
    tried = [
        telling_grid(*observed(tmp_path / f"{snr}", snr)[:2], CONFIG, 5.0).candidates
        for snr in (1.0, 0.1, 0.01)
    ]
    assert tried == sorted(tried)
    assert tried[0] == 24
    assert tried[-1] == 200


@pytest.mark.parametrize(("name", "nside"), [("C1", 4), ("D2", 5), ("O", 6), ("I", 7)])
def test_a_symmetric_map_is_searched_on_a_finer_grid(tmp_path, name, nside):
    """Of which one of all equal poses is tried: details are alike within a few degrees."""
    images, truth, _ = observed(tmp_path, 1.0)
    found = telling_grid(images, truth, CONFIG, 16.0, symmetry_group(name))
    assert found.nside == nside
    turn = torch.eye(3)
    assert (
        len(found.rotations(turn))
        < len(telling_grid(images, truth, CONFIG, 16.0).rotations(turn)) * 1.1
    )
    coarse = telling_grid(images, truth, CONFIG, CONFIG.assign_band(BOX), symmetry_group(name))
    assert coarse.nside == 4


@pytest.mark.parametrize("chosen", [COARSE, FINER])
def test_poses_come_from_the_chosen_grid(tmp_path, chosen):
    images, truth, particles = observed(tmp_path, 1.0)
    generator = torch.Generator().manual_seed(0)
    found = list(grid_poses(images, truth, CONFIG, chosen, generator, None, count=3))
    rotations = torch.cat([each[1] for each in found])
    assert rotations.shape == (COUNT, 3, 3, 3)
    known = euler_to_matrix(torch.from_numpy(particles.euler_deg())).float()
    away = geodesic_distance_deg(rotations[:, 0], known)
    # Rotations of the grid are 15 degrees apart.
    assert away.median() < 15


@pytest.mark.parametrize(("snr", "most"), [(1.0, 0.5), (0.1, 0.8), (0.02, 1.0)])
def test_few_offsets_are_left_by_half_of_the_detail(tmp_path, snr, most):
    """The true one is among them; the noisier the images, the more there are."""
    images, truth, particles = observed(tmp_path, snr)
    batch = images.select(torch.arange(COUNT), 10)
    shifts = offsets_for(CONFIG, BOX, 10)
    assert len(shifts) > 60
    likely = outline_offsets(batch, truth, CONFIG, torch.eye(3), shifts)
    true = torch.from_numpy(particles.origins_angst() / particles.pixel_size_angst).float()
    nearest = torch.cdist(true, shifts).argmin(-1)
    assert likely[torch.arange(COUNT), nearest].float().mean() > 0.97
    assert likely.float().mean() < most
    few = offsets_for(CONFIG, BOX, 4)
    assert outline_offsets(batch.within(4), truth, CONFIG, torch.eye(3), few).all()
