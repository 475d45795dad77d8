"""The noise that the search judges images by: the power of what its map leaves unexplained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cryorecon.engines.observations import Observations
from cryorecon.engines.rmfn import RmfnConfig, Search, excess_power
from cryorecon.engines.search import grid_expectation
from cryorecon.physics.fourier import half_plane

POWER = (3.0, 0.5)


@pytest.fixture
def noise():
    """300 images of pure noise, of two optics groups."""
    generator = torch.Generator().manual_seed(5)
    plane, n = half_plane(16).within(6.0), 300
    group = torch.arange(n) % 2
    power = torch.tensor(POWER)[:, None].expand(2, plane.n_shells).clone()
    std = (power[:, plane.shell][group] / 2).sqrt()
    parts = torch.randn(2, n, len(plane), generator=generator) * std
    ctf = torch.randn(n, len(plane), generator=generator)
    return Observations(plane, torch.complex(*parts), ctf, power, group)


def test_pure_noise_has_the_power_of_the_noise(noise):
    # The coefficient at zero frequency is real in true images; elsewhere both parts are noise.
    torch.testing.assert_close(excess_power(noise)[1:], torch.ones(6), atol=0.1, rtol=0)
    strong = noise.with_coefficients(noise.coefficients * 2)
    torch.testing.assert_close(excess_power(strong), 4 * excess_power(noise))


def test_what_the_sums_leave_is_the_residual(noise):
    """With one pose to choose from, the sums of the search give each shell's residual power."""
    generator = torch.Generator().manual_seed(6)
    template = torch.randn(1, len(noise.plane), dtype=torch.complex64, generator=generator)
    _, signal, weight = grid_expectation(noise, template, torch.zeros(1, 2))
    explained = (2 * (signal.conj() * template).real - weight * template.abs() ** 2).sum(0)
    rest = noise.with_coefficients(noise.coefficients - noise.ctf * template)
    torch.testing.assert_close(
        excess_power(noise, explained), excess_power(rest), rtol=1e-4, atol=1e-4
    )


def test_a_search_hears_quiet_shells_under_loud_ones(noise):
    """The loud shell's excess is above 1 at first, and never below it where there is no signal."""
    loud = torch.where(noise.plane.shell == 1, 5.0, 1.0)
    observations = noise.with_coefficients(noise.coefficients * loud)
    config = RmfnConfig(search_nside=1, width=8, volume="grid", offset_range=0.0)
    search = Search(replace(config, search_cycles=3.0), observations, torch.Generator())
    assert search.excess[1] > 20
    assert (search.excess[2:] < 1.2).all()
    search.step(torch.arange(100), 1.0)
    assert (search.excess >= 1).all()
    again = Search(replace(config, search_cycles=3.0), observations, torch.Generator())
    again.load(search.state())
    torch.testing.assert_close(again.excess, search.excess)
