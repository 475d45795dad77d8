"""Compiled loops over the points of slices do what torch does, with any number of threads."""

from __future__ import annotations

import pytest
import torch

from cryorecon.physics import compiled, points, pose_derivatives
from cryorecon.physics.fourier import half_plane
from cryorecon.physics.projection import insert_slices, padded_transform
from cryorecon.physics.rotations import random_rotations

N = 7
KINDS = [(torch.float32, 2e-5), (torch.float64, 1e-12)]


@pytest.fixture
def by_torch(monkeypatch):
    """Have the same function computed as it is on a GPU."""

    def compute(work):
        with monkeypatch.context() as patch:
            for module in (points, pose_derivatives):
                patch.setattr(module, "on_cpu", lambda _: False)
            return work()

    return compute


def case(box, dtype, generator, padding=2):
    """A map's transform, rotations, slices of noise."""
    plane = half_plane(box)
    volume = torch.randn(box, box, box, generator=generator).to(dtype)
    rotations = random_rotations(N, generator).to(dtype)
    noise = torch.randn(N, len(plane), 2, generator=generator).to(dtype)
    return plane, volume, rotations, torch.view_as_complex(noise)


def close(found, expected, bound):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize(("dtype", "bound"), KINDS)
@pytest.mark.parametrize(("box", "padding"), [(12, 2), (13, 3)])
def test_grids_are_read_and_added_to_as_by_torch(
    box, padding, dtype, bound, threads, by_torch, generator
):
    plane, volume, rotations, slices = case(box, dtype, generator)
    grid = padded_transform(volume, padding).values
    read = points.read(grid, rotations, plane, padding)
    close(read, by_torch(lambda: points.read(grid, rotations, plane, padding)), bound)
    turned = points.turn(grid, slices, rotations, plane, padding)
    close(turned, by_torch(lambda: points.turn(grid, slices, rotations, plane, padding)), bound)
    for values in (slices, slices.real, slices.conj()):
        made = [insert_slices(values, rotations, plane, len(grid), padding)]
        made.append(
            by_torch(lambda v=values: insert_slices(v, rotations, plane, len(grid), padding))
        )
        close(*made, bound)


@pytest.mark.parametrize(("dtype", "bound"), KINDS)
@pytest.mark.parametrize("box", [12, 13])
def test_products_of_derivatives_are_those_of_torch(
    box, dtype, bound, threads, by_torch, generator
):
    plane, volume, rotations, target = case(box, dtype, generator)
    model = pose_derivatives.derivatives(volume, 2, float(plane.radius[-1]))
    offsets = torch.randn(N, 2, generator=generator).to(dtype)
    gain = torch.randn(N, len(plane), generator=generator).to(dtype)
    images = (model, plane, rotations, offsets, target * volume.norm(), gain)
    products = pose_derivatives.pose_products(*images)
    close(products, by_torch(lambda: pose_derivatives.pose_products(*images)), bound)
    left = pose_derivatives.squared_residual(*images)
    close(left, by_torch(lambda: pose_derivatives.squared_residual(*images)), bound)
    close(left, products[:, 5, 5], bound)


def test_threads_do_not_change_a_digit(generator, monkeypatch):
    """Each grid point's additions come in the order of images, whoever makes them."""
    plane, volume, rotations, slices = case(12, torch.float32, generator)
    grid, found = padded_transform(volume).values, []
    monkeypatch.setattr(compiled, "_POINTS_A_THREAD", 1)
    before = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        read = points.read(grid, rotations, plane, 2)
        found.append((read, insert_slices(slices, rotations, plane, 24, 2)))
    torch.set_num_threads(before)
    for some in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], some, strict=True))


@pytest.mark.parametrize("fault", ["beyond the grid", "no number"])
def test_slices_outside_the_grid_touch_no_other_memory(fault, threads, generator):
    plane, volume, rotations, slices = case(12, torch.float32, generator)
    if fault == "no number":
        grid = padded_transform(volume).values
        rotations[3, 0, 1] = torch.nan
        bad = torch.arange(N) == 3
    else:
        grid = padded_transform(volume).within(2).values
        bad = torch.ones(N, dtype=torch.bool)
    read = points.read(grid, rotations, plane, 2)
    assert torch.equal(read.isnan().all(-1), bad)
    assert torch.equal(read.isnan().any(-1), bad)
    turned = points.turn(grid, slices, rotations, plane, 2)
    assert torch.equal(turned[:, :2].isnan().all((-2, -1)), bad)
    error = FloatingPointError if fault == "no number" else IndexError
    with pytest.raises(error, match="slice"):
        points.add([(slices, grid.contiguous())], rotations, plane, 2)


def test_a_pose_that_is_no_number_spoils_its_own_products_alone(generator):
    plane, volume, rotations, target = case(12, torch.float32, generator)
    rotations[2] = torch.inf
    model = pose_derivatives.derivatives(volume, 2, float(plane.radius[-1]))
    images = (model, plane, rotations, torch.zeros(N, 2), target, target.real)
    bad = torch.arange(N) == 2
    assert torch.equal(pose_derivatives.pose_products(*images).isnan().all((-2, -1)), bad)
    assert torch.equal(pose_derivatives.squared_residual(*images).isnan(), bad)


