from __future__ import annotations

import pytest
import torch

from cryorecon.physics import imaging
from cryorecon.physics.ctf import CtfParameters, ctf
from cryorecon.physics.fourier import half_plane, to_coefficients
from cryorecon.physics.projection import padded_transform
from cryorecon.physics.rotations import exp_map, random_rotations


def optics(n, generator, **changes):
    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    values = {
        "defocus_u_angst": uniform(12000, 16000),
        "defocus_v_angst": uniform(9000, 12000),
        "defocus_angle_deg": uniform(-90, 90),
        "voltage_kv": uniform(300, 300),
        "spherical_aberration_mm": uniform(2.7, 2.7),
        "amplitude_contrast": uniform(0.1, 0.1),
        "phase_shift_deg": uniform(0, 90),
        "b_factor_angst2": uniform(0, 0),
        "phase_flipped": uniform(0, 0),
    }
    return CtfParameters(**{**values, **changes})


@pytest.mark.parametrize("box", [10, 11])
def test_prediction_has_gradients_in_rotation_and_offset(box, generator):
    plane = half_plane(box)
    volume = torch.randn(box, box, box, generator=generator, dtype=torch.float64)
    transform = padded_transform(volume)
    start = random_rotations(2, generator)
    gain = ctf(plane.frequencies, optics(2, generator), box, 3.0)
    turn = torch.full((2, 3), 0.02, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([[0.3, -1.2], [2.0, 0.1]], dtype=torch.float64, requires_grad=True)

    def predict(w, o):
        return torch.view_as_real(imaging.predict(transform, exp_map(w) @ start, o, gain, plane))

    assert torch.autograd.gradcheck(predict, (turn, offsets))


def test_ctf_envelope_and_even_symmetry(generator):
    plane = half_plane(24)
    one = optics(3, generator)
    damped = CtfParameters(**{**one.__dict__, "b_factor_angst2": torch.full((3,), 80.0).double()})
    s2 = (plane.frequencies.double() / (24 * 2.0)).square().sum(-1)
    ratio = ctf(plane.frequencies, damped, 24, 2.0) / ctf(plane.frequencies, one, 24, 2.0)
    assert torch.allclose(ratio, torch.exp(-80 * s2 / 4).expand(3, -1))
    mates = ctf(-plane.frequencies, one, 24, 2.0)
    assert torch.allclose(mates, ctf(plane.frequencies, one, 24, 2.0))


def test_astigmatism_changes_the_image_and_its_axis_counts(generator):
    plane = half_plane(32)
    flat = optics(1, generator)
    turned = CtfParameters(**{**flat.__dict__, "defocus_angle_deg": flat.defocus_angle_deg + 90})
    a, b = (ctf(plane.frequencies, p, 32, 2.0) for p in (flat, turned))
    assert (a - b).norm() > 0.3 * a.norm()
    quarter = torch.stack([-plane.frequencies[:, 1], plane.frequencies[:, 0]], -1)
    assert torch.allclose(ctf(quarter, turned, 32, 2.0), a)


def test_white_noise_power_is_found_outside_the_particle(generator):
    box, sigma = 32, 1.7
    images = sigma * torch.randn(1200, box, box, generator=generator)
    images[:, 10:22, 10:22] += 50
    plane = half_plane(box)
    spectrum = imaging.noise_power_outside(images, 10.0, plane)
    assert torch.allclose(spectrum[1:], torch.full((15,), (sigma * box) ** 2), rtol=0.06)


def test_likelihood_is_that_of_the_pixels(generator):
    """For white noise the half plane gives -|image - prediction|^2 / (2 sigma^2)."""
    box, sigma = 11, 0.7
    plane = half_plane(box)
    observed, predicted = (
        to_coefficients(torch.randn(4, box, box, generator=generator).double(), plane)
        for _ in range(2)
    )
    power = torch.full((plane.n_shells,), (sigma * box) ** 2, dtype=torch.float64)
    found = imaging.log_likelihood(observed, predicted, power, plane)
    from cryorecon.physics.fourier import to_images

    pixels = to_images(observed - predicted, plane)
    expected = -(pixels**2).sum((-2, -1)) / (2 * sigma**2)
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("box", [16, 17])
def test_noise_outside_a_circle_is_unmixed_to_the_whole_image_s_spectrum(box, generator):
    plane = half_plane(box)
    axis = torch.fft.fftfreq(box, 1 / box).double()
    radius = (axis[: box // 2 + 1] ** 2 + axis[:, None] ** 2).sqrt()
    shells = (radius.abs() + 0.5).long().clamp(1, plane.n_shells - 1)
    power = 1 + 50 / (1 + shells**2)
    noise = torch.randn(20_000, box, box, generator=generator)
    noise = torch.fft.irfft2(torch.fft.rfft2(noise) * power.sqrt().float(), s=(box, box)) + 3
    wanted = box**2 * (1 + 50 / (1 + torch.arange(plane.n_shells) ** 2))[1:]
    unmixing = imaging.noise_unmixing(0.35 * box, plane)
    found = imaging.noise_powers_outside(noise, 0.35 * box, plane, unmixing).mean(0)
    smoothed = imaging.noise_power_outside(noise, 0.35 * box, plane)
    assert (found[1:] / wanted - 1).abs().max() < 0.03
    assert (smoothed[1:] / wanted - 1).abs().max() > 0.1
    assert found[0] == found[1]


def test_small_optics_groups_have_all_images_spectrum_at_their_level(generator):
    """Of 1, 10 and 10,000 images of 50 coefficients a shell, the last twice as noisy and bent."""
    n = torch.tensor([1.0, 10.0, 1e4, 0.0])[:, None]
    count = (50 * n).expand(4, 40)
    bend = torch.linspace(1, 3, 40)
    true = torch.stack([torch.ones(40), torch.ones(40), 2 * bend, torch.ones(40)])
    draws = 1 + torch.randn(4, 40, generator=generator) / count.clamp(min=1).sqrt()
    power = count * true * draws.clamp(min=0.01)
    found = imaging.pooled_spectra(power, count)
    everyone = power.sum(0) / count.sum(0)
    torch.testing.assert_close(found[2], power[2] / count[2], rtol=0.01, atol=0)
    shape = found[:2] / everyone
    assert float(shape.std(1).max() / shape.mean()) < 0.1
    # Of 10 images a third of each shell is their own, and two thirds of their level.
    own = (power[:2] / everyone).sum(1) / count[:2].sum(1)
    total, shell = count[:2].sum(1), count[:2, 0]
    level = 1 + total / (total + 10_000) * (own - 1)
    wanted = level + shell / (shell + 1000) * (own - level)
    torch.testing.assert_close(shape.mean(1), wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(found[3], everyone)
    alone = imaging.pooled_spectra(power[2:], count[2:])
    torch.testing.assert_close(alone, (power[2] / count[2]).expand(2, 40))
