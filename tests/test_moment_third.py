"""Third moments: what is summed, that it is unbiased, and what a fit makes of it."""

from __future__ import annotations

import math
from dataclasses import replace

import h5py
import pytest
import torch
from test_moment_fit import GEOMETRY, RADIUS, run, three_gaussians
from test_moments import SMALL, _density, _sample_and_truth, pure_noise

from cryorecon.engines.moments.config import MomentFitConfig
from cryorecon.engines.moments.fit import Fitter
from cryorecon.engines.moments.forms import SteerableMoments, steerable_moments
from cryorecon.engines.moments.information import expected_fsc, free_map_share
from cryorecon.engines.moments.sums import MomentBatch, merge_arrays
from cryorecon.engines.moments.sums_steerable import SteerableSums
from cryorecon.engines.moments.third import (
    multiplicity,
    order_pairs,
    real_entries,
    third_moment,
)
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map
from cryorecon.physics.fourier import max_band
from cryorecon.physics.polar import PolarSlices
from cryorecon.physics.sphere import frames, lebedev
from cryorecon.run.moments.estimate import MomentsOptions
from cryorecon.run.moments.store import read_moments

THIRD = replace(SMALL, third_radius=3)


def _batch(images, gain=None, noise_power=0.0):
    power = torch.full((len(images), max_band(images.shape[-1]) + 1), float(noise_power))
    return MomentBatch(images, None, gain, power)


def _images(n, generator, turned=False):
    """Blobs off the centre, without symmetry: n pictures, or n in-plane rotations of one."""
    axis = torch.arange(16.0).double() - 8
    centres = 2 * torch.randn(1 if turned else n, 3, generator=generator, dtype=torch.complex128)
    if turned:
        centres = centres * torch.exp(2j * math.pi * torch.arange(n) / n)[:, None]
    x, y = (torch.exp(-((axis - c[..., None]) ** 2) / 5) for c in (centres.real, centres.imag))
    return y.mT @ x


def test_entries_are_means_of_products_that_in_plane_rotations_leave(generator):
    s = torch.randn(7, 2, 6, generator=generator, dtype=torch.complex128)
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    found = third_moment(s, weights)
    for row, (m, other) in enumerate(order_pairs(5).tolist()):
        expected = torch.einsum(
            "q,qi,qj,qk->ijk", weights.cdouble(), s[..., m], s[..., other], s[..., m + other].conj()
        )
        torch.testing.assert_close(found[row], expected)


def test_opposite_views_are_conjugate(generator):
    volume = torch.randn(12, 12, 12, generator=generator, dtype=torch.float64)
    grid = replace(SMALL, max_radius=3, max_order=6).map_grid(48.0)
    rule = lebedev(9)
    weights = rule.weights * torch.exp(rule.directions[:, 0])
    whole = PolarSlices(12, grid, frames(rule.directions), torch.float64)
    expected = third_moment(whole.harmonics(volume), weights)
    half = rule.hemisphere()
    slices = PolarSlices(12, grid, frames(half.directions), torch.float64)
    one, other = (half.weights / 2 * torch.exp(sign * half.directions[:, 0]) for sign in (1, -1))
    found = third_moment(slices.harmonics(volume), one, other)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert float(expected.imag.abs().max()) > 1e-3 * float(expected.real.abs().max())


def test_entries_that_say_the_same_share_their_weight(generator):
    s = torch.randn(5, 3, 6, generator=generator, dtype=torch.complex128)
    s[..., 0] = s[..., 0].real + 0j
    third = third_moment(s, torch.ones(5, dtype=torch.float64))
    rows = third.flatten()
    alike = (rows[:, None] - rows).abs() < 1e-9
    alike |= (rows[:, None] - rows.conj()).abs() < 1e-9
    torch.testing.assert_close(alike.sum(1).double(), multiplicity(5, 3).flatten())
    assert torch.equal(rows.imag.abs() < 1e-9, real_entries(5, 3).flatten())


