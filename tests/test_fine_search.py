"""The search's end at a higher band, from a map between the two hands."""

from __future__ import annotations

import pytest
import torch
from conftest import simulated

from cryorecon.engines.fine_search import FineSearch
from cryorecon.engines.rmfn import RmfnConfig, scaled_to_images
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.fourier import lowpass
from cryorecon.run.load import load_observations

BOX, COUNT = 24, 400
CONFIG = RmfnConfig(diameter=0.8, search_nside=3, search_batch=40)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = simulated(tmp_path_factory.mktemp("fine") / "stack", COUNT, BOX, 0.3)
    images = load_observations(read_particles(folder / "particles.star"), CONFIG.diameter)
    found = read_map(folder / "map.mrc")
    return images, torch.from_numpy(found.data), found.pixel_size_angst


def begun(stack, start):
    images = stack[0]
    observations = images.whole(CONFIG.fine_band(BOX))
    shells = torch.ones(CONFIG.search_band(BOX) + 1)
    generator = torch.Generator().manual_seed(0)
    return FineSearch(CONFIG, observations, generator, start=start, unexplained=2 * shells)


def agreement(stack, volume):
    """FSC with the truth of either hand, by shell."""
    truth, pixel = stack[1:]
    moved = apply_alignment(volume, align_maps(volume, truth, pixel))
    return fsc_curve(moved, truth)


def test_a_map_between_the_hands_falls_to_one_side(stack):
    images, truth, pixel = stack
    band = CONFIG.search_band(BOX)
    other = truth.flip(0)
    other = apply_alignment(other, align_maps(other, truth, pixel, both_hands=False))
    between = scaled_to_images(lowpass((truth + other) / 2, float(band), 2), images, CONFIG)
    search = begun(stack, between)
    assert not search.settled
    for _ in range(8):
        for rows in search.batches():
            search.step(rows, 1.0)
        search.end_epoch()
    before, after = agreement(stack, between), agreement(stack, search.network.volume(0, BOX))
    last = CONFIG.fine_band(BOX)
    assert last > band
    assert (after[band:last] > before[band:last] + 0.1).all()


def test_a_search_has_settled_when_its_evidence_no_longer_rises(stack):
    search = begun(stack, scaled_to_images(stack[1], stack[0], CONFIG))
    told = []
    for value in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 3.5, 3.5, 3.55):
        search._course.append(value)
        told.append(search.settled)
    assert told == [False] * 7 + [False, True]


def test_the_first_epoch_only_gathers(stack):
    images, truth, _ = stack
    start = scaled_to_images(truth, images, CONFIG)
    search = begun(stack, start)
    before = search.network.volume(0)
    torch.testing.assert_close(
        search.excess[: CONFIG.search_band(BOX) + 1].unique(), torch.tensor([2.0])
    )
    batches = search.batches()
    for rows in batches:
        search.step(rows, 1.0)
    assert torch.equal(search.network.volume(0), before)
    whole = search.sums.weight.sum()
    search.end_epoch()
    assert not torch.equal(search.network.volume(0), before)
    # As much as sums hold that forget a tenth at each of ten batches.
    assert len(batches) == 10
    torch.testing.assert_close(search.sums.weight.sum(), whole)
    search.step(batches[0], 1.0)
    torch.testing.assert_close(search.sums.weight.sum(), whole, rtol=0.02, atol=0)
