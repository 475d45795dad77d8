from __future__ import annotations

import math

import pytest
import torch

from cryorecon.engines.mra.problem import (
    ShiftMoments,
    ShiftMomentSums,
    best_shift,
    canonical,
    circulant,
    concatenated,
    estimate_noise_std,
    exact_moments,
    first_phase,
    moment_arrays,
    moment_errors,
    moved,
    observe,
    orbit_error,
    shifted,
)
from cryorecon.engines.mra.solvers import (
    DirectConfig,
    _Descent,
    misfit,
    solve_direct,
    solve_spectral,
)
from cryorecon.engines.mra.training import draw_pairs
from cryorecon.physics.mixtures import MixtureConfig, draw_mixtures


def problems(count, n, generator, components=2):
    return draw_pairs(MixtureConfig(components), count, n, generator, torch.float64)


def rough(count, n, generator):
    """Signals with power at every frequency, densities without repeated values."""
    signal = torch.randn(count, n, generator=generator, dtype=torch.float64)
    density = torch.rand(count, n, generator=generator, dtype=torch.float64) + 0.01
    return signal, density / density.sum(-1, keepdim=True)


def sampled(signal, density, count, noise_std, generator):
    sums = ShiftMomentSums(len(signal))
    sums.add(observe(signal, density, count, noise_std, generator))
    return sums.moments(noise_std)


@pytest.mark.parametrize("n", [15, 16])
def test_exact_moments_are_the_mean_over_all_shifts(n, generator):
    signal, density = rough(3, n, generator)
    first, second = torch.zeros(3, n).double(), torch.zeros(3, n, n).double()
    for by in range(n):
        copy = signal.roll(by, -1)
        first += density[:, by, None] * copy
        second += density[:, by, None, None] * copy[:, :, None] * copy[:, None, :]
    found = exact_moments(signal, density)
    torch.testing.assert_close(found.first, first)
    torch.testing.assert_close(found.second, second)
    single = exact_moments(signal.float(), density.float())
    torch.testing.assert_close(single.second.double(), second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [15, 16])
def test_fourier_moments_have_the_papers_form(n, generator):
    """Equation 15: M2(k, k') = V(k) R(k - k') V(k')*, with a unitary transform of the signal."""
    signal, density = rough(2, n, generator)
    first, second = exact_moments(signal, density).fourier()
    v, r = torch.fft.fft(signal, norm="ortho"), torch.fft.fft(density)
    k = torch.arange(n)
    torch.testing.assert_close(first, v * r)
    lag = r[:, (k[:, None] - k) % n]
    torch.testing.assert_close(second, v[:, :, None] * lag * v.conj()[:, None, :])
    exact = exact_moments(signal, density)
    torch.testing.assert_close(second.abs().square().sum(), exact.second.square().sum())


