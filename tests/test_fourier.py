from __future__ import annotations

import pytest
import torch

from cryorecon.physics import fourier, resampling
from cryorecon.physics.masks import (
    centre_of_mass,
    molecule_mask,
    on_centre,
    soft_ball,
    solvent_mask,
)

BOXES = (8, 9, 16, 17)


@pytest.mark.parametrize("box", BOXES)
def test_centred_dft_of_a_delta_at_the_centre_is_one(box):
    image = torch.zeros(box, box, dtype=torch.float64)
    image[box // 2, box // 2] = 1
    transform = fourier.fft_centred(image, 2)
    assert torch.allclose(transform, torch.ones_like(transform), atol=1e-12)


@pytest.mark.parametrize("box", BOXES)
def test_centred_dft_of_a_wave_is_a_delta_at_its_frequency(box):
    x = fourier.centred_frequencies(box).double()
    wave = torch.polar(torch.ones(box, dtype=torch.float64), 2 * torch.pi * 3 * x / box)
    transform = fourier.fft_centred(wave, 1)
    expected = torch.zeros(box, dtype=torch.complex128)
    expected[box // 2 + 3] = box
    assert torch.allclose(transform, expected, atol=1e-10)


@pytest.mark.parametrize("box", BOXES)
def test_inverse_undoes_forward(box, generator):
    volume = torch.randn(box, box, box, generator=generator, dtype=torch.float64)
    back = fourier.ifft_centred(fourier.fft_centred(volume, 3), 3)
    assert torch.allclose(back.real, volume, atol=1e-12)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(("size", "keep"), [(34, 34), (35, 12), (36, 13), (17, 9)])
def test_padded_transforms_are_the_middle_of_the_whole_ones(box, size, keep, generator):
    volume = torch.randn(box, box, box, generator=generator, dtype=torch.float64)
    crop = fourier.crop_or_pad_centred
    whole = fourier.fft_centred(crop(volume, size, 3), 3)
    found = fourier.fft_padded(volume, size, keep, 3)
    assert torch.allclose(found, crop(whole, keep, 3), atol=1e-10)
    back = fourier.ifft_centred(crop(found, size, 3), 3)
    assert torch.allclose(fourier.ifft_cropped(found, size, box, 3), crop(back, box, 3), atol=1e-12)


@pytest.mark.parametrize("box", BOXES)
def test_half_plane_is_sorted_and_holds_one_of_each_pair(box):
    plane = fourier.half_plane(box)
    assert (plane.radius.diff() >= 0).all()
    assert float(plane.radius[-1]) <= (box - 1) // 2
    both = torch.cat([plane.frequencies, -plane.frequencies[1:]])
    assert len(torch.unique(both, dim=0)) == len(both)
    axis = torch.arange(-box, box + 1)
    inside = (axis[:, None] ** 2 + axis**2 <= ((box - 1) // 2) ** 2).sum()
    assert len(both) == inside == int(plane.multiplicity.sum())


@pytest.mark.parametrize("box", BOXES)
def test_images_of_coefficients_of_images_are_the_band_limited_images(box, generator):
    plane = fourier.half_plane(box)
    images = torch.randn(3, box, box, generator=generator, dtype=torch.float64)
    once = fourier.to_images(fourier.to_coefficients(images, plane), plane)
    twice = fourier.to_images(fourier.to_coefficients(once, plane), plane)
    assert torch.allclose(once, twice, atol=1e-12)
    radius = fourier.radius_grid(box, 2)
    kept = fourier.fft_centred(images, 2) * (radius <= (box - 1) // 2)
    assert torch.allclose(once, fourier.ifft_centred(kept, 2).real, atol=1e-12)


def test_a_band_is_a_prefix():
    plane = fourier.half_plane(16)
    band = plane.within(4.0)
    assert torch.equal(band.frequencies, plane.frequencies[: len(band)])
    assert float(band.radius.max()) <= 4 < float(plane.radius[len(band)])


@pytest.mark.parametrize("box", BOXES)
def test_shift_phases_move_content_by_minus_the_origin(box, generator):
    plane = fourier.half_plane(box)
    image = fourier.to_images(
        fourier.to_coefficients(
            torch.randn(1, box, box, generator=generator, dtype=torch.float64), plane
        ),
        plane,
    )
    offsets = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    moved = fourier.to_coefficients(image, plane) * fourier.shift_phases(offsets, plane)
    expected = image.roll((1, -2), (-2, -1))  # y by +1, x by -2
    assert torch.allclose(fourier.to_images(moved, plane), expected, atol=1e-10)


@pytest.mark.parametrize(("old", "new"), [(16, 24), (17, 12), (16, 9), (9, 16)])
def test_resampling_keeps_a_band_limited_density(old, new):
    def gaussian(box):
        x = fourier.centred_frequencies(box).double() / box
        g = torch.exp(-((x - 0.03) ** 2) / (2 * 0.12**2))
        return g[:, None, None] * g[None, :, None] * g[None, None, :]

    resampled = resampling.resample_volume(gaussian(old), new)
    assert torch.allclose(resampled, gaussian(new), atol=2e-2)


def test_crop_undoes_pad(generator):
    for small, large in ((8, 12), (9, 12), (8, 13), (9, 13)):
        x = torch.randn(small, small, generator=generator)
        padded = fourier.crop_or_pad_centred(x, large, 2)
        assert padded[large // 2, large // 2] == x[small // 2, small // 2]
        assert torch.equal(fourier.crop_or_pad_centred(padded, small, 2), x)


def test_lowpass_passes_low_and_stops_high():
    box = 32
    x = fourier.centred_frequencies(box).double()
    low, high = torch.cos(2 * torch.pi * 3 * x / box), torch.cos(2 * torch.pi * 12 * x / box)
    image = (low + high)[None, :].expand(box, -1)
    assert torch.allclose(fourier.lowpass(image, 8, 2), low.expand(box, -1), atol=1e-10)


def test_soft_ball_is_one_inside_and_zero_outside():
    mask = soft_ball(20, 5, 3, 3, torch.float64)
    radius = fourier.radius_grid(20, 3)
    assert (mask[radius <= 5] == 1).all()
    assert (mask[radius >= 8] == 0).all()
    assert mask[10, 10, 16] == pytest.approx(0.75)


@pytest.mark.parametrize("box", [32, 33])
def test_molecule_mask_holds_the_molecule_and_drops_the_solvent(molecule_32, box, generator):
    volume = torch.nn.functional.pad(molecule_32, (0, box - 32) * 3)
    noisy = volume + 0.2 * volume.std() * torch.randn(volume.shape, generator=generator)
    mask = molecule_mask(noisy, 6.0)
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert (volume * mask).square().sum() > 0.95 * volume.square().sum()
    assert mask.mean() < 0.5
    assert torch.equal(molecule_mask(-volume.abs() - 1, 6.0), torch.ones_like(volume))


@pytest.mark.parametrize("box", [31, 32])
def test_a_shifted_map_is_the_map_moved_along_x_y_z(box):
    """A Gaussian lies where the shift says; whole voxels are a roll."""
    axis = fourier.centred_frequencies(box).double()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")

    def gaussian(at):
        return torch.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2) / 8)

    start, shift = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([2.25, -1.5, 0.75])
    moved = resampling.shift_volume(gaussian(start), shift)
    assert torch.allclose(moved, gaussian(start + shift), atol=1e-6)
    rolled = resampling.shift_volume(gaussian(start), torch.tensor([1, -2, 3]))
    assert torch.allclose(rolled, gaussian(start).roll((3, -2, 1), (0, 1, 2)), atol=1e-12)


@pytest.mark.parametrize("box", [31, 32])
def test_a_map_is_moved_onto_its_centre_of_mass(molecule_32, box, generator):
    """By parts of a voxel too; noise around the molecule does not count."""
    centre = resampling.resample_volume(molecule_32, box)
    moved = resampling.shift_volume(centre, torch.tensor([2.3, -1.6, 0.7]))
    first, second = (fourier.lowpass(on_centre(v, 6.0), 6, 2) for v in (centre, moved))
    assert float((first - second).abs().max()) < 0.05 * float(first.max())
    noisy = moved + 0.3 * moved.std() * torch.randn(moved.shape, generator=generator)
    mass = fourier.lowpass(on_centre(noisy, 6.0), 6, 2)
    assert float(centre_of_mass(mass, 6.0).abs().max()) < 0.5
    empty = torch.zeros(8, 8, 8)
    assert torch.equal(on_centre(empty, 3.0), empty)


def test_the_margin_of_a_molecule_mask_is_a_cube():
    """One voxel that stands out becomes a cube of as many voxels as the margin asks for."""
    volume = torch.zeros(64, 64, 64)
    volume[20, 30, 40] = 1
    grown = torch.zeros_like(volume)
    grown[14:27, 24:37, 34:47] = 1
    wanted = fourier.lowpass(grown, 10, 3, 8).clamp(0, 1)
    # So narrow a threshold that only the peak of the low-passed voxel is above it.
    assert torch.allclose(molecule_mask(volume, 32.0, 0.999, margin=6 / 64), wanted, atol=1e-6)


@pytest.mark.parametrize("box", [32, 33])
def test_solvent_mask_is_one_on_the_molecule_and_zero_away_from_it(box):
    radius = fourier.radius_grid(box, 3)
    volume = (-((radius / 5) ** 2)).exp()
    mask = solvent_mask(volume, 10.0, 0.15, margin=0.1, edge=0.1)
    shown = radius[volume > 0.15].max()
    assert (mask[radius <= shown + 0.1 * box - 0.5] == 1).all()
    assert (mask[radius >= shown + 0.2 * box + 1.5] == 0).all()
    away = mask[box // 2, box // 2, box // 2 :]
    assert (away.diff() <= 0).all()
    assert ((away > 0) & (away < 1)).sum() >= 2
    # Margin and fall are the same in all directions, so that a symmetric map's mask is.
    torch.testing.assert_close(mask, mask.transpose(0, 2), rtol=0, atol=0)
    third = mask[radius.round() == round(float(shown) + 0.1 * box + 2)]
    assert third.max() - third.min() < 0.75
    assert solvent_mask(-volume - 1, 10.0).max() == 0
