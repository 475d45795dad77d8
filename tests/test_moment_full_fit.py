"""Fits of moments over Fourier pixels, where in-plane angles have a density of their own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cryorecon.conventions import euler_to_matrix
from cryorecon.engines.moments.config import MomentFitConfig
from cryorecon.engines.moments.fit import Fitter, visible_radius
from cryorecon.engines.moments.forms import (
    FullMoments,
    MomentsGeometry,
    SteerableMoments,
    exact_moments,
)
from cryorecon.engines.moments.full_fit import FullTarget, FullViews, in_plane_departure
from cryorecon.engines.moments.models import Beads
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.sphere import frames, lebedev, real_harmonics

RADIUS = 4
# Of the particle's box: 1.25 diameters.
SIDE = 22.5
GEOMETRY = MomentsGeometry("full", 24, 1.0, 18.0, 24.0, RADIUS, 0)
CENTRES = torch.tensor([[4.0, 0.0, 1.0], [-3.0, 2.5, 0.0], [0.0, -3.0, -3.0]]).double()
MASSES, WIDTH = torch.tensor([1.0, 1.5, 2.0]).double(), 1.8


def density(rotations, in_plane):
    """Views mostly from one side; in-plane angles as well, by a smooth function on SO(3)."""
    towards = 1.5 * rotations[..., 2, 0] + rotations[..., 2, 1] ** 2
    return torch.exp(towards + in_plane * (rotations[..., 0, 0] + rotations[..., 1, 2]))


def every_view(in_plane, degree=23, n_angles=28):
    """Rotations over SO(3) with their probabilities, by Euler angles."""
    rule = lebedev(degree)
    x, y, z = rule.directions.unbind(-1)
    rot, tilt = torch.rad2deg(torch.atan2(y, x)), torch.rad2deg(torch.acos(z))
    psi = torch.arange(n_angles).double() * (360 / n_angles)
    angles = [rot[:, None] + 0 * psi, tilt[:, None] + 0 * psi, psi + 0 * rot[:, None]]
    rotations = euler_to_matrix(torch.stack(angles, -1)).flatten(0, 1)
    weights = rule.weights.repeat_interleave(n_angles) * density(rotations, in_plane)
    return rotations, weights / weights.sum()


def pixels_of(rotations, pixel, side):
    """Transforms of the Gaussians' projections at Fourier pixels, in closed form."""
    centres = rotations @ CENTRES.T
    points = pixel.double() / side
    phase = -2 * math.pi * torch.einsum("pi,rij->rpj", points, centres[:, :2])
    fall = torch.exp(-2 * (math.pi * WIDTH * points.norm(dim=-1)) ** 2)
    volume = MASSES * (2 * math.pi) ** 1.5 * WIDTH**3
    return fall * (volume * torch.polar(torch.ones_like(phase), phase)).sum(-1)


def exact(in_plane):
    pixel = GEOMETRY.plane().frequencies
    rotations, weights = every_view(in_plane)
    y = pixels_of(rotations, pixel, GEOMETRY.side_angst)
    weighted = y * weights[:, None]
    second = weighted.T @ y.conj()
    tiny, count = 1e-9 + torch.zeros(second.shape).double(), len(pixel)
    return FullMoments(
        GEOMETRY, 0, pixel, weighted.sum(0), second, weighted.T @ y, tiny[0], tiny,
        torch.zeros(count).double(), torch.ones(count, count, dtype=torch.bool), torch.ones(5),
    )  # fmt: skip


@pytest.fixture(scope="module")
def turned():
    """In-plane angles far from uniform."""
    return exact(1.0)


def true_beads():
    beads = Beads(3, 0.375, torch.Generator().manual_seed(0))
    with torch.no_grad():
        beads.centres.copy_(CENTRES / SIDE)
        beads.log_mass.copy_((MASSES * (2 * math.pi) ** 1.5 * WIDTH**3).log())
        beads.log_width.fill_(math.log(WIDTH / SIDE))
    return beads


