from __future__ import annotations

import pytest
import torch

from cryorecon.physics import points
from cryorecon.physics import projection as proj
from cryorecon.physics.fourier import centred_frequencies, half_plane, to_images
from cryorecon.physics.rotations import exp_map, random_rotations


@pytest.mark.parametrize("box", [10, 11])
@pytest.mark.parametrize("padding", [1, 2, 3])
def test_backprojection_is_the_adjoint_of_projection(box, padding, generator):
    plane = half_plane(box)
    rotations = random_rotations(4, generator)
    volume = torch.randn(box, box, box, generator=generator, dtype=torch.float64)
    slices = torch.randn(4, len(plane), generator=generator, dtype=torch.complex128)
    left = (proj.project(volume, rotations, plane, padding).conj() * slices).sum().real
    right = (volume * proj.backproject(slices, rotations, plane, padding)).sum()
    assert abs(left - right) < 1e-10 * abs(left)


def test_spreading_adds_to_what_the_grids_hold(generator):
    plane = half_plane(8)
    rotations = random_rotations(3, generator)
    signal = torch.randn(3, len(plane), generator=generator, dtype=torch.complex64)
    weight = torch.rand(3, len(plane), generator=generator)
    grids = torch.ones(16, 16, 16, dtype=torch.complex64), torch.ones(16, 16, 16)
    points.add([(signal, grids[0]), (weight, grids[1])], rotations, plane, 2)
    for slices, grid in ((signal, grids[0]), (weight, grids[1])):
        double = slices.to(torch.promote_types(slices.dtype, torch.float64))
        exact = proj.insert_slices(double, rotations.double(), plane, 16, 2) + 1
        assert (grid - exact).abs().max() < 1e-5


@pytest.mark.parametrize("box", [8, 9])
def test_gradients_in_map_and_rotation(box, generator):
    plane = half_plane(box)
    start = random_rotations(2, generator)
    volume = torch.randn(box, box, box, generator=generator, dtype=torch.float64)
    turn = torch.full((2, 3), 0.01, dtype=torch.float64, requires_grad=True)

    def of_turn(w):
        return torch.view_as_real(proj.project(volume, exp_map(w) @ start, plane))

    def of_map(v):
        return torch.view_as_real(proj.project(v, start[:1], plane.within(2)))

    def of_both(v, w):
        return torch.view_as_real(proj.project(v, exp_map(w) @ start, plane.within(2)))

    assert torch.autograd.gradcheck(of_turn, (turn,))
    assert torch.autograd.gradcheck(of_map, (volume.requires_grad_(),))
    assert torch.autograd.gradcheck(of_both, (volume, turn))


@pytest.mark.parametrize(("padding", "bound"), [(2, 0.05), (4, 0.015)])
@pytest.mark.parametrize("box", [16, 17])
def test_projection_against_its_definition(box, padding, bound, generator):
    plane = half_plane(box)
    x = centred_frequencies(box).double()
    blob = torch.exp(-((x - 1) ** 2) / 8)
    volume = blob[:, None, None] * blob[None, :, None] * blob.flip(0)[None, None, :]
    volume = volume * (1 + 0.3 * torch.randn(box, box, box, generator=generator).double())
    rotations = random_rotations(5, generator)
    exact = proj.project_slowly(volume, rotations, plane)
    fast = proj.project(volume, rotations, plane, padding)
    assert (fast - exact).norm() < bound * exact.norm()


@pytest.mark.parametrize("box", [32, 33])
def test_projection_of_a_gaussian_is_analytic(box, generator):
    """The projection of a Gaussian at r is a Gaussian at the first two entries of A r."""
    centre, width = torch.tensor([3.0, -2.0, 4.0], dtype=torch.float64), 2.0
    x = centred_frequencies(box).double()
    z, y, xx = torch.meshgrid(x, x, x, indexing="ij")
    squared = (xx - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
    volume = torch.exp(-squared / (2 * width**2))
    rotations = random_rotations(4, generator)
    plane = half_plane(box)
    images = to_images(proj.project(volume, rotations, plane, 4), plane)
    place = rotations @ centre
    iy, ix = torch.meshgrid(x, x, indexing="ij")
    squared = (ix - place[:, 0, None, None]) ** 2 + (iy - place[:, 1, None, None]) ** 2
    expected = torch.exp(-squared / (2 * width**2)) * width * (2 * torch.pi) ** 0.5
    assert (images - expected).norm() < 0.01 * expected.norm()


def test_float32_agrees_with_float64(generator):
    plane = half_plane(16)
    rotations = random_rotations(3, generator)
    volume = torch.randn(16, 16, 16, generator=generator, dtype=torch.float64)
    single = proj.project(volume.float(), rotations.float(), plane)
    double = proj.project(volume, rotations, plane)
    assert single.dtype == torch.complex64
    assert (single - double).norm() < 1e-5 * double.norm()


def test_a_cropped_transform_gives_the_same_low_band_slices(generator):
    plane = half_plane(24, 5)
    rotations = random_rotations(3, generator)
    whole = proj.padded_transform(torch.randn(24, 24, 24, generator=generator).double())
    cut = whole.within(5)
    assert cut.values.shape[-1] < whole.values.shape[-1]
    expected = proj.extract_slices(whole, rotations, plane)
    assert torch.allclose(proj.extract_slices(cut, rotations, plane), expected)


@pytest.mark.parametrize("box", [12, 13])
def test_to_volume_inverts_the_gridded_transform(box, generator):
    volume = torch.randn(box, box, box, generator=generator, dtype=torch.float64)
    assert torch.allclose(proj.to_volume(proj.gridded_transform(volume), box), volume, atol=1e-10)