def test_poses_that_are_no_numbers_end_no_job_on_a_gpu(by_torch, generator):
    """Its indices outside a grid would: so values are no numbers there."""
    plane, volume, rotations, noise = case(8, torch.float32, generator)
    transform = padded_transform(volume).values
    rotations[1] = torch.nan

    def work():
        found = points.read(transform, rotations, plane, 2)
        grid = torch.zeros_like(transform)
        points.add([(noise, grid)], rotations, plane, 2)
        return found, grid, points.turn(transform, noise, rotations, plane, 2)

    found, grid, turned = by_torch(work)
    for values in (found, turned[:, :2]):
        assert values[1].isnan().all()
        assert values[[0, 2]].isfinite().all()
    assert grid.isnan().any()


def test_adding_wants_a_grid_that_is_whole(generator):
    plane, _, rotations, slices = case(12, torch.float32, generator)
    grid = torch.zeros(24, 24, 48, dtype=torch.complex64)[..., ::2]
    with pytest.raises(ValueError, match="contiguous"):
        points.add([(slices, grid)], rotations, plane, 2)


def test_no_slices_at_all(threads, generator):
    """What a process has of a batch whose images are all another's."""
    plane, volume, rotations, target = case(12, torch.float32, generator)
    model = pose_derivatives.derivatives(volume, 2, float(plane.radius[-1]))
    images = (model, plane, rotations[:0], torch.zeros(0, 2), target[:0], target.real[:0])
    assert pose_derivatives.pose_products(*images).shape == (0, 6, 6)
    assert pose_derivatives.squared_residual(*images).shape == (0,)
    grid = padded_transform(volume).values
    assert points.read(grid, rotations[:0], plane, 2).shape == (0, len(plane))
    assert points.turn(grid, target[:0], rotations[:0], plane, 2).shape == (0, 3, 3)
    assert not insert_slices(target[:0], rotations[:0], plane, 24, 2).any()


@pytest.mark.parametrize(("box", "padding"), [(12, 2), (13, 2), (13, 1), (12, 1)])
def test_views_along_the_axes_reach_the_last_point_of_the_grid(box, padding, by_torch, generator):
    """In odd boxes the outermost frequency lies on it."""
    plane, volume, _, slices = case(box, torch.float32, generator)
    cycle = torch.eye(3).roll(1, 0)
    turns = torch.stack([torch.eye(3), cycle, cycle @ cycle, -torch.eye(3), -cycle])
    grid = padded_transform(volume, padding).values
    read = points.read(grid, turns, plane, padding)
    assert read.isfinite().all()
    close(read, by_torch(lambda: points.read(grid, turns, plane, padding)), 2e-5)
    some = slices[: len(turns)]
    made = insert_slices(some, turns, plane, len(grid), padding)
    close(made, by_torch(lambda: insert_slices(some, turns, plane, len(grid), padding)), 2e-5)
    left, right = (read.conj() * some).sum().real, (grid.conj() * made).sum().real
    assert abs(left - right) < 1e-4 * abs(left)


def test_values_must_be_those_of_the_points(generator):
    plane, volume, rotations, slices = case(12, torch.float32, generator)
    grid = padded_transform(volume).values
    for wrong in (slices[:1], slices[:, 1:]):
        with pytest.raises(ValueError, match="at points of"):
            points.add([(wrong, grid)], rotations, plane, 2)
        with pytest.raises(ValueError, match="at points of"):
            points.turn(grid, wrong, rotations, plane, 2)
    model = pose_derivatives.derivatives(volume, 2, float(plane.radius[-1]))
    images = (model, plane, rotations, torch.zeros(N, 2), slices, slices.real[:1])
    for compute in (pose_derivatives.pose_products, pose_derivatives.squared_residual):
        with pytest.raises(ValueError, match="at points of"):
            compute(*images)


def test_likelihoods_of_many_coefficients_are_told_apart(generator):
    """Steps that gain less than 0.02 are not taken: sums must be more exact than that."""
    plane = half_plane(200)
    volume = torch.zeros(200, 200, 200)
    model = pose_derivatives.derivatives(volume, 1, float(plane.radius[-1]))
    noise = torch.view_as_complex(torch.randn(2, len(plane), 2, generator=generator))
    images = (model, plane, random_rotations(2, generator).float(), torch.zeros(2, 2))
    exact = noise.to(torch.complex128).abs().square().sum(-1)
    left = pose_derivatives.squared_residual(*images, noise, torch.ones(2, len(plane)))
    products = pose_derivatives.pose_products(*images, noise, torch.ones(2, len(plane)))
    assert len(plane) > 15_000
    assert (left - exact).abs().max() < 3e-3
    assert (products[:, 5, 5] - exact).abs().max() < 3e-3
