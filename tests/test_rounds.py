"""A round of refinement reads every image once, whatever set it belongs to, and in any batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cryorecon.engines import rounds
from cryorecon.engines.reconstruction import RefineConfig, assign, telling_grid
from cryorecon.engines.rounds import refine_round, renew_maps
from cryorecon.engines.shrinking import ShrinkingBatch
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.masks import Support
from cryorecon.run.load import load_observations

N = 90
HALVES = {
    "mixed": torch.arange(N) % 2,
    "in blocks": (torch.arange(N) >= N // 2).long(),
    "a few": (torch.arange(N) >= N - 3).long(),
}


@pytest.fixture(scope="module")
def observed(stack_32):
    particles = read_particles(stack_32 / "particles.star")
    truth = torch.from_numpy(read_map(stack_32 / "map.mrc").data)
    config = RefineConfig(search_nside=2)
    images = load_observations(particles, config.diameter).apart(torch.arange(N))
    return images, truth, config


def _state(observed, half):
    images, truth, config = observed
    generator = torch.Generator().manual_seed(0)
    grid = telling_grid(images, truth, config, config.assign_band(truth.shape[-1]))
    return assign(truth, Support(config.diameter / 2), images, half, config, grid, generator)


def test_images_of_noise_are_less_likely_than_empty_ones(observed):
    """Ten of them among ninety; the others tell the particle, each by itself."""
    images, _, config = observed
    empty = torch.arange(10)
    level = images.noise_power[:, images.plane.shell]

    def source(rows, count):
        coefficients, ctf = images.source(rows, count)
        noise = torch.randn(coefficients.shape, dtype=torch.complex64, generator=generator)
        noise = noise * level[images.group[rows], :count].sqrt()
        return torch.where((rows < len(empty))[:, None], noise, coefficients), ctf

    generator = torch.Generator().manual_seed(1)
    state = _state(observed, HALVES["mixed"])
    refine_round(state, replace(images, source=source), config, fsc_curve, joint=False)
    told = state.log_likelihood
    assert told.shape == (N,)
    assert float(told[10:].min()) > 0
    assert float(told[:10].max()) < float(told[10:].quantile(0.05)) / 2


def _round(observed, half, joint, **changes):
    """State after a round, and which images were read, piece by piece."""
    images, _, config = observed
    read: list[torch.Tensor] = []

    def source(rows, count):
        read.append(rows)
        return images.source(rows, count)

    state = _state(observed, half)
    copy = replace(images.apart(torch.arange(N)), source=source, **changes)
    refine_round(state, copy, config, fsc_curve, joint=joint, n_steps=2)
    return state, read


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_each_image_is_read_once_and_batches_do_not_matter(observed, half, joint, monkeypatch):
    whole, read = _round(observed, half, joint)
    assert torch.equal(torch.cat(read), torch.arange(N))
    seen = []

    def refine(batch, *args, **kwargs):
        seen.append(len(batch))
        return rounds_refine(batch, *args, **kwargs)

    rounds_refine = rounds.refine_poses
    monkeypatch.setattr(rounds, "refine_poses", refine)
    monkeypatch.setattr(rounds, "image_batches", lambda *_: ShrinkingBatch(7))
    small, read = _round(observed, half, joint)
    assert [len(rows) for rows in read] == [14] * 6 + [6]
    assert max(seen) == 7
    assert sum(seen) == N
    torch.testing.assert_close(small.rotations, whole.rotations, atol=1e-4, rtol=0)
    torch.testing.assert_close(small.fsc, whole.fsc, atol=1e-4, rtol=0)
    for one, other in zip(small.maps, whole.maps, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_maps_from_poses_are_those_of_a_round_that_moves_none(observed, half, monkeypatch):
    """With what images may have for other poses; likelihoods are not asked for."""
    images, _, config = observed
    before, state = (_state(observed, half) for _ in range(2))
    for held in (before, state):
        held.rivals.rotations[:, 0] = held.rotations.flip(0)
        held.rivals.share[::3, 0] = 0.25
    refine_round(before, images, config, fsc_curve, joint=False, n_steps=0)
    likelihoods, band = state.log_likelihood.clone(), state.band
    monkeypatch.setattr(rounds, "image_batches", lambda *_: ShrinkingBatch(7))
    renew_maps(state, images, fsc_curve)
    torch.testing.assert_close(state.fsc, before.fsc, rtol=0, atol=1e-5)
    for mine, other in zip(state.maps + state.halves, before.maps + before.halves, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4 * float(other.abs().max()))
    assert (state.log_likelihood == likelihoods).all()
    assert state.band == band


def test_images_are_read_in_the_order_of_the_file(observed, generator):
    half = HALVES["mixed"]
    place = torch.randperm(N, generator=generator)
    plain, _ = _round(observed, half, False)
    state, read = _round(observed, half, False, place=place.int())
    assert torch.equal(place[torch.cat(read)], torch.arange(N))
    torch.testing.assert_close(state.rotations, plain.rotations, atol=1e-4, rtol=0)


def test_each_half_set_is_held_against_its_own_map(observed):
    """An empty second map leaves that half set's poses alone, and no others."""
    images, truth, config = observed
    half = HALVES["mixed"]
    state = _state(observed, half)
    state.maps = torch.stack([truth, torch.zeros_like(truth)])
    before = state.rotations.clone()
    refine_round(state, images.apart(torch.arange(N)), config, fsc_curve, joint=False, n_steps=2)
    moved = (state.rotations - before).abs().amax((1, 2)) > 1e-6
    assert moved[half == 0].float().mean() > 0.9
    assert not moved[half == 1].any()


def test_an_optics_group_for_every_image_changes_nothing(observed):
    """A map that follows a few images leaves less unexplained of them from round to round."""
    images, _, config = observed
    found = []
    for groups in (1, N):
        group = (torch.arange(N) % groups).int()
        noise = images.noise_power[:1].expand(groups, -1).clone()
        split = replace(images, group=group, noise_power=noise)
        state = _state((split, observed[1], config), HALVES["mixed"])
        for _ in range(4):
            told = refine_round(state, split, config, fsc_curve, joint=False)
        found.append((split.noise_power, told.log_likelihood))
    (whole, likelihood), (apart, other) = found
    assert float((apart / whole - 1).abs().max()) < 0.1
    assert other == pytest.approx(likelihood, rel=0.03)
