"""Images without power in some shells: filtered, or rescaled from larger pixels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import at_true_poses, simulated

from cryorecon.engines.reconstruction import RefineConfig
from cryorecon.engines.rounds import refine_round
from cryorecon.io.mrc import open_stack, read_map, stack_writer
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star, write_star
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.rotations import geodesic_distance_deg
from cryorecon.run.empty_shells import empty_shells, empty_text
from cryorecon.run.load import load_observations

BOX, PIXEL_SIZE_ANGST, LAST = 32, 2.4, 10


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("stack"), 600, BOX, 0.3)


@pytest.fixture
def filtered(stack, tmp_path):
    """The stack as two optics groups; images of some rows hold nothing beyond a shell."""

    def write(rows, last=LAST, first=0.0):
        images = np.array(open_stack(stack / "particles.mrcs"))
        k = np.fft.fftfreq(BOX, 1 / BOX)
        radius = np.hypot(k[:, None], k)
        passed = (radius <= last) & (radius >= first)
        images[rows] = np.fft.ifft2(np.fft.fft2(images[rows]) * passed).real
        with stack_writer(tmp_path / "filtered.mrcs", BOX, PIXEL_SIZE_ANGST) as written:
            written.append(images)
        tables = read_star(stack / "particles.star")
        optics = pd.concat([tables["optics"]] * 2, ignore_index=True)
        names = tables["particles"]["rlnImageName"].str.partition("@")[0] + "@filtered.mrcs"
        group = np.where(np.arange(600) % 2 == 1, "2", "1")
        particles = tables["particles"].assign(rlnImageName=names, rlnOpticsGroup=group)
        optics = optics.assign(rlnOpticsGroup=["1", "2"])
        write_star(tmp_path / "particles.star", {"optics": optics, "particles": particles})
        return tmp_path

    return write


def refined(folder, rows=slice(None)):
    """Images, state, its error of poses and last report, after rounds from the true poses."""
    images, state = at_true_poses(folder, RefineConfig())
    images, chosen = images.apart(torch.arange(600)[rows]), torch.arange(600)[rows]
    state.rotations, state.offsets_px = state.rotations[chosen], state.offsets_px[chosen]
    state.half, state.band = torch.arange(len(chosen)) // 2 % 2, 8.0
    state.log_likelihood = state.log_likelihood[chosen]
    truth = state.rotations.clone()
    refine_round(state, images, RefineConfig(), fsc_curve, joint=False, n_steps=0)
    for _ in range(4):
        report = refine_round(state, images, RefineConfig(), fsc_curve, joint=False)
    return state, float(geodesic_distance_deg(state.rotations, truth).median()), report


def test_rounds_go_no_further_than_images_show_anything(stack, filtered):
    as_recorded = refined(stack)[1]
    _, error, report = refined(filtered(slice(None)))
    assert error < 1.6 * as_recorded
    assert report.log_likelihood > 0
    assert LAST - 1 <= report.agreement_band <= LAST + 1


def test_images_that_show_less_take_nothing_from_those_that_show_more(stack, filtered):
    folder = filtered(slice(1, None, 2))
    truth = torch.from_numpy(read_map(stack / "map.mrc").data)
    found = []
    for rows in (slice(0, None, 2), slice(None)):
        state = refined(folder, rows)[0]
        curve = fsc_curve((state.maps[0] + state.maps[1]) / 2, truth)
        found.append((float(curve[5:10].mean()), float(curve[LAST + 1 : 14].mean())))
    (low, high), (low_of_all, high_of_all) = found
    assert low_of_all > low
    assert high_of_all > 0.95 * high > 0.5


@pytest.mark.parametrize(
    ("rows", "limits", "text"),
    [
        (slice(0, 0), {}, []),
        (slice(None), {}, ["600 of 600 images show nothing beyond 7.7 A: left out"]),
        (slice(1, None, 2), {}, ["300 of 600 images show nothing beyond 7.7 A: left out"]),
        (
            slice(None),
            {"last": 99, "first": 1.45},
            ["600 of 600 images show nothing at 76.8 A: left out"],
        ),
    ],
)
def test_what_is_left_out_is_told(filtered, rows, limits, text):
    images = load_observations(read_particles(filtered(rows, **limits) / "particles.star"), 0.8)
    assert empty_text(images, PIXEL_SIZE_ANGST) == text


def test_memory_and_disk_give_the_same(filtered):
    particles = read_particles(filtered(slice(1, None, 2)) / "particles.star")
    held, read = (load_observations(particles, 0.8, keep=keep) for keep in ("memory", "disk"))
    rows = torch.tensor([0, 1, 599, 4])
    for one, other in zip(held.source(rows, 300), read.source(rows, 300), strict=True):
        assert torch.equal(one, other)
    beyond = held.plane.radius[:300] > LAST + 0.5
    gain = held.source(rows, 300)[1]
    assert (gain[1:3, beyond] == 0).all()
    assert (gain[[0, 3]][:, beyond] != 0).float().mean() > 0.99


def test_ordinary_spectra_have_no_empty_shell():
    shells = torch.arange(64.0)
    detector = (1 + (shells / 20) ** 2) ** -1.5
    ice = 100 * torch.exp(-shells / 4) + 1
    assert empty_shells(torch.stack([detector, ice, torch.zeros(64)])) is None
    upsampled = torch.where(shells < 22, 1.0, 1e-9)
    assert empty_shells(upsampled[None])[0].tolist() == (shells >= 22).tolist()