@pytest.mark.parametrize(("box", "noise"), [(16, "coloured"), (17, "white")])
def test_pure_noise_vanishes_with_the_square_root_of_the_images(box, noise, generator):
    geometry = replace(SMALL, box=box, diameter_angst=24.0, side_angst=box * 4.0,
                       normalised=True, third_radius=3)  # fmt: skip
    sums, norms = SteerableSums(geometry), []
    for count in (500, 5500):
        for batch in pure_noise(count, geometry, noise, generator):
            sums.add(batch)
        found = sums.finalise()
        beyond = (found.third.abs() / found.third_error)[:, 1:, 1:, 1:] ** 2
        assert beyond.mean() < 1.6
        norms.append(float(found.third.norm()))
    assert 2.2 < norms[0] / norms[1] < 8


def test_noise_that_meets_the_first_moment_is_subtracted(generator):
    images = _images(4000, generator, turned=True)
    clean = SteerableSums(THIRD, dtype=torch.float64)
    clean.add(_batch(images))
    expected, left = clean.finalise().third, []
    noisy = images + torch.randn(4000, 16, 16, generator=generator)
    for power in (256.0, 0.0):
        sums = SteerableSums(THIRD)
        sums.add(_batch(noisy, noise_power=power))
        found = sums.finalise()
        left.append(float((((found.third - expected).abs() / found.third_error) ** 2).mean()))
    assert left[0] < 2 < 10 < left[1]


def test_ctfs_are_divided_out_and_files_add_up(generator):
    """The same images under CTFs of every circle, some of them zero, have the same moments."""
    images = _images(40, generator)
    plain = SteerableSums(THIRD, dtype=torch.float64)
    plain.add(_batch(images))
    expected = plain.finalise()
    whole = SteerableSums(THIRD, dtype=torch.float64)
    angles = len(whole.frequencies) // THIRD.max_radius
    parts = []
    for number, scale in enumerate((1.0, -0.7, 0.4)):
        gain = scale * (1 + 0.5 * number * torch.arange(THIRD.max_radius) / 5)
        gain[2] *= number != 1
        parts.append(gain.repeat_interleave(angles).double().expand(40, -1))
    transform = whole._transform
    first, second = (SteerableSums(THIRD, dtype=torch.float64) for _ in range(2))
    for number, gain in enumerate(parts):
        for sums in (whole, second if number else first):
            sums._transform = _Seen(transform, gain)
            sums.add(_batch(images, gain))
    assert whole.n_images == 120
    found = whole.finalise()
    torch.testing.assert_close(found.third, expected.third, rtol=1e-9, atol=1e-9)
    merge_arrays(first, second)
    for name, array in whole.arrays.items():
        torch.testing.assert_close(first.arrays[name], array, rtol=1e-9, atol=1e-9)


class _Seen:
    """The samples of images under a CTF."""

    def __init__(self, transform, gain):
        self.transform, self.gain = transform, gain

    def samples(self, images):
        samples = self.transform.samples(images)
        return samples * self.gain.view(samples.shape)


