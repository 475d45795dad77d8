"""Maps from images with known poses: the normal equations and their solution."""

from __future__ import annotations

import pytest
import torch

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.least_squares import least_squares_map
from cryorecon.engines.observations import Observations
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.fourier import half_plane, max_band, to_coefficients
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.projection import project_slowly
from cryorecon.physics.resampling import resample_volume
from cryorecon.physics.rotations import random_rotations


def amplitude_contrast_gain(plane):
    """0.1 at the origin, 1 from shell 4 on: how a CTF rises at low resolution."""
    return (0.1 + 0.9 * (plane.radius.float() / 4).square()).clamp(max=1.0)


def seen(volume, rotations, noise=1.0):
    """Exact, noise-free observations of a map and their normal equations."""
    plane = half_plane(len(volume))
    gain = amplitude_contrast_gain(plane).expand(len(rotations), -1)
    clean = torch.cat([project_slowly(volume, r, plane) for r in rotations.split(20)]) * gain
    power = torch.full((1, plane.n_shells), noise)
    observations = Observations(plane, clean, gain, power, torch.zeros(len(clean)).long())
    matched, weight = observations.matched()
    sums = NormalEquations.empty(max_band(len(volume)), 2, torch.float32, "cpu")
    sums.add(matched, weight, rotations, plane)
    return observations, sums


def small_prior(sums, box):
    return 1e-3 * sums.shell_mean_weight()[: max_band(box) + 1]


@pytest.fixture(params=[16, 17])
def blob(request, generator):
    """A random map in a soft ball; even and odd boxes."""
    box = request.param
    values = torch.randn(box, box, box, generator=generator)
    return values * soft_ball(box, 0.3 * box, 2.0, 3)


def test_steps_lower_the_exact_objective(blob, generator):
    """The convolution is the normal matrix of the images themselves, up to gridding."""
    rotations = random_rotations(60, generator, torch.float32)
    observations, sums = seen(blob, rotations)
    box = len(blob)
    ball = soft_ball(box, 0.35 * box, 2.0, 3)

    def misfit(volume):
        predicted = torch.cat(
            [project_slowly(volume, r, observations.plane) for r in rotations.split(20)]
        )
        residual = observations.coefficients - predicted * observations.ctf
        return float((observations.precision() * residual.abs() ** 2).sum())

    values = [misfit(least_squares_map(sums, small_prior(sums, box), ball, n)) for n in (0, 2, 5)]
    assert values[0] > values[1] > values[2]
    assert values[2] < 0.3 * values[0]


def test_a_rising_ctf_leaves_no_bias(molecule_32, generator):
    """Without noise the low shells come out right, where dividing by the weight errs."""
    truth = resample_volume(molecule_32, 20)
    _, sums = seen(truth, random_rotations(80, generator, torch.float32))
    ball = soft_ball(20, 8.6, 1.4, 3)
    maps = [least_squares_map(sums, small_prior(sums, 20), ball, n) for n in (0, 5)]
    divided, solved = (1 - fsc_curve(m, truth * ball)[1:5] for m in maps)
    assert float(solved.max()) < 1e-3
    assert float(divided.mean()) > 2 * float(solved.mean())


def test_the_prior_shrinks_the_map(blob, generator):
    rotations = random_rotations(60, generator, torch.float32)
    _, sums = seen(blob, rotations)
    ball = torch.ones_like(blob)
    mean = sums.shell_mean_weight()[: max_band(len(blob)) + 1]
    norms = [float(least_squares_map(sums, k * mean, ball).norm()) for k in (1e-3, 1.0, 100.0)]
    assert norms[0] > 1.5 * norms[1] > 10 * norms[2]


def test_nothing_seen_gives_an_empty_map():
    sums = NormalEquations.empty(7, 2, torch.float32, "cpu")
    found = least_squares_map(sums, torch.ones(8), torch.ones(16, 16, 16))
    assert found.abs().max() == 0


def test_a_gaussian_comes_back(generator):
    """An analytic map: projections are Gaussians, seen through no CTF."""
    box, sigma = 24, 2.0
    axis = torch.arange(box) - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    truth = torch.exp(-((x**2 + y**2 + z**2) / (2 * sigma**2)).float())
    plane = half_plane(box)
    image = truth.sum(0)
    rotations = random_rotations(200, generator, torch.float32)
    matched = to_coefficients(image, plane).expand(200, -1) / 2 * plane.multiplicity
    weight = (plane.multiplicity / 2).float().expand(200, -1)
    sums = NormalEquations.empty(max_band(box), 2, torch.float32, "cpu")
    sums.add(matched, weight, rotations, plane)
    found = least_squares_map(sums, small_prior(sums, box), soft_ball(box, 10.0, 2.0, 3))
    assert float((found - truth).norm() / truth.norm()) < 0.01