def true_volume():
    axis = torch.arange(24.0) - 12
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    volume = torch.zeros(24, 24, 24)
    for mass, (a, b, c) in zip(MASSES, CENTRES, strict=True):
        squares = (x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2
        volume += mass * torch.exp(-squares / (2 * WIDTH**2))
    return volume


TRUTH = true_volume()


@pytest.mark.parametrize("in_plane", [0.0, 1.0])
def test_nodes_sum_to_the_moments_in_closed_form(in_plane):
    """Directions, antipodes and both half turns, against Euler angles without any symmetry."""
    given = exact(in_plane)
    target = FullTarget.of(given, RADIUS, 0.003)
    views = FullViews.over(target, 24, 6, 2)
    weights = views.log_weights.double().exp() * density(views.nodes, in_plane)
    one, other = (weights / weights.sum()).float().chunk(2)
    with torch.no_grad():
        found = views.moments(true_beads().harmonics(views), one, other)
    for mine, true in zip(found, (target.first, target.second, target.pseudo), strict=True):
        assert float((mine - true).norm() / true.norm()) < 5e-3
    # What the steerable form averages away is there.
    assert (float(target.first.imag.norm() / target.first.norm()) > 0.05) == (in_plane > 0)


def test_smooth_functions_are_orthonormal_and_order_0_is_the_direction_s(turned):
    views = FullViews.over(FullTarget.of(turned, RADIUS, 0.003), 24, 3, 2)
    f, weights = views.harmonics.double(), views.log_weights.double().exp()
    assert f.shape[1] == 3 * 3 + 5 * 5 + 7 * 5
    gram = (f * weights[:, None]).T @ f
    assert float((gram - torch.eye(len(gram))).abs().max()) < 1e-4
    linear = real_harmonics(1, views.directions)[:, 1:]
    assert float((f[:, :3] - linear).abs().max()) < 1e-5


def test_the_moments_have_the_gradients_of_finite_differences(turned, generator):
    target = FullTarget.of(turned, 3, 0.003)
    views = FullViews.over(target, 24, 1, 1)
    kept = 4 * views.even.shape[-1]
    views = replace(views, even=views.even.double(), odd=views.odd.double())
    shape = (4, len(target.grid.radii), target.grid.max_order + 1)
    harmonics = torch.randn(shape, generator=generator, dtype=torch.complex128)
    one, other = torch.rand(2, kept, generator=generator, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in (harmonics, one, other))
    assert torch.autograd.gradcheck(views.moments, inputs, fast_mode=True)


def fitted(fitter):
    """A start, its map on the images' grid turned onto the truth, and how far psi is uniform."""
    found = fitter.fit(torch.Generator().manual_seed(0))
    with torch.no_grad():
        volume = found.volume.on_grid(24, 24 / SIDE)
        seen = torch.cat(found.density.probabilities(fitter.views[-1]))
    return found, apply_alignment(volume, align_maps(volume, TRUTH, 1.0, finest_angst=5.0)), seen


@pytest.mark.slow
def test_a_start_finds_map_and_in_plane_angles(turned):
    """Without in-plane orders in the density the same moments cannot be explained."""
    config = MomentFitConfig(beads=12, iterations=160, settling=0, density_degree=4, radius=RADIUS)
    fitter = Fitter.of(turned, config, RADIUS)
    found, volume, seen = fitted(fitter)
    assert max(found.frobenius) < 0.02
    assert float(fsc_curve(volume, TRUTH)[1 : RADIUS + 1].min()) > 0.8
    assert in_plane_departure(seen, fitter.views[-1]) > 0.5
    over = found.density.over_uniform(lebedev(9).directions)
    assert float((over * lebedev(9).weights).sum()) == pytest.approx(1, abs=0.05)
    flat = Fitter.of(turned, replace(config, in_plane_order=0, iterations=40), RADIUS)
    assert flat.fit(torch.Generator().manual_seed(0)).misfit > 10 * found.misfit


@pytest.mark.slow
def test_with_uniform_angles_both_forms_find_the_same_map():
    # With half as many steps, in-plane angles end 30 to 55 % from uniform, by the start.
    config = MomentFitConfig(
        beads=12, iterations=320, settling=100, density_degree=4, radius=RADIUS
    )
    given = exact(0.0)
    fitter = Fitter.of(given, config, RADIUS)
    _, full, seen = fitted(fitter)
    assert in_plane_departure(seen, fitter.views[-1]) < 0.4
    inside = given.geometry.in_particle_box()
    circles = replace(inside, form="steerable")
    assert visible_radius(given) == inside.max_radius
    rule = lebedev(23)
    # Any rotation that looks along a direction: psi takes part in no steerable moment.
    weights = rule.weights * density(frames(rule.directions), 0.0)
    grid = circles.map_grid(24.0)
    first, second = exact_moments(TRUTH.double(), rule.directions, weights / weights.sum(), grid)
    nothing = torch.zeros_like(second)
    kept = torch.ones(len(first), len(first), dtype=torch.bool)
    steerable = SteerableMoments(
        circles, 0, first, second, 1e-9 + 0 * first, 1e-9 + nothing.real, nothing, kept,
        torch.ones(len(first)),
    )  # fmt: skip
    _, other, _ = fitted(Fitter.of(steerable, config, inside.max_radius))
    assert float(fsc_curve(full, other)[1 : inside.max_radius + 1].min()) > 0.8
