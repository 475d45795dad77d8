"""Moments of particle images: unbiased, with honest errors, in both forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MODEL

from cryorecon.engines.moments.forms import MomentsGeometry, exact_moments, steerable_moments
from cryorecon.engines.moments.sums import MomentBatch, merge_arrays
from cryorecon.engines.moments.sums_full import FullSums, check_full
from cryorecon.engines.moments.sums_steerable import SteerableSums, _untangled
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map
from cryorecon.physics.ctf import CtfParameters, ctf
from cryorecon.physics.fourier import half_plane, max_band, to_images
from cryorecon.physics.imaging import noise_powers_outside, noise_unmixing
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.polar import PolarSlices, PolarTransform
from cryorecon.physics.sphere import frames, lebedev
from cryorecon.run.load import normalised
from cryorecon.run.moments.estimate import MomentsOptions, estimate_moments
from cryorecon.run.simulate import noise_gain, simulate
from cryorecon.run.simulate_config import SimulateConfig

SMALL = MomentsGeometry("steerable", 16, 4.0, 40.0, 64.0, 5, 9, normalised=False, ctf=False)


def _batch(images, ctf_values=None, noise_power=0.0):
    n_shells = max_band(images.shape[-1]) + 1
    power = torch.full((len(images), n_shells), float(noise_power))
    return MomentBatch(images, None, ctf_values, power)


def _optics(n, astigmatism, generator):
    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    mean, one = uniform(10_000, 20_000), torch.ones(n, dtype=torch.float64)
    return CtfParameters(
        mean + astigmatism / 2, mean - astigmatism / 2, uniform(-90, 90), one * 300, one * 2.7,
        one * 0.1, one * 0, one * 0, one * 0,
    )  # fmt: skip


def pure_noise(n, geometry, noise, generator):
    """Batches of 500 images without particles, white or coloured, their noise as estimated."""
    box, radius_px = geometry.box, geometry.diameter / 2 * geometry.box
    plane, outside = half_plane(box), 1 - soft_ball(box, radius_px, 2.0, 2)
    gain, unmixing = noise_gain(box, 4.0, 6.0), noise_unmixing(radius_px, plane)
    for _ in range(n // 500):
        images = torch.randn(500, box, box, generator=generator) * 3 + 1
        if noise == "coloured":
            images = torch.fft.irfft2(torch.fft.rfft2(images) * gain, s=(box, box))
        images = normalised(images, outside)
        power = noise_powers_outside(images, radius_px, plane, unmixing)
        yield MomentBatch(images, None, None, power)


@pytest.mark.parametrize("box", [16, 17])
@pytest.mark.parametrize("noise", ["white", "coloured"])
def test_pure_noise_leaves_nothing_but_its_standard_error(box, noise, generator):
    """Both moments vanish as the square root of the number of images, for any form."""
    steerable = MomentsGeometry("steerable", box, 4.0, 24.0, box * 4.0, 5, 9)
    full = replace(steerable, form="full", max_order=0)
    norms = []
    for n in (500, 8000):
        sums = [SteerableSums(steerable), FullSums(full)]
        for batch in pure_noise(n, steerable, noise, generator):
            for part in sums:
                part.add(batch)
        found = [part.finalise() for part in sums]
        for moments in found:
            chi2 = (moments.second[..., 1:, 1:].abs() / moments.second_error[..., 1:, 1:]) ** 2
            assert chi2.mean() < 1.5
            first = (moments.first[1:].abs() / moments.first_error[1:]) ** 2
            assert 0.1 < first.mean() < 3
        norms.append([float(moments.second.norm()) for moments in found])
    for few, many in zip(*norms, strict=True):
        assert 2.2 < few / many < 8


def test_without_debiasing_there_would_be_much_left(generator):
    images = torch.randn(2000, 16, 16, generator=generator)
    left = []
    for power in (0.0, 256.0):
        sums = SteerableSums(SMALL)
        sums.add(_batch(images, noise_power=power))
        left.append(float(sums.finalise().second.norm()))
    assert left[1] < 0.1 * left[0]


@pytest.mark.parametrize("box", [16, 17])
def test_full_and_steerable_agree_where_both_apply(box, generator):
    """The blocks are sums over the full matrix: harmonics are linear in the Fourier pixels."""
    geometry = replace(SMALL, box=box, max_radius=4, max_order=6, side_angst=4.0 * box)
    full = FullSums(replace(geometry, form="full", max_radius=max_band(box), max_order=0))
    plane = half_plane(box)
    shape = (40, len(plane))
    coefficients = torch.randn(shape, generator=generator, dtype=torch.complex128)
    coefficients[:, 0] = coefficients[:, 0].real + 0j
    images = to_images(coefficients, plane)
    steerable = SteerableSums(geometry, dtype=torch.float64)
    for part in (steerable, full):
        part.add(_batch(images))
    grid = geometry.image_grid()
    transform = PolarTransform(box, grid, torch.float64)
    unit = torch.eye(len(plane), dtype=torch.complex128)
    real, imaginary = (
        grid.harmonics(transform.samples(to_images(unit * factor, plane))) for factor in (1, 1j)
    )
    imaginary[0] = 0
    # s = sum of alpha Y + beta Y* over the half plane; the origin counts once.
    whole = torch.cat([(real - 1j * imaginary) / 2, ((real + 1j * imaginary) / 2)[1:]])
    whole[0] = real[0]
    _, first, second = full.finalise().whole_plane()
    found = steerable.finalise()
    expected = torch.einsum("qkm,qr,rlm->mkl", whole, second, whole.conj())
    assert (found.second - expected).norm() < 1e-4 * expected.norm()
    mean = torch.einsum("qkm,q->mk", whole, first)[0].real
    sign = 1 if (found.first * mean).sum() > 0 else -1
    assert (found.first - sign * mean).norm() < 1e-4 * mean.norm()


def test_the_full_matrix_is_that_of_whole_images(generator):
    geometry = replace(SMALL, form="full", max_radius=4, max_order=0)
    images = torch.randn(30, 16, 16, generator=generator, dtype=torch.float64)
    sums = FullSums(geometry)
    sums.add(_batch(images))
    frequencies, first, second = sums.finalise().whole_plane()
    centre = 8
    y = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(images, (-2, -1))), (-2, -1))
    y = y[:, frequencies[:, 1] + centre, frequencies[:, 0] + centre]
    assert torch.allclose(second, y.T @ y.conj() / 30, atol=1e-9)
    assert torch.allclose(first, y.mean(0), atol=1e-9)
    assert torch.allclose(second, second.mH, atol=1e-9)


@pytest.mark.parametrize("form", ["steerable", "full"])
def test_merging_is_exact_and_single_precision_is_enough(form, generator):
    geometry = SMALL if form == "steerable" else replace(SMALL, form="full", max_order=0)
    kind = SteerableSums if form == "steerable" else FullSums
    images = torch.randn(60, 16, 16, generator=generator, dtype=torch.float64)
    whole, first, second = kind(geometry), kind(geometry), kind(geometry)
    gain = torch.rand(60, len(whole.frequencies), generator=generator)
    whole.add(_batch(images, gain, 100.0))
    first.add(_batch(images[:20], gain[:20], 100.0))
    second.add(_batch(images[20:], gain[20:], 100.0))
    merge_arrays(first, second)
    assert first.n_images == 60
    # Single precision rounds differently in batches of another length.
    for name, array in whole.arrays.items():
        assert (first.arrays[name] - array).abs().max() <= 2e-6 * array.abs().max(), name
    if form == "steerable":
        double = SteerableSums(geometry, dtype=torch.float64)
        double.add(_batch(images, gain, 100.0))
        a, b = double.finalise(), whole.finalise()
        assert (a.second - b.second).norm() < 2e-6 * a.second.norm()
    with pytest.raises(ValueError, match="max_radius is 5 in one and 4 in the other"):
        merge_arrays(first, kind(replace(geometry, max_radius=4)))


def test_astigmatism_is_undone(generator):
    """Images turned every way under astigmatic CTFs: exact without noise, wrong if averaged."""
    geometry = MomentsGeometry("steerable", 32, 4.0, 60.0, 75.0, 12, 24, False, 0.0, True)
    volume = torch.randn(10, 10, 10, generator=generator, dtype=torch.float64)
    slices = PolarSlices(10, geometry.map_grid(40.0), frames(torch.eye(3)[:1]), torch.float64)
    s = slices.harmonics(volume)[0].T
    exact = s[:, :, None] * s[:, None, :].conj()
    sums = SteerableSums(geometry, dtype=torch.float64)
    n, grid = 720, geometry.image_grid()
    optics = _optics(n, 1000.0, generator)
    psi = torch.arange(n) * (2 * torch.pi / n * 7)
    orders = torch.arange(geometry.max_order + 1)
    # The same slice at every angle: samples from its harmonics, both signs of m.
    turned = (
        s[None] * torch.polar(torch.ones(()).double(), psi.double()[:, None] * orders)[..., None]
    )
    waves = torch.polar(torch.ones(()).double(), orders[:, None] * grid.angles)
    mates = turned * (-1.0) ** orders[:, None]
    samples = torch.einsum("nmk,mt->nkt", turned, waves)
    samples += torch.einsum("nmk,mt->nkt", mates[:, 1:].conj(), waves[1:].conj())
    gain = ctf(sums.frequencies, optics, 32, 4.0).view(samples.shape)
    # Once by the microscope, once by the estimator.
    sums._add_signal(grid.harmonics(samples * gain**2))
    sums._add_weights(gain, torch.zeros(n, 16, dtype=torch.float64))
    sums.n_images = n
    found = sums.finalise().second
    sums.arrays["weight"][1:] = 0
    averaged = sums.finalise().second
    error = [(m - exact)[:20, 8:, 8:].norm() / exact[:20, 8:, 8:].norm() for m in (found, averaged)]
    assert error[0] < 0.05
    assert error[1] > 2 * error[0]


def _density(seed, clusters, concentration, directions):
    """The mixture of von Mises-Fisher distributions that `simulate` draws views from."""
    draw = np.random.SeedSequence(seed).spawn(4)[0].generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(draw >> 1))
    centres = torch.randn(clusters, 3, generator=generator, dtype=torch.float64)
    centres = torch.nn.functional.normalize(centres, dim=-1)
    peak = 2 * concentration / (1 - math.exp(-2 * concentration))
    return (torch.exp(concentration * (directions @ centres.T - 1)) * peak).mean(1)


def _sample_and_truth(folder, options, **changes):
    config = SimulateConfig(
        box=48, pixel_size_angst=2.8, snr=0.02, view_clusters=3, view_concentration=4.0, seed=5
    )
    config = replace(config, **changes)
    simulate(MODEL, folder, config)
    found = estimate_moments(folder / "particles.star", folder / "m.h5", options)
    volume = torch.from_numpy(read_map(folder / "map.mrc").data.copy()).double()
    rule = lebedev(29)
    weights = rule.weights * _density(5, 3, 4.0, rule.directions)
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    grid = found.geometry.map_grid(config.box * config.pixel_size_angst)
    first, second = exact_moments(volume, rule.directions, weights, grid)
    inverse = 1 / found.second_error**2
    scale = float((inverse * (found.second.conj() * second).real).sum())
    scale /= float((inverse * second.abs() ** 2).sum())
    return found, first * scale**0.5, second * scale


def _check(found, first, second):
    # Orders that the particle has at each radius; beyond, errors of interpolation rule.
    geometry = found.geometry
    orders = torch.arange(geometry.max_order + 1)[:, None]
    has = orders <= 2.5 * torch.arange(1, geometry.max_radius + 1) + 2
    has = has[:, :, None] & has[:, None, :]
    chi2 = ((found.second - second).abs() / found.second_error) ** 2
    assert 0.6 < float(chi2[has].mean()) < 1.5
    assert float((((found.first - first) / found.first_error) ** 2).mean()) < 2.5
    stated = float((found.second_error[has] ** 2).sum() ** 0.5)
    assert float((found.second - second)[has].norm()) < 1.6 * stated
    return stated / float(second.norm())


NO_CTF = {
    "defocus_min_angst": 0.0,
    "defocus_max_angst": 0.0,
    "spherical_aberration_mm": 0.0,
    "amplitude_contrast": 1.0,
    "astigmatism_angst": 0.0,
}


def test_the_sample_s_moments_are_those_of_the_map_within_their_errors(tmp_path):
    options = MomentsOptions(diameter_angst=72.0, max_radius=8)
    stated = _check(*_sample_and_truth(tmp_path, options, n_particles=2000))
    assert stated < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [NO_CTF, {"astigmatism_angst": 2000.0, "shift_angst": 6.0}, {"noise": "coloured"}],
    ids=["no CTF", "astigmatism and shifts", "coloured noise"],
)
def test_more_images_come_closer(tmp_path, changes):
    options = MomentsOptions(diameter_angst=72.0, max_radius=10)
    stated = [
        _check(*_sample_and_truth(tmp_path, options, n_particles=n, **changes))
        for n in (1000, 10_000)
    ]
    assert stated[0] / stated[1] == pytest.approx(10**0.5, rel=0.3)


def test_half_a_sphere_is_enough_and_the_maths_is_differentiable(generator):
    volume = torch.randn(12, 12, 12, generator=generator, dtype=torch.float64)
    grid = replace(SMALL, max_radius=3, max_order=6).map_grid()
    rule = lebedev(11)
    tilt = torch.tensor([0.5, -0.3, 0.6], dtype=torch.float64)
    rho = (rule.directions @ tilt).exp()
    whole = exact_moments(volume, rule.directions, rule.weights * rho, grid)
    half = rule.hemisphere()
    slices = PolarSlices(12, grid, frames(half.directions), torch.float64)
    harmonics = slices.harmonics(volume.requires_grad_())
    density = [(half.weights / 2) * (sign * half.directions @ tilt).exp() for sign in (1, -1)]
    first, second = steerable_moments(harmonics, *density)
    assert torch.allclose(first, whole[0], rtol=1e-4, atol=1e-4 * float(whole[0].abs().max()))
    assert (second - whole[1]).norm() < 1e-4 * whole[1].norm()
    assert second.imag.norm() > 1e-3 * second.norm()
    second.abs().square().sum().backward()
    assert volume.grad.norm() > 0


def test_entries_that_no_image_measures_are_marked(generator):
    sums = SteerableSums(replace(SMALL, ctf=True))
    images = torch.randn(20, 16, 16, generator=generator)
    gain = torch.ones(20, 5, len(sums.frequencies) // 5)
    gain[:, 2] = 0
    sums.add(_batch(images, gain.flatten(1), 256.0))
    found = sums.finalise()
    assert not found.measured[2].any()
    assert not found.measured[:, 2].any()
    assert found.measured[0, 0]
    assert (found.second[:, 2] == 0).all()
    assert torch.isinf(found.second_error[:, 2]).all()
    assert found.conditioning[2] == 0


@pytest.mark.parametrize("strength", [0.1, 1.0], ids=["steady", "weak pivots"])
def test_astigmatic_systems_are_solved_as_by_pivoting(strength, generator):
    """Banded factors by parity of the order, against one dense matrix; some pairs not measured."""
    draw = torch.randn(30, 5, 4, generator=generator, dtype=torch.complex128) * strength
    draw[:, 0] = 1 + torch.rand(30, 4, generator=generator).double()
    weight = torch.einsum("nhk,nhl->hkl", draw, draw.conj())
    values = torch.randn(2, 8, 4, 4, generator=generator, dtype=torch.complex128)
    values[:, 0] = values[:, 0].real + 0j
    measured = torch.ones(4, 4, dtype=torch.bool)
    measured[1, 2] = False
    found = _untangled(values, weight, measured)
    orders = torch.arange(-7, 8)
    gap = orders[:, None] - orders
    for k, other in ((0, 0), (0, 3), (3, 1), (2, 2)):
        bands = weight[:, k, other]
        entries = bands[(gap.abs() // 2).clamp(max=4)]
        matrix = torch.where(gap >= 0, entries, entries.conj())
        matrix = matrix * ((gap % 2 == 0) & (gap.abs() <= 8))
        whole = torch.cat([values[:, 1:, k, other].flip(1).conj(), values[:, :, k, other]], 1)
        expected = torch.linalg.solve(matrix, whole.T).T[:, 7:]
        assert torch.allclose(found[:, :, k, other], expected, rtol=1e-8, atol=1e-10)
    assert not found[:, :, 1, 2].any()


def test_subtracting_the_noise_tells_how_far_it_is(generator):
    sums, told = SteerableSums(SMALL), []
    sums.add(_batch(torch.randn(4, 16, 16, generator=generator), noise_power=256.0))
    sums.finalise(lambda done, total: told.append((done, total)))
    assert told == [(shell, 8) for shell in range(1, 9)]


def test_the_full_form_says_when_it_is_too_large():
    geometry = replace(SMALL, form="full", box=128, max_radius=32, max_order=0)
    with pytest.raises(CryoreconError, match="65\\^2 x 65\\^2"):
        check_full(geometry, 10**12)
    with pytest.raises(CryoreconError, match="MB are free"):
        check_full(replace(geometry, max_radius=31), 10**8)
    check_full(replace(geometry, max_radius=31), 10**9)
