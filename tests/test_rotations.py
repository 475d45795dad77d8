from __future__ import annotations

import math

import pytest
import roma
import torch

from cryorecon.physics import rotations as rot


def test_random_rotations_are_haar(generator):
    matrices = rot.random_rotations(20_000, generator)
    identity = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(matrices @ matrices.mT, identity.expand_as(matrices), atol=1e-12)
    assert torch.allclose(torch.linalg.det(matrices), torch.ones(20_000).double())
    # Every entry has mean 0 and variance 1/3, and the trace has the Haar mean 0, variance 1.
    assert matrices.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / 20_000)
    assert (matrices.var(0) - 1 / 3).abs().max() < 0.02
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert abs(float(trace.var()) - 1) < 0.05


def test_quaternions_are_read_as_by_roma(generator):
    quaternions = torch.randn(50, 2, 4, generator=generator, dtype=torch.float64)
    quaternions = quaternions / quaternions.norm(dim=-1, keepdim=True)
    expected = roma.unitquat_to_rotmat(quaternions)
    assert torch.allclose(rot.of_quaternions(quaternions), expected, atol=1e-14)


def test_exp_and_log_are_inverse(generator):
    vectors = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    vectors = vectors / vectors.norm(dim=-1, keepdim=True) * torch.linspace(0, 3.1, 200)[:, None]
    assert torch.allclose(rot.log_map(rot.exp_map(vectors)), vectors, atol=1e-9)


def test_exp_map_has_a_gradient_at_zero():
    zero = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rot.exp_map, (zero,))


def test_geodesic_distance_is_the_rotation_angle(generator):
    a = rot.random_rotations(50, generator)
    axis = torch.nn.functional.normalize(torch.randn(50, 3, generator=generator).double(), dim=-1)
    for angle in (1e-6, 0.5, 90.0, 179.0):
        b = rot.exp_map(axis * math.radians(angle)) @ a
        measured = rot.geodesic_distance_deg(a, b)
        assert torch.allclose(measured, torch.full_like(measured, angle), rtol=1e-6)


def test_mean_of_near_rotations_is_a_rotation_between_them(generator):
    around = rot.random_rotations(20, generator)
    turns = 0.04 * torch.randn(20, 6, 3, generator=generator, dtype=torch.float64)
    turns = torch.cat([turns, -turns], 1)
    found = rot.mean_rotation(rot.exp_map(turns) @ around[:, None], torch.full((20, 12), 1 / 12))
    assert rot.geodesic_distance_deg(found, around).max() < 0.02
    eye = torch.eye(3, dtype=torch.float64).expand(20, 3, 3)
    torch.testing.assert_close(found @ found.mT, eye, atol=1e-7, rtol=0)
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("nside", [1, 2, 3, 4])
def test_grid_is_uniform(nside):
    """RELION's orders and those between: equal spacing, no moments of degree 1 or 2."""
    grid, n_inplane = rot.so3_grid(nside)
    assert len(grid) == 72 * nside**3
    assert n_inplane == 6 * nside
    assert grid.mean(0).abs().max() < 1e-9
    second = torch.einsum("nij,nkl->ijkl", grid, grid) / len(grid)
    identity = torch.eye(3, dtype=torch.float64)
    haar = torch.einsum("ik,jl->ijkl", identity, identity) / 3
    # The rule is nearly exact for degree 2: its error falls as the square of the spacing.
    assert (second - haar).abs().max() < 0.04 / nside**2


def test_grid_covers_so3(generator):
    """No rotation is farther from the grid than a step, and neighbours are a step apart."""
    grid, _ = rot.so3_grid(3)
    step = rot.grid_step_deg(3)
    probes = rot.random_rotations(300, generator)
    nearest = rot.geodesic_distance_deg(probes[:, None], grid[None]).amin(1)
    assert nearest.max() < step
    distances = rot.geodesic_distance_deg(grid[:100, None], grid[None])
    distances[torch.arange(100), torch.arange(100)] = 999
    assert distances.amin(1).min() > 0.6 * step


def test_views_of_a_cluster_concentrate(generator):
    uniform = rot.sample_views(20_000, 1, 0.0, generator)
    assert uniform.mean(0).norm() < 0.03
    kappa = 10.0
    tight = rot.sample_views(20_000, 1, kappa, generator)
    expected = 1 / math.tanh(kappa) - 1 / kappa
    assert float(tight.mean(0).norm()) == pytest.approx(expected, abs=0.01)


def test_rotations_towards_views_have_them_as_third_row(generator):
    views = rot.sample_views(100, 3, 5.0, generator)
    matrices = rot.rotations_towards(views, generator)
    assert torch.allclose(matrices[:, 2], views, atol=1e-9)
