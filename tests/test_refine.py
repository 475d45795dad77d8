"""Refinement of poses looks at an image as long as that gains something, and no longer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import simulated

from cryorecon.conventions import euler_to_matrix
from cryorecon.engines import refine
from cryorecon.engines.observations import Observations
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.physics.fourier import half_plane
from cryorecon.physics.pose_derivatives import derivatives
from cryorecon.physics.rotations import exp_map, geodesic_distance_deg
from cryorecon.run.load import load_observations

N = 60


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Images, the transform of the map on their scale, true rotations and offsets in pixels."""
    stack = simulated(tmp_path_factory.mktemp("stack"), N, 24, 1.0)
    particles = read_particles(stack / "particles.star")
    images = load_observations(particles, 0.9).select(torch.arange(N))
    rotations = euler_to_matrix(torch.from_numpy(particles.euler_deg())).float()
    offsets = torch.from_numpy(particles.origins_angst() / particles.pixel_size_angst).float()
    truth = torch.from_numpy(read_map(stack / "map.mrc").data)
    model = derivatives(truth, 2, 11.0)
    predicted = refine.predictions(images, model, refine.Poses(rotations, offsets, offsets))
    overlap = (images.coefficients * predicted.conj()).real.sum() / predicted.abs().square().sum()
    return images, derivatives(truth * overlap, 2, 11.0), rotations, offsets


@pytest.fixture
def looked_at(monkeypatch):
    """Images of each evaluation."""
    counts = []
    for name in ("__call__", "value"):
        of = getattr(refine.PoseObjective, name)

        def spy(self, rotations, offsets_px, of=of):
            counts.append(len(rotations))
            return of(self, rotations, offsets_px)

        monkeypatch.setattr(refine.PoseObjective, name, spy)
    return counts


def moved(rotations, offsets, size_rad, generator):
    turn = size_rad * torch.randn(N, 3, generator=generator)
    shift = 5 * size_rad * torch.randn(N, 2, generator=generator)
    return exp_map(turn) @ rotations, offsets + shift


def test_images_at_their_maximum_are_left_alone(case, looked_at, generator):
    images, model, rotations, offsets = case
    found = refine.refine_poses(images, model, *moved(rotations, offsets, 0.1, generator), 60)
    assert looked_at[0] == N
    assert looked_at == sorted(looked_at, reverse=True)
    assert looked_at[-1] < N / 2
    looked_at.clear()
    again = refine.refine_poses(images, model, found.rotations, found.offsets_px, 60)
    # Damping begins anew, larger: only images for which that matters go on.
    assert sum(looked_at) < 1.5 * N
    turned = geodesic_distance_deg(again.rotations, found.rotations)
    error = geodesic_distance_deg(found.rotations, rotations).median()
    assert turned.median() < 0.01 * error
    assert (again.log_likelihood - found.log_likelihood).max() < 0.1


def test_an_image_does_not_depend_on_those_beside_it(case, generator):
    images, model, rotations, offsets = case
    start = moved(rotations, offsets, 0.1, generator)
    together = refine.refine_poses(images, model, *start)
    rows = torch.tensor([3, 17, 40])
    alone = refine.refine_poses(images.select(rows), model, start[0][rows], start[1][rows])
    torch.testing.assert_close(alone.rotations, together.rotations[rows], atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.offsets_px, together.offsets_px[rows], atol=1e-4, rtol=0)
    torch.testing.assert_close(alone.log_likelihood, together.log_likelihood[rows])


def test_more_steps_are_never_less_likely(case, generator):
    images, model, rotations, offsets = case
    start = moved(rotations, offsets, 0.1, generator)
    steps = [refine.refine_poses(images, model, *start, n).log_likelihood for n in range(5)]
    for fewer, more in pairwise(steps):
        assert (more >= fewer - 1e-3).all()
    assert (steps[4] - steps[0]).median() > 1


def test_an_image_without_numbers_does_not_stop_the_others(case):
    """Its likelihood is not finite, which a round tells its users."""
    images, model, rotations, offsets = case
    images = images.select(torch.arange(N))
    images.coefficients[5] = torch.nan
    found = refine.refine_poses(images, model, rotations, offsets)
    assert found.log_likelihood.isfinite().sum() == N - 1
    assert not found.log_likelihood[5].isfinite()
    assert found.rotations.isfinite().all()


def test_gradients_are_those_of_the_value_also_far_off_centre(case):
    """The prior of offsets counts there."""
    images, model, rotations, offsets = case
    objective = refine.PoseObjective(images, model)
    far = offsets + 6.0
    _, gradient, curvature = objective(rotations, far)
    step = 0.05
    for axis in range(2):
        way = torch.zeros(2)
        way[axis] = step
        up, down = (objective.value(rotations, far + sign * way) for sign in (1, -1))
        slopes = (up - down) / (2 * step)
        assert float((gradient[:, 3 + axis] - slopes).norm() / slopes.norm()) < 0.02
    nothing = replace(images, coefficients=0 * images.coefficients, ctf=0 * images.ctf)
    value, gradient, curvature = refine.PoseObjective(nothing, model)(rotations, far)
    precision = 10.0**-2
    torch.testing.assert_close(value, -far.square().sum(-1) * precision / 2)
    torch.testing.assert_close(gradient[:, 3:], -far * precision)
    torch.testing.assert_close(curvature[0, 3:, 3:], precision * torch.eye(2))


@pytest.mark.parametrize(("box", "spread_px"), [(24, 10.0), (64, 10.0), (128, 19.2), (256, 38.4)])
def test_offsets_of_large_boxes_are_held_less_tightly(box, spread_px):
    plane = half_plane(box, 3)
    m = len(plane)
    nothing = Observations(
        plane,
        torch.zeros(1, m, dtype=torch.complex64),
        torch.zeros(1, m),
        torch.ones(1, plane.n_shells),
        torch.zeros(1, dtype=torch.int64),
    )
    assert refine.PoseObjective(nothing, None).offset_precision == pytest.approx(spread_px**-2)


def test_scales_are_the_likeliest_with_their_prior(case):
    images, model, rotations, offsets = case
    poses = refine.Poses(rotations, offsets, offsets)
    predicted = refine.predictions(images, model, poses)
    found = refine.image_scales(images, predicted, spread=0.1)
    tried = torch.linspace(0.25, 2.0, 1751)[:, None]
    left = torch.stack([(images.coefficients - s * predicted).abs().square() for s in tried[::1]])
    cost = (left * images.precision()).sum(-1) + (tried - 1) ** 2 / (2 * 0.1**2)
    torch.testing.assert_close(found, tried[cost.argmin(0), 0], atol=2e-3, rtol=0)
    # Whatever scales the predictions have: the prior is of what comes of them.
    held = torch.linspace(-1.6, -0.6, len(images))
    again = refine.image_scales(images, predicted * held.abs()[:, None], held, spread=0.1)
    torch.testing.assert_close(again * held.abs(), found)
