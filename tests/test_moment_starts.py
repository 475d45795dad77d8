"""Fits of moments from a given map, and what is said of moments and search."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from conftest import invoke as run

from cryorecon.engines.moments.config import MomentFitConfig
from cryorecon.engines.moments.fit import Fitter, MomentFit
from cryorecon.engines.moments.forms import MomentsGeometry, SteerableMoments, exact_moments
from cryorecon.engines.moments.information import free_map_share
from cryorecon.engines.moments.models import Beads, ViewDensity
from cryorecon.engines.moments.starts import fit_from_map, start_steps
from cryorecon.engines.moments.sums_steerable import SteerableSums
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.star import read_star
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.masks import Support
from cryorecon.physics.sphere import lebedev
from cryorecon.run.moments.maps import fsc_by_radius, on_images, on_particle_box
from cryorecon.run.moments.start_map import NearFit, _verdict
from cryorecon.run.moments.store import Progress, save_progress

RADIUS = 4
GEOMETRY = MomentsGeometry("steerable", 24, 1.0, 18.0, 24.0, RADIUS, 11)


def five_gaussians():
    """No symmetry, no mirror plane."""
    axis = (torch.arange(24) - 12).double()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    volume = torch.zeros(24, 24, 24, dtype=torch.float64)
    centres = ((4, 0, 1), (-3, 2.5, 0), (0, -3, -3), (1, 4, 3), (-2, -2, 4))
    for mass, centre in zip((1.0, 1.5, 2.0, 1.2, 0.8), centres, strict=True):
        squares = sum((a - c) ** 2 for a, c in zip((x, y, z), centre, strict=True))
        volume += mass * torch.exp(-squares / (2 * 1.8**2))
    return volume / volume.norm()


def views():
    rule = lebedev(29)
    lean = 1.5 * rule.directions[:, 0] + rule.directions[:, 1] ** 2
    weights = rule.weights * torch.exp(lean + rule.directions[:, 2])
    return rule.directions, weights / weights.sum()


@pytest.fixture(scope="module")
def exact():
    first, second = exact_moments(five_gaussians(), *views(), GEOMETRY.map_grid())
    nothing = torch.zeros_like(second)
    return SteerableMoments(
        GEOMETRY, 1000, first, second, 1e-9 + 0 * first, 1e-9 + nothing.real, nothing,
        torch.ones(RADIUS, RADIUS, dtype=torch.bool), torch.ones(RADIUS),
    )  # fmt: skip


@pytest.fixture
def files(tmp_path, exact):
    """Moments and the map that they are of, in files."""
    save_progress(tmp_path / "m.h5", Progress(SteerableSums(GEOMETRY), 10, 10, ("x",)), exact)
    write_map(tmp_path / "true.mrc", five_gaussians().float().numpy(), 1.0)
    return tmp_path


def test_the_other_hand_has_the_same_moments():
    """Whatever the views: an inverted map's images are the map's own, turned by 180 degrees."""
    volume, (directions, weights) = five_gaussians(), views()
    inverted = volume.flip(0, 1, 2).roll((1, 1, 1), (0, 1, 2))
    assert float((inverted - volume).norm()) > 0.5
    for one, other in zip(
        exact_moments(volume, directions, weights, GEOMETRY.map_grid()),
        exact_moments(inverted, directions, weights, GEOMETRY.map_grid()),
        strict=True,
    ):
        assert float((one - other).abs().max()) < 1e-7 * float(one.abs().max())


@pytest.mark.parametrize("kind", ["beads", pytest.param("grid", marks=pytest.mark.slow)])
def test_a_fit_from_the_map_stays_there(exact, kind):
    config = MomentFitConfig(
        volume=kind, beads=8, width=24, iterations=40, settling=5, density_degree=4, radius=RADIUS
    )
    fitter = Fitter.of(exact, config, RADIUS)
    given, steps = five_gaussians() * 7.0, []
    inside = on_particle_box(given, GEOMETRY, RADIUS)
    start, fit = fit_from_map(fitter, inside, torch.Generator().manual_seed(0), steps.append)
    assert sum(steps) == start_steps(fitter)
    laid = on_images(start, GEOMETRY, RADIUS)
    assert float(fsc_curve(laid, given)[1 : RADIUS + 1].min()) > 0.9
    # Amplitudes follow the moments, not the map.
    found = on_images(fit.volume, GEOMETRY, RADIUS)
    assert float(found.sum() / given.sum()) == pytest.approx(1 / 7, rel=0.05)
    assert float(fsc_curve(found, given)[1 : RADIUS + 1].min()) > 0.9
    assert max(fit.frobenius) < 0.02


def test_a_free_map_is_fixed_the_less_the_larger_its_support_and_the_errors(exact):
    config = MomentFitConfig(
        beads=5, iterations=1, settling=1, density_degree=2, radius=3, model_error=1e-3
    )
    volume = Beads(5, 0.4, torch.Generator().manual_seed(1))
    density = ViewDensity(2)
    with torch.no_grad():
        density.coefficients.copy_(torch.randn(8, generator=torch.Generator().manual_seed(2)))
    fit = MomentFit(volume, density, 0.1, (), (), 0.1)
    shares = [
        free_map_share(Fitter.of(exact, replace(config, model_error=error), 3), fit, Support(ball))
        for error, ball in ((1e-3, 0.2), (1e-3, 0.4), (1e-1, 0.4))
    ]
    small, large, dull = (share[1:] for share in shares)
    assert bool((small > large).all())
    assert bool((large > dull).all())
    assert float(small[0]) > 0.5
    # A ball holds more unknowns than moments have entries.
    assert float(large[2]) < 0.5


@pytest.mark.slow
def test_empty_shells_of_a_blurred_start_stay_empty(exact):
    config = MomentFitConfig(
        volume="grid", iterations=1, settling=1, density_degree=2, radius=RADIUS
    )
    fitter = Fitter.of(exact, config, RADIUS)
    sharp = on_particle_box(five_gaussians(), GEOMETRY, RADIUS)
    transform = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(sharp)))
    axis = torch.arange(len(sharp)) - len(sharp) // 2
    distance = sum(a**2 for a in torch.meshgrid(axis, axis, axis, indexing="ij")) ** 0.5
    cut = torch.where(distance < 2.5, transform, torch.zeros_like(transform))
    blurred = torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(cut))).real
    start, _ = fit_from_map(fitter, blurred, torch.Generator().manual_seed(0), like=sharp)
    with torch.no_grad():
        laid = start.density(len(sharp)).double()
    laid = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(laid)))
    for radius in (3, 4):
        shell = (distance - radius).abs() <= 0.5
        assert float(laid[shell].norm()) < 0.5 * float(transform[shell].norm())


@pytest.mark.parametrize(("box", "pixel"), [(24, 1.0), (25, 1.1), (40, 0.9)])
def test_maps_go_to_the_particle_box_and_back(box, pixel):
    geometry = replace(GEOMETRY, box=box, pixel_size_angst=pixel)
    axis = (torch.arange(box) - box // 2) * pixel
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    volume = torch.exp(-((x - 3) ** 2 + (y + 2) ** 2 + (z - 1) ** 2) / 18)
    inside = on_particle_box(volume, geometry, 8)
    assert float(inside.sum()) == pytest.approx(float(volume.sum()), rel=5e-3)
    centre = (torch.arange(len(inside)) - len(inside) // 2) * (24.0 / len(inside))
    mass = inside.sum((0, 1)), inside.sum((0, 2)), inside.sum((1, 2))
    found = [float((m * centre).sum() / m.sum()) for m in mass]
    assert found == pytest.approx([3, -2, 1], abs=0.05)


def test_fsc_by_radius_is_of_cycles_per_particle_box(generator):
    """In an image twice as wide, radius k is shell 2 k."""
    geometry = replace(GEOMETRY, box=48)
    one, other = (torch.randn(48, 48, 48, generator=generator) for _ in range(2))
    curve = fsc_curve(one, one + other)
    found = fsc_by_radius(one, one + other, geometry, 5)
    assert torch.allclose(found, curve[:11:2])


SHORT = ["--max-radius", 3, "--set", "iterations=4", "--set", "settling=2",
         "--set", "first_iterations=2",
         "--set", "beads=8", "--set", "density_degree=2"]  # fmt: skip


@pytest.mark.slow
def test_the_start_map_is_labelled_and_leaves_the_result_alone(files):
    words = ["moments", "reconstruct", files / "m.h5", *SHORT, "--starts", 2, "--allow-ambiguous"]
    run(*words, "-o", files / "plain")
    done = run(*words, "-o", files / "near", "--start-map", files / "true.mrc")
    assert done.exit_code == 0, done.output
    log = (files / "near" / "run.log").read_text()
    assert f"START MAP {files / 'true.mrc'}" in log
    assert "random start" in log
    assert "against" in log
    config = yaml.safe_load((files / "near" / "job.yaml").read_text())["config"]
    assert config["start_map"]["path"] == str(files / "true.mrc")
    plain, near = (read_map(files / n / "initial_model.mrc").data for n in ("plain", "near"))
    assert (plain == near).all()
    table = read_star(files / "near" / "shells.star")["shells"].astype(float)
    assert table["cryoreconRadius"].tolist() == [1, 2, 3]
    assert table["cryoreconFscModelOnMap"].min() > 0.9
    assert {"cryoreconFscFitFromMap", "cryoreconFscRandomWithMap", "cryoreconExpectedFsc"} <= set(
        table
    )


def test_without_random_starts_there_is_no_result_but_the_comparison(files):
    words = ["moments", "reconstruct", files / "m.h5", "-o", files / "job", *SHORT]
    assert run(*words, "--starts", 0).exit_code == 2
    assert run(*words, "--starts", 1).exit_code == 2
    assert run(*words, "--start-blur", 9).exit_code == 2
    near = ["--starts", 0, "--start-map", files / "true.mrc"]
    with pytest.raises(CryoreconError, match="leaves nothing"):
        run(*words, *near, "--start-blur", 99)
    done = run(*words, *near, "--start-blur", 9, "--overwrite")
    assert done.exit_code == 0, done.output
    assert "low-passed to 9 A" in done.output
    assert not (files / "job" / "initial_model.mrc").exists()
    table = read_star(files / "job" / "shells.star")["shells"].astype(float)
    assert "cryoreconFscRandomWithMap" not in table
    # 24 A / 9 A: radius 3 was not in the start.
    laid = table["cryoreconFscModelOnMap"].tolist()
    assert min(laid[:2]) > 0.9
    found = read_map(files / "job" / "from_start_map.mrc")
    assert found.data.shape == (24, 24, 24)
    write_map(files / "odd.mrc", found.data[:23, :23, :23], 1.0)
    with pytest.raises(CryoreconError, match="start map"):
        run(*words, "--starts", 0, "--start-map", files / "odd.mrc", "--overwrite")


@pytest.mark.parametrize(
    ("misfit", "reached", "word"),
    [(0.3, 2, "MOMENTS"), (0.5, 2, "SEARCH"), (0.3, 4, "come as near"), (0.5, 4, "come as near")],
)
def test_moments_and_search_are_told_apart(misfit, reached, word):
    ones = torch.ones(5, dtype=torch.float64)
    nothing = torch.zeros(1)
    fit = MomentFit(None, ViewDensity(1), 0.2, (), (), 0.1)
    near = NearFit("x", nothing, fit, ones, ones, ones, ones)
    random = torch.where(torch.arange(5) <= reached, ones, 0 * ones)
    assert word in _verdict(near, misfit, random, GEOMETRY)
