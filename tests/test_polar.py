"""The polar transform of images and maps, and what noise leaves in its second moments."""

from __future__ import annotations

import pytest
import torch

from cryorecon.physics.fourier import half_plane, to_coefficients
from cryorecon.physics.gridding import Kernel
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.polar import (
    PolarGrid,
    PolarSlices,
    PolarTransform,
    angles_needed,
    noise_by_shell,
)
from cryorecon.physics.projection import project_slowly
from cryorecon.physics.sphere import frames


def _grid(largest=6.0, order=12):
    radii = torch.tensor([1.0, 2.3, largest], dtype=torch.float64)
    return PolarGrid(radii, angles_needed(largest, order), order)


def _rotations(n, generator):
    views = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return frames(torch.nn.functional.normalize(views, dim=-1))


def _positions(box):
    axis = torch.arange(box).double() - box // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


@pytest.mark.parametrize("box", [20, 21])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-5), (torch.float32, 3e-5)])
def test_samples_are_the_transform_on_circles(box, dtype, tolerance, generator):
    grid = _grid()
    images = torch.randn(3, box, box, generator=generator, dtype=torch.float64)
    got = PolarTransform(box, grid, dtype).samples(images.to(dtype))
    phase = -2 * torch.pi / box * (grid.points @ _positions(box).T)
    wanted = torch.polar(torch.ones_like(phase), phase) @ images.flatten(1).T.to(torch.complex128)
    assert got.dtype == (torch.complex128 if dtype == torch.float64 else torch.complex64)
    wanted = wanted.T.view(got.shape)
    assert (got - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("box", [20, 21])
def test_the_adjoint_is_the_adjoint(box, generator):
    transform = PolarTransform(box, _grid(), torch.float64)
    images = torch.randn(2, box, box, generator=generator, dtype=torch.float64)
    forward = transform.samples(images)
    other = torch.randn(forward.shape, generator=generator, dtype=torch.complex128)
    left = float((forward.conj() * other).real.sum())
    assert left == pytest.approx(float((images * transform.adjoint(other)).sum()), rel=1e-10)


def test_harmonics_of_half_circles_are_those_of_whole_ones(generator):
    grid = _grid()
    half = torch.randn(2, 3, grid.n_angles // 2, generator=generator, dtype=torch.complex128)
    wanted = torch.fft.fft(torch.cat([half, half.conj()], -1)) / grid.n_angles
    got = grid.harmonics(half)
    assert torch.allclose(got, wanted[..., : grid.max_order + 1], atol=1e-12)


def test_turning_a_map_turns_the_harmonics_phases(generator):
    grid = _grid()
    volume = torch.randn(16, 16, 16, generator=generator, dtype=torch.float64)
    rotation = _rotations(1, generator)
    psi = torch.tensor(0.7, dtype=torch.float64)
    c, s = psi.cos(), psi.sin()
    turn = torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]], dtype=torch.float64)
    both = torch.cat([rotation, turn @ rotation])
    first, turned = PolarSlices(16, grid, both, torch.float64).harmonics(volume)
    # The orders that the angles hold without aliasing.
    orders = torch.arange(grid.max_order + 1)
    wanted = first * torch.polar(torch.ones((), dtype=torch.float64), orders * psi)
    assert (turned - wanted).norm() < 2e-3 * wanted.norm()


@pytest.mark.parametrize("box", [12, 13])
def test_slices_agree_with_the_slow_projection(box, generator):
    volume = torch.randn(box, box, box, generator=generator, dtype=torch.float64)
    rotations = _rotations(2, generator)
    grid = PolarGrid(torch.tensor([1.0, 3.0], dtype=torch.float64), 8, 2)
    for kernel, tolerance in ((Kernel(6), 3e-5), (Kernel(4), 2e-3)):
        got = PolarSlices(box, grid, rotations, torch.float64, kernel=kernel).samples(volume)
        plane = half_plane(box)
        wanted = project_slowly(volume, rotations, plane)
        for number, (kx, ky) in enumerate(plane.frequencies.tolist()):
            near = (grid.points - torch.tensor([kx, ky])).norm(dim=-1) < 1e-9
            if near.any():
                found = got.flatten(1)[:, near][:, 0]
                assert (found - wanted[:, number]).abs().max() < tolerance * wanted.abs().max()


def test_gradients_pass_the_slices(generator):
    grid = PolarGrid(torch.tensor([1.0, 1.5], dtype=torch.float64), 8, 2)
    slices = PolarSlices(4, grid, _rotations(1, generator), torch.float64, kernel=Kernel(4))
    volume = torch.randn(4, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: torch.view_as_real(slices.harmonics(v)), volume)


@pytest.mark.parametrize("box", [12, 13])
@pytest.mark.parametrize("removed", [False, True])
def test_white_noise_leaves_what_its_pixels_leave(box, removed):
    """All shells together: the sum over images of one pixel each; not diagonal in the radius."""
    grid = PolarGrid(torch.tensor([1.0, 2.0, 4.5], dtype=torch.float64), 40, 8)
    pixels = torch.eye(box * box, dtype=torch.float64).view(-1, box, box)
    level = None
    if removed:
        outside = 1 - soft_ball(box, 0.4 * box, 2.0, 2, torch.float64)
        level = outside / outside.sum()
        pixels = pixels - level.flatten()[:, None, None]
    s = grid.harmonics(PolarTransform(box, grid, torch.float64).samples(pixels))
    wanted = torch.einsum("bkm,blm->mkl", s, s.conj())
    got = sum(noise_by_shell(box, grid, level))[20:29] * box**2
    # Power N^2 in every coefficient is variance 1 in every pixel.
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert wanted[0, 0, 1].abs() > 0.02 * wanted[0, 1, 1].abs()


def test_noise_of_one_shell_stays_in_its_shell(generator):
    box = 16
    grid = PolarGrid(torch.tensor([2.0, 3.0, 6.0], dtype=torch.float64), 40, 8)
    by_shell = list(noise_by_shell(box, grid))
    power = torch.stack([b.diagonal(dim1=1, dim2=2).real.sum(0) for b in by_shell])
    assert power[:, 0].argmax() == 2
    assert power[:, 1].argmax() == 3
    assert power[:, 2].argmax() == 6
    # As many shells as the noise spectra have.
    image = torch.randn(1, box, box, generator=generator)
    assert len(by_shell) == half_plane(box).n_shells
    assert to_coefficients(image, half_plane(box)).shape[1] == len(half_plane(box))


def test_a_grid_that_cannot_hold_its_orders_is_refused():
    with pytest.raises(ValueError, match="n_angles"):
        PolarGrid(torch.ones(1).double(), 8, 4)