@pytest.mark.parametrize(("n", "by"), [(16, 5.0), (17, 5.0), (17, -2.37)])
def test_moments_stay_when_signal_and_density_move_against_each_other(n, by, generator):
    signal, density = rough(2, n, generator)
    if by % 1:
        # Frequencies of the density beyond n / 2, which a signal up to n / 4 never asks for, alias.
        signal = torch.fft.irfft(torch.fft.rfft(signal)[:, : n // 4 + 1], n=n)
    shift = torch.full((2,), by, dtype=torch.float64)
    one = exact_moments(signal, density)
    two = exact_moments(shifted(signal, shift), shifted(density, -shift))
    torch.testing.assert_close(one.first, two.first)
    torch.testing.assert_close(one.second, two.second)


def test_moved_moments_are_those_of_the_moved_signal(generator):
    signal, density = rough(2, 17, generator)
    by = torch.tensor([3.0, -1.6], dtype=torch.float64)
    found = moved(exact_moments(signal, density), by)
    expected = exact_moments(shifted(signal, by), density)
    torch.testing.assert_close(found.first, expected.first)
    torch.testing.assert_close(found.second, expected.second)


def test_canonical_signals_have_their_crest_at_sample_0(generator):
    signal, density = problems(4, 32, generator)
    one, two = canonical(signal, density)
    assert float(first_phase(one).abs().max()) < 1e-10
    before, after = exact_moments(signal, density), exact_moments(one, two)
    torch.testing.assert_close(before.second, after.second, atol=1e-5, rtol=0)


def test_sample_moments_agree_with_the_model_within_their_stated_error(generator):
    signal, density = problems(80, 16, generator)
    target = concatenated(
        [sampled(v, r, 2000, 0.7, generator) for v, r in zip(signal, density, strict=True)]
    )
    first, second = moment_arrays(signal, density)
    # Squared errors over what is expected: mean 1 over problems.
    one = ((first - target.first).norm(dim=-1) / target.first_noise).square().mean()
    two = ((second - target.second).norm(dim=(-2, -1)) / target.second_noise).square().mean()
    assert 0.75 < float(one) < 1.3
    assert 0.75 < float(two) < 1.3
    assert float(misfit(signal, density, target).mean()) == pytest.approx(float(one + two) / 2)


def test_pure_noise_vanishes_as_one_over_the_root_of_the_count(generator):
    nothing, uniform = torch.zeros(16), torch.full((16,), 1 / 16)
    sizes = []
    for count in (1000, 64_000):
        found = sampled(nothing, uniform, count, 2.0, generator)
        sizes.append(float(found.second.norm()))
        expected = 4.0 * math.sqrt(16 * 17 / count)
        assert sizes[-1] == pytest.approx(expected, rel=0.3)
    assert sizes[0] / sizes[1] == pytest.approx(8, rel=0.4)


def test_sums_do_not_depend_on_the_blocks(generator):
    images = torch.randn(100, 8, generator=generator, dtype=torch.float64)
    whole, parts = ShiftMomentSums(8), ShiftMomentSums(8)
    whole.add(images)
    for part in images.split(33):
        parts.add(part)
    torch.testing.assert_close(whole.moments(1.0).second, parts.moments(1.0).second)
    torch.testing.assert_close(whole.moments(1.0).second_noise, parts.moments(1.0).second_noise)


def test_a_constant_is_added_to_moments_as_to_observations(generator):
    images = torch.randn(400, 6, generator=generator, dtype=torch.float64) + torch.arange(6)
    low, high = ShiftMomentSums(6), ShiftMomentSums(6)
    high.baseline = -7.5
    low.add(images)
    high.add(images)
    found, expected = low.moments(1.0).plus(7.5), high.moments(1.0)
    torch.testing.assert_close(found.first, expected.first)
    torch.testing.assert_close(found.second, expected.second)
    # Errors that are not independent are bounded.
    assert (found.second_noise >= 0.9 * expected.second_noise).all()
    assert (found.second_noise <= 3 * expected.second_noise).all()


@pytest.mark.parametrize("noise_std", [0.3, 1.0, 5.0])
def test_noise_is_told_from_the_smallest_eigenvalues(noise_std, generator):
    signal, density = (part[0] for part in problems(1, 32, generator))
    sums = ShiftMomentSums(32)
    sums.add(observe(signal, density, 20_000, noise_std, generator))
    found, dimensions = estimate_noise_std(sums.raw_second(), sums.count)
    assert dimensions >= 16
    assert found == pytest.approx(noise_std, rel=0.01)


def test_noise_is_not_told_when_the_signal_fills_all_dimensions(generator):
    signal, density = (part[0] for part in rough(1, 16, generator))
    sums = ShiftMomentSums(16)
    sums.add(observe(3 * signal, density, 20_000, 0.3, generator))
    assert estimate_noise_std(sums.raw_second(), sums.count) == (0.0, 0)


@pytest.mark.parametrize("n", [24, 25])
def test_orbit_error_ignores_shifts_of_any_fraction(n, generator):
    signal = draw_mixtures(MixtureConfig(2, narrowest=0.08), 6, n, generator, torch.float64)
    by = torch.tensor([0.0, 3.0, 0.41, -7.83, 11.97, 0.03], dtype=torch.float64)
    assert float(orbit_error(shifted(signal, by), signal).max()) < 1e-5
    scaled = orbit_error(1.1 * shifted(signal, by), signal)
    torch.testing.assert_close(scaled, torch.full_like(scaled, 0.1), atol=1e-5, rtol=0)


def test_orbit_error_is_no_worse_than_any_shift_of_a_fine_grid(generator):
    estimate, truth = rough(5, 17, generator)
    error = orbit_error(estimate, truth)
    for by in torch.arange(0, 17, 0.02, dtype=torch.float64):
        other = (shifted(estimate, by.expand(5)) - truth).norm(dim=-1) / truth.norm(dim=-1)
        assert bool((error <= other + 1e-9).all())


def test_moment_errors_are_relative_to_the_target(generator):
    signal, density = problems(2, 16, generator)
    target = exact_moments(signal, density)
    one, two = moment_errors(1.1 * signal, density, target)
    torch.testing.assert_close(one, torch.full_like(one, 0.1))
    torch.testing.assert_close(two, torch.full_like(two, 0.21))


@pytest.mark.parametrize("n", [11, 16])
def test_spectral_is_exact_for_an_aperiodic_density(n, generator):
    signal, density = rough(10, n, generator)
    found = solve_spectral(exact_moments(signal, density))
    assert float(orbit_error(found.signal, signal).max()) < 1e-6
    assert float(orbit_error(found.density, density).max()) < 1e-6


def test_spectral_cannot_tell_a_periodic_density(generator):
    """Eigenvalues repeat, and an eigenvector is any mixture of several waves."""
    signal, density = rough(1, 16, generator)
    periodic = sum(density.roll(by, -1) for by in (0, 4, 8, 12)) / 4
    found = solve_spectral(exact_moments(signal, periodic))
    assert float(orbit_error(found.signal, signal)) > 0.1


def test_the_jacobian_is_the_derivative_of_the_residual(generator):
    signal, density = rough(2, 7, generator)
    target = ShiftMoments(
        *moment_arrays(signal.flip(-1), density), torch.ones(2), torch.ones(2) * 3
    )
    descent = _Descent(target.to(torch.float64), signal, density)
    expected = torch.autograd.functional.jacobian(descent.residual, descent.values)
    for problem in range(2):
        torch.testing.assert_close(
            descent.jacobian(descent.values)[problem], expected[problem][:, problem]
        )
    whole = descent.misfits(descent.values)
    torch.testing.assert_close(whole, misfit(*descent.parts(descent.values), descent.target))


@pytest.mark.parametrize("components", [1, 3])
def test_direct_solves_exact_moments(components, generator):
    signal, density = problems(4, 24, generator, components)
    found = solve_direct(exact_moments(signal, density), generator, DirectConfig(starts=2))
    assert float(orbit_error(found.signal, signal).max()) < 0.01


def test_direct_stops_at_the_noise_and_beats_the_spectral_start(generator):
    signal, density = problems(8, 24, generator)
    target = concatenated(
        [sampled(v, r, 40_000, 1.0, generator) for v, r in zip(signal, density, strict=True)]
    )
    found = solve_direct(target, generator, DirectConfig(starts=1))
    assert float(found.misfit.max()) <= 1 + 1e-6
    # Fitted no closer than the smoothest explanation asks: a least squares fit reaches 0.7.
    assert float(found.misfit.mean()) > 0.8
    torch.testing.assert_close(found.density.sum(-1), torch.ones(8).double())
    assert float(found.density.min()) >= 0
    error = orbit_error(found.signal, signal).mean()
    assert float(error) < 0.15
    assert float(error) < float(orbit_error(solve_spectral(target).signal, signal).mean())


def test_mixtures_are_periodic_and_follow_their_widths(generator):
    narrow = draw_mixtures(MixtureConfig(1, 0.05, 0.05, 1.0), 50, 64, generator, torch.float64)
    # One Gaussian of height 1: its mean is sqrt(2 pi) times its width, wherever it lies.
    torch.testing.assert_close(
        narrow.mean(-1), torch.full((50,), 0.05 * math.sqrt(2 * math.pi)).double()
    )
    wide = draw_mixtures(MixtureConfig(1, 0.4, 0.4, 1.0), 50, 64, generator, torch.float64)
    torch.testing.assert_close(
        wide.mean(-1), torch.full((50,), 0.4 * math.sqrt(2 * math.pi)).double(), rtol=1e-4, atol=0
    )
    with pytest.raises(ValueError, match="widths"):
        MixtureConfig(1, 0.2, 0.1)


def test_circulant_and_best_shift_agree(generator):
    signal = torch.randn(9, generator=generator, dtype=torch.float64)
    copies = circulant(signal).mT
    shifts = best_shift(signal.expand(9, -1), copies) % 9
    torch.testing.assert_close(shifts.round() % 9, torch.arange(9).double())