@pytest.mark.parametrize("n", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_the_sample_s_third_moment_is_that_of_the_map_within_its_errors(tmp_path, n):
    """With CTF, astigmatism and noise; the map's by quadrature."""
    options = MomentsOptions(diameter_angst=72.0, max_radius=4, third_radius=3)
    found, _, second = _sample_and_truth(tmp_path, options, n_particles=n)
    volume = torch.from_numpy(read_map(tmp_path / "map.mrc").data.copy()).double()
    rule, geometry = lebedev(35), found.geometry
    slices = PolarSlices(48, geometry.map_grid(48 * 2.8), frames(rule.directions), torch.float64)
    weights = rule.weights * _density(5, 3, 4.0, rule.directions)
    harmonics = slices.harmonics(volume)
    scale = float(second.norm() / steerable_moments(harmonics, weights)[1].norm())
    expected = third_moment(harmonics[:, :3, : geometry.third_order + 1], weights) * scale**1.5
    error = ((found.third - expected).abs() / found.third_error)[:, 1:, 1:, 1:]
    assert 0.5 < float((error**2).mean()) < 1.6
    stated = float(found.third_error.norm() / expected.norm())
    assert stated < 0.35 * (1000 / n) ** 0.5
    assert float((found.third - expected).norm() / expected.norm()) < 1.6 * stated


@pytest.fixture(scope="module")
def exact():
    """Moments of three Gaussians, all views alike."""
    geometry = replace(GEOMETRY, third_radius=3)
    rule = lebedev(29)
    slices = PolarSlices(24, geometry.map_grid(), frames(rule.directions), torch.float64)
    harmonics = slices.harmonics(three_gaussians().double())
    first, second = steerable_moments(harmonics, rule.weights)
    third = third_moment(harmonics[:, :3, : geometry.third_order + 1], rule.weights)
    none, kept = torch.zeros_like(second), torch.ones(RADIUS, RADIUS, dtype=torch.bool)
    return SteerableMoments(
        geometry, 1000, first, second, 1e-9 + 0 * first, 1e-9 + none.real, none, kept,
        torch.ones(RADIUS), third, 1e-9 + 0 * third.real,
    )  # fmt: skip


CONFIG = MomentFitConfig(beads=5, iterations=40, settling=30, density_degree=2, radius=3)


def test_third_moments_fix_more_of_the_map(exact):
    fitter = Fitter.of(exact, CONFIG, 3)
    fit = fitter.fit(torch.Generator().manual_seed(0))
    two = Fitter.of(exact, replace(CONFIG, third_radius=0), 3)
    for share in (expected_fsc, free_map_share):
        with_third, without = share(fitter, fit), share(two, fit)
        assert bool((with_third > without - 1e-3).all())
        assert float(with_third[1:].mean()) > float(without[1:].mean()) + 0.02


def test_a_wrong_third_moment_is_not_fitted_and_can_be_left_out(exact):
    wrong = replace(exact, third=-exact.third)
    misfits = [
        Fitter.of(moments, replace(CONFIG, iterations=20, third_radius=use), 3)
        .fit(torch.Generator().manual_seed(0))
        .misfit
        for moments, use in ((wrong, 3), (wrong, 0), (exact, 0))
    ]
    assert misfits[0] > 20 * misfits[1]
    assert misfits[1] == misfits[2]


def test_third_moments_go_through_files(tmp_path, stack_32):
    star, files = stack_32 / "particles.star", [tmp_path / f"{n}.h5" for n in "ab"]
    for path, words in zip(files, (["--third", 3], ["--third", 0]), strict=True):
        run("moments", "estimate", star, "-o", path, "--max-radius", 4, "--diameter", 56, *words)
    moments, plain = read_moments(files[0]), read_moments(files[1])
    assert moments.third.shape == (len(order_pairs(moments.geometry.third_order)), 3, 3, 3)
    assert plain.third is None
    torch.testing.assert_close(moments.second, plain.second)
    own = (moments.third.abs() / moments.third_error)[0, :2, :2, :2]
    assert math.isfinite(float(own.max()))
    assert float(own.max()) > 5
    with pytest.raises(ValueError, match="third_radius is 3 in one and 0 in the other"):
        merge_arrays(*(SteerableSums(m.geometry) for m in (moments, plain)))
    with h5py.File(files[1], "a") as file:
        del file.attrs["third_radius"]
    assert read_moments(files[1]).geometry.third_radius == 0
    for words in (["--third", 5], ["--third", 2, "--form", "full"]):
        with pytest.raises(CryoreconError, match="Third moments to radius"):
            run("moments", "estimate", star, "-o", tmp_path / "d.h5", "--max-radius", 4, *words)


@pytest.mark.parametrize("contrast", ["auto", "black"])
def test_black_particles_have_the_moments_of_white_ones(generator, contrast):
    """First and third change their sign with the images; the map that they tell must not."""
    images = _images(60, generator)
    images = images + 0.01 * torch.randn(images.shape, generator=generator, dtype=torch.float64)
    told = []
    for sign in (1, -1):
        geometry = replace(THIRD, contrast="auto" if sign > 0 else contrast)
        sums = SteerableSums(geometry, dtype=torch.float64)
        sums.add(_batch(sign * images))
        told.append(sums.finalise())
    white, black = told
    assert float(white.third.abs().max()) > 0
    torch.testing.assert_close(black.first, white.first)
    torch.testing.assert_close(black.second, white.second)
    torch.testing.assert_close(black.third, white.third)
