"""Maps from moments: models, fits, and what is said when moments do not determine a map."""

from __future__ import annotations

import io
import math
import shlex
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import invoke as run

from cryorecon.cli.main import main
from cryorecon.cli.moments_reconstruct import STARTS
from cryorecon.engines.moments import descent
from cryorecon.engines.moments.config import MomentFitConfig, stages
from cryorecon.engines.moments.fit import Fitter, MomentFit, visible_radius
from cryorecon.engines.moments.forms import MomentsGeometry, SteerableMoments, exact_moments
from cryorecon.engines.moments.information import expected_fsc
from cryorecon.engines.moments.models import Beads, ViewDensity, Views, new_volume
from cryorecon.engines.moments.sums_steerable import SteerableSums
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.star import read_star
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.fourier import fft_centred, radius_grid
from cryorecon.physics.sphere import lebedev
from cryorecon.run.moments import reader as moments_reader
from cryorecon.run.moments.estimate import MomentsOptions, resolve_geometry
from cryorecon.run.moments.maps import on_images
from cryorecon.run.moments.store import Progress, read_moments, save_progress
from cryorecon.run.moments.trust import Trust

RADIUS = 4
GEOMETRY = MomentsGeometry("steerable", 24, 1.0, 18.0, 24.0, RADIUS, 11)


def three_gaussians(size=24, side_angst=24.0):
    axis = (torch.arange(size) - size // 2) * (side_angst / size)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    volume = torch.zeros(size, size, size)
    centres = ((4.0, 0.0, 1.0), (-3.0, 2.5, 0.0), (0.0, -3.0, -3.0))
    for mass, centre in zip((1.0, 1.5, 2.0), centres, strict=True):
        squares = sum((a - c) ** 2 for a, c in zip((x, y, z), centre, strict=True))
        volume += mass * torch.exp(-squares / (2 * 1.8**2))
    return volume / volume.norm()


@pytest.fixture(scope="module")
def exact():
    """Moments of three Gaussians seen mostly from one side."""
    rule = lebedev(41)
    weights = rule.weights * torch.exp(1.5 * rule.directions[:, 0] + rule.directions[:, 1] ** 2)
    volume = three_gaussians().double()
    grid = GEOMETRY.map_grid()
    first, second = exact_moments(volume, rule.directions, weights / weights.sum(), grid)
    nothing = torch.zeros_like(second)
    kept = torch.ones(RADIUS, RADIUS, dtype=torch.bool)
    return SteerableMoments(
        GEOMETRY, 1000, first, second, 1e-9 + 0 * first, 1e-9 + nothing.real, nothing, kept,
        torch.ones(RADIUS),
    )  # fmt: skip


def test_a_start_from_nothing_finds_three_gaussians(exact):
    config = MomentFitConfig(beads=12, iterations=100, settling=60, density_degree=4, radius=RADIUS)
    fitter = Fitter.of(exact, config, RADIUS)
    steps = []
    found = fitter.fit(torch.Generator().manual_seed(0), steps.append)
    assert sum(steps) == fitter.steps
    assert max(found.frobenius) < 0.01
    truth = three_gaussians()
    with torch.no_grad():
        volume = found.volume.density(24)
    moved = apply_alignment(volume, align_maps(volume, truth, 1.0, finest_angst=5.0))
    assert float(fsc_curve(moved, truth)[1 : RADIUS + 1].min()) > 0.8


def test_information_falls_as_errors_rise(exact):
    """Errors ten times as large: less is determined; and nothing by a moment without weight."""
    config = MomentFitConfig(
        beads=3, iterations=60, settling=20, density_degree=2, radius=RADIUS, model_error=1e-6
    )
    curves = []
    for share in (1e-4, 1e-2, 1e3):
        error = share * exact.second.abs().max()
        first = share * exact.first.abs().max() + 0 * exact.first_error
        given = replace(exact, second_error=error + 0 * exact.second_error, first_error=first)
        fitter = Fitter.of(given, config, RADIUS)
        if not curves:
            found = Fitter.of(exact, MomentFitConfig(**vars(config)), RADIUS).fit(
                torch.Generator().manual_seed(0)
            )
        before = [p.detach().clone() for p in found.volume.parameters()]
        curves.append(expected_fsc(fitter, found))
        after = list(found.volume.parameters())
        assert all(torch.equal(a, b.detach()) for a, b in zip(before, after, strict=True))
    sharp, dull, blind = (curve[1:] for curve in curves)
    assert float(sharp.min()) > 0.98
    assert bool((dull < sharp).all())
    assert bool((blind < dull).all())
    assert float(blind[-1]) < 0.5


def test_one_seed_is_one_result(exact):
    config = MomentFitConfig(beads=5, iterations=6, settling=2, first_iterations=2, radius=RADIUS)
    fitter = Fitter.of(exact, config, RADIUS)
    one, same, other = (fitter.fit(torch.Generator().manual_seed(s)).misfit for s in (3, 3, 4))
    assert one == same != other


@pytest.mark.parametrize("kind", ["beads", "grid", "rmfn", "fouriernet"])
@pytest.mark.parametrize("density", ["harmonics", "free", "encoder"])
def test_every_parameter_of_every_model_moves(exact, kind, density):
    config = MomentFitConfig(
        volume=kind, density=density, beads=6, width=16, iterations=2, settling=2,
        first_iterations=1, radius=RADIUS,
    )  # fmt: skip
    fitter = Fitter.of(exact, config, RADIUS)
    generator = torch.Generator().manual_seed(1)
    fresh = new_volume(kind, RADIUS, fitter.particle_radius, 6, 16, generator)
    found = fitter.fit(torch.Generator().manual_seed(1))
    assert math.isfinite(found.misfit)
    for (name, before), after in zip(
        fresh.named_parameters(), found.volume.parameters(), strict=True
    ):
        assert not torch.equal(before, after.detach()), name
    parts = dict(found.density.named_parameters())
    assert len(parts) == {"harmonics": 1, "free": 2, "encoder": 20}[density]
    before = dict(fitter.new_density(generator).named_parameters())
    for name, after in parts.items():
        start = before.get(name, torch.zeros(1))
        assert float((after - start).detach().abs().max()) > 0, name


@pytest.mark.parametrize("kind", ["beads", "grid", "rmfn"])
def test_maps_are_the_same_on_any_grid(kind, generator):
    model = new_volume(kind, 4, 0.4, 8, 16, generator)
    with torch.no_grad():
        sums = [float(model.density(size).sum()) for size in (24, 33, 40)]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-3)


def test_beads_have_the_transform_of_gaussians(generator):
    model = Beads(4, 0.4, generator)
    grid = GEOMETRY.map_grid()
    views = Views.of(grid, 24, 2)
    with torch.no_grad():
        found = model.harmonics(views)
        along = views.rotations[:, :2].float() @ model.centres.T
        angle = grid.angles.float()
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        distance = torch.einsum("td,qdb->qtb", direction, along)
        radii = grid.radii.float()[:, None, None]
        phase = -2 * math.pi * radii * distance[:, None]
        fall = torch.exp(-2 * (math.pi * radii * model.log_width.exp()) ** 2)
        samples = (model.log_mass.exp() * torch.polar(fall.expand_as(phase), phase)).sum(-1)
        expected = grid.harmonics(samples)
    assert float((found - expected).norm() / expected.norm()) < 2e-3


def test_densities_of_views_are_probabilities(generator):
    density, views = ViewDensity(4), Views.of(GEOMETRY.map_grid(), 24, 4)
    with torch.no_grad():
        density.coefficients.copy_(0.3 * torch.randn(24, generator=generator))
    one, other = density.probabilities(views)
    assert float((one.sum() + other.sum()).detach()) == pytest.approx(1, abs=1e-6)
    rule = lebedev(35)
    over = density.over_uniform(rule.directions)
    assert float((over * rule.weights).sum()) == pytest.approx(1, abs=1e-3)
    assert float(over.min()) > 0


def test_stages_rise_to_the_radius():
    assert stages(3) == [3]
    assert stages(8) == [4, 6, 8]
    assert stages(12) == [4, 6, 8, 10, 12]


def test_radii_in_the_noise_are_left_out(exact):
    noisy = exact.second_error.clone()
    noisy[:, 2:, 2:] = float(exact.second.abs().max())
    assert visible_radius(exact) == RADIUS
    assert visible_radius(replace(exact, second_error=noisy)) == 2


def test_orders_that_a_particle_has_not_do_not_hide_it(exact):
    """Noise in high orders of a small particle says nothing of its power."""
    small = replace(GEOMETRY, diameter_angst=6.0)
    noisy = exact.second_error.clone()
    noisy[8:] = 100 * float(exact.second.abs().max())
    assert visible_radius(replace(exact, geometry=small, second_error=noisy)) == RADIUS
    assert visible_radius(replace(exact, second_error=noisy)) < RADIUS


def _file(path, stack):
    result = run("moments", "estimate", stack / "particles.star", "-o", path,
                 "--diameter", 50, "--max-radius", 6)  # fmt: skip
    assert result.exit_code == 0, result.output
    return path


FEW = ["--starts", 2, "--radius", 4, "--set", "iterations=4", "--set", "settling=2",
       "--set", "first_iterations=2", "--set", "beads=20"]  # fmt: skip


def test_moments_that_no_start_explains_give_no_map(
    tmp_path, stack_32, coarse_alignment, no_pictures, monkeypatch
):
    """Two blobs after a few steps agree with each other, and say nothing of the molecule."""
    moments = _file(tmp_path / "m.h5", stack_32)
    job = tmp_path / "job"
    with pytest.raises(CryoreconError, match="No start explains") as told:
        run("moments", "reconstruct", moments, "-o", job, *FEW)
    assert not (job / "initial_model.mrc").exists()
    assert (job / "RELION_JOB_EXIT_FAILURE").exists()
    assert len(read_star(job / "starts.star")["starts"]) == 2
    # Without repeating the fits, as the message says.
    again = shlex.split(told.value.remedy.split(": ")[-1])
    assert again[1:] == ["abinitio", "--continue", str(job), "--allow-ambiguous"]
    monkeypatch.setattr(sys, "argv", again)
    result = run(*again[1:])
    assert result.exit_code == 0, result.output
    assert "taken from the checkpoint" in (job / "run.log").read_text()
    assert "AMBIGUOUS: no start explains the moments" in (job / "fsc.star").read_text()
    result = run("moments", "reconstruct", moments, "-o", job, *FEW, "--allow-ambiguous",
                 "--overwrite", "--reference", stack_32 / "map.mrc")  # fmt: skip
    assert result.exit_code == 0, result.output
    log = (job / "run.log").read_text()
    assert "AMBIGUOUS" in log
    given = read_map(stack_32 / "map.mrc")
    maps = (
        "initial_model.mrc",
        "initial_model_aligned.mrc",
        "initial_model_mask.mrc",
    )
    for name in maps:
        found = read_map(job / name)
        assert found.data.shape == given.data.shape
        assert found.pixel_size_angst == pytest.approx(given.pixel_size_angst, rel=1e-4)
    for name in ("map.png", "views.png", "fsc.png", "fsc.star", "view_density.star"):
        assert (job / name).stat().st_size > 0
    density = read_star(job / "view_density.star")["view_density"]["cryoreconViewDensity"]
    assert density.astype(float).mean() == pytest.approx(1, abs=0.05)


def test_starts_that_disagree_are_told(exact):
    fitter = Fitter.of(
        exact, MomentFitConfig(beads=2, iterations=2, settling=1, first_iterations=1), RADIUS
    )
    best = replace(fitter.fit(torch.Generator().manual_seed(0)), misfit=0.5, lower=0.5)

    def trust(agreement, **changed):
        return Trust.of(replace(best, **changed), agreement, GEOMETRY, RADIUS)

    assert trust([None, 4.0, None, 4.0]) == Trust(4.0, "")
    assert trust([None, 4.0]) == Trust(4.0, "")
    assert trust([None, 4.0, 3.2]).radius == 3.2
    assert (
        "in part: starts that fit them equally well agree to 8 A, not to the 6 A"
        in trust([None, 4.0, 3.2]).said
    )
    for agreement, changed, said in (
        ([None, 4.0, 2.4], {}, "do not determine the map: starts"),
        ([None, 3.2, None], {}, "do not determine the map: starts"),
        ([None, 0.0], {}, "agree to no resolution"),
        ([None, None], {}, "cannot be checked"),
        ([None, 4.0], {"lower": 3.0}, "misfit 3"),
    ):
        assert trust(agreement, **changed).radius == 0
        assert said in trust(agreement, **changed).said


def test_a_map_ends_where_starts_cease_to_agree(tmp_path, stack_32, monkeypatch, coarse_alignment):
    moments, job = _file(tmp_path / "m.h5", stack_32), tmp_path / "job"
    monkeypatch.setattr(Trust, "of", staticmethod(lambda *_: Trust(3.0, "In part")))
    result = run("moments", "reconstruct", moments, "-o", job, *FEW)
    assert result.exit_code == 0, result.output
    whole, ends = (
        fft_centred(torch.from_numpy(read_map(job / name).data), 3)
        for name in ("initial_model_unfiltered.mrc", "initial_model.mrc")
    )
    geometry = read_moments(moments).geometry
    shell = radius_grid(len(whole), 3) * (geometry.side_angst / geometry.image_side_angst)
    near, far = shell < 3 - 1.5, shell > 3 + 1.5
    assert torch.allclose(ends[near], whole[near], rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
    assert float(ends[far].abs().max()) < 1e-5 * float(whole.abs().max())
    assert "In part. initial_model.mrc ends there" in (job / "run.log").read_text()
    monkeypatch.undo()
    with pytest.raises(CryoreconError, match="No start explains"):
        run("moments", "reconstruct", moments, "-o", job, *FEW, "--overwrite")
    assert not list(job.glob("*.mrc"))


@pytest.mark.parametrize(
    ("unmeasured", "faint", "visible"), [([0], [], 4), ([0], [2], 2), ([3], [], 3)]
)
def test_radii_that_the_ctf_leaves_nothing_of_are_passed_over(exact, unmeasured, faint, visible):
    """As the first one, without amplitude contrast."""
    measured, second = exact.measured.clone(), exact.second.clone()
    measured[unmeasured], measured[:, unmeasured] = False, False
    second[:, faint] = 0
    error = torch.full_like(second.real, 1e-9)
    error[:, ~measured] = torch.inf
    found = replace(exact, measured=measured, second=second, second_error=error)
    assert visible_radius(found) == visible


def test_noise_has_no_signal(tmp_path, generator):
    sums = SteerableSums(GEOMETRY)
    noise = torch.randn(RADIUS, RADIUS, generator=generator).double()
    values = {"second": torch.zeros(12, RADIUS, RADIUS, dtype=torch.complex128)}
    flat = SteerableMoments(
        GEOMETRY, 10, torch.zeros(RADIUS).double(), values["second"] + noise @ noise.T * 1e-3,
        torch.ones(RADIUS).double(), torch.ones(12, RADIUS, RADIUS).double(), values["second"],
        torch.ones(RADIUS, RADIUS, dtype=torch.bool), torch.ones(RADIUS).double(),
    )  # fmt: skip
    save_progress(tmp_path / "noise.h5", Progress(sums, 10, 10, ("x",)), flat)
    assert visible_radius(read_moments(tmp_path / "noise.h5")) == 0
    with pytest.raises(CryoreconError, match="No signal found"):
        run("moments", "reconstruct", tmp_path / "noise.h5", "-o", tmp_path / "job")
    assert not (tmp_path / "job" / "initial_model.mrc").exists()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--set", "beds=3"], "beads"),
        (["--set", "beads=0"], "positive"),
        (["--set", "width=0"], "positive"),
        (["--set", "rate=.nan"], "rate"),
        (["--set", "rate=1e29"], "diverged"),
        (["--reference", "odd.mrc"], "odd.mrc"),
    ],
)
def test_bad_options_are_told(tmp_path, exact, monkeypatch, words, match):
    monkeypatch.chdir(tmp_path)
    write_map("odd.mrc", np.zeros((9, 9, 9), np.float32), 1.0)
    save_progress(tmp_path / "m.h5", Progress(SteerableSums(GEOMETRY), 10, 10, ("x",)), exact)
    with pytest.raises(CryoreconError, match=match):
        run("moments", "reconstruct", "m.h5", "-o", "job", *words)


@pytest.mark.parametrize(("box", "pixel"), [(50, 1.0), (51, 0.9), (64, 1.7)])
def test_the_map_on_the_images_grid_has_the_projections_of_the_fit(box, pixel):
    """Wherever the images' pixels lie: same centre, same mass, same size in angstrom."""
    fit = MomentFit(Beads(3, 0.4, torch.Generator().manual_seed(2)), ViewDensity(2), 0, (), (), 0.1)
    geometry = replace(GEOMETRY, box=box, pixel_size_angst=pixel)
    volume = on_images(fit.volume, geometry, 8)
    mass = fit.volume.log_mass.detach().exp()
    assert float(volume.sum()) == pytest.approx(float(mass.sum()), rel=0.01)
    axis = (torch.arange(box) - box // 2) * pixel
    found = torch.stack([(volume.sum((0, 1)) * axis).sum(), (volume.sum((1, 2)) * axis).sum()])
    x, _, z = (fit.volume.centres.detach() * 24.0 * mass[:, None]).sum(0)
    assert torch.allclose(found, torch.stack([x, z]), atol=0.02)


def test_moments_over_fourier_pixels_are_fitted(tmp_path, stack_32, no_pictures, coarse_alignment):
    run("moments", "estimate", stack_32 / "particles.star", "-o", tmp_path / "f.h5",
        "--form", "full", "--max-radius", 4, "--diameter", 55)  # fmt: skip
    job = tmp_path / "job"
    few = [word if word != 4 else 3 for word in FEW]
    result = run("moments", "reconstruct", tmp_path / "f.h5", "-o", job, *few, "--views", "encoder",
                 "--set", "density_degree=2", "--set", "beads=4", "--allow-ambiguous")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "in-plane angles" in (job / "run.log").read_text()
    given = read_map(stack_32 / "map.mrc")
    assert read_map(job / "initial_model.mrc").data.shape == given.data.shape
    density = read_star(job / "view_density.star")["view_density"]["cryoreconViewDensity"]
    assert density.astype(float).mean() == pytest.approx(1, abs=0.05)


def test_both_steps_in_one_command(tmp_path, stack_32, no_pictures, coarse_alignment):
    few = [str(word) for word in FEW if word not in ("--radius", 4)]
    result = run("abinitio", stack_32 / "particles.star", "-o", tmp_path / "job", "--method",
                 "moments", "--diameter", 50, *few, "--set", "radius=4",
                 "--allow-ambiguous")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "job" / "moments.h5").exists()
    assert (tmp_path / "job" / "initial_model.mrc").exists()
    with pytest.raises(CryoreconError, match="does not exist"):
        run("abinitio", tmp_path / "none.star", "-o", tmp_path / "new", "--method", "moments")
    assert not (tmp_path / "new").exists()
    bad = [*few, "--diameter", 50, "--set", "radius=4"]
    with pytest.raises(CryoreconError, match="No start explains"):
        run("abinitio", stack_32 / "particles.star", "-o", tmp_path / "job", "--method",
            "moments", "--overwrite", *bad)  # fmt: skip
    assert (tmp_path / "job" / "RELION_JOB_EXIT_FAILURE").exists()
    assert not (tmp_path / "job" / "initial_model.mrc").exists()
    refused = run("abinitio", stack_32 / "particles.star", "-o", tmp_path / "job2", "--method",
                  "moments", "--symmetry", "C3")  # fmt: skip
    assert refused.exit_code == 2


def test_an_interrupted_job_is_marked_and_told_how_to_go_on(
    tmp_path, stack_32, monkeypatch, capsys
):
    def stop(self, *given):
        signal.raise_signal(signal.SIGINT)
        return read(self, *given)

    read = moments_reader.Reader.read
    monkeypatch.setattr(moments_reader.Reader, "read", stop)
    job = tmp_path / "a job"
    words = ["abinitio", stack_32 / "particles.star", "-o", job, "--method", "moments"]
    monkeypatch.setattr("sys.argv", ["cryorecon", *map(str, words), "--diameter", "50"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 3
    told = capsys.readouterr().out
    assert f"cryorecon abinitio --continue '{job}'" in told
    assert f"{job / 'moments.partial.h5'} holds what has been averaged; go on with:" in told
    assert (job / "RELION_JOB_EXIT_ABORTED").exists()
    assert (job / "moments.partial.h5").exists()


@pytest.mark.slow
def test_engine_rmfn_takes_the_map_on(tmp_path, stack_32):
    """The chain: moments, a coarse map whatever its worth, poses and map by engine rmfn."""
    moments = _file(tmp_path / "m.h5", stack_32)
    run("moments", "reconstruct", moments, "-o", tmp_path / "job", "--starts", 2, "--radius", 4,
        "--allow-ambiguous")  # fmt: skip
    result = run("abinitio-rmfn", stack_32 / "particles.star", "-o", tmp_path / "refined",
                 "--init-map", tmp_path / "job" / "initial_model.mrc")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "starting from" in (tmp_path / "refined" / "run.log").read_text()
    assert (tmp_path / "refined" / "run_data.star").exists()


def test_a_start_goes_through_all_model_errors_and_radii(exact):
    config = MomentFitConfig(
        beads=4, iterations=4, settling=2, first_iterations=3, annealing=(0.1, 0.01)
    )
    fitter, counts = Fitter.of(exact, config, RADIUS), []
    assert [float(t.second_weight.max()) for t in fitter.annealed] == sorted(
        float(t.second_weight.max()) for t in fitter.annealed
    )
    fitter.fit(torch.Generator().manual_seed(0), counts.append)
    assert sum(counts) == fitter.steps == 3 + 2 + 2 + (4 + 2)
    plain = Fitter.of(exact, replace(config, annealing=()), RADIUS)
    assert plain.steps == 3 + (4 + 2)


@pytest.mark.parametrize("density", ["harmonics", "free", "encoder"])
def test_a_start_goes_on_from_each_state_it_keeps(exact, density, monkeypatch):
    monkeypatch.setattr(descent, "_BLOCK", 4)
    config = MomentFitConfig(
        beads=4, iterations=4, settling=12, first_iterations=3, annealing=(0.1,), density=density
    )
    fitter, states = Fitter.of(exact, config, RADIUS), []

    def keep(state):
        file = io.BytesIO()
        torch.save(state(), file)
        file.seek(0)
        states.append(torch.load(file, weights_only=True))

    whole = fitter.fit(torch.Generator().manual_seed(0), keep=keep)
    assert sum(state["settling"] is None for state in states) == 3
    assert len(states) >= 5
    for state in states:
        steps = []
        found = fitter.fit(torch.Generator().manual_seed(0), steps.append, state)
        assert found.misfit == whole.misfit
        assert sum(steps) == fitter.steps


def test_the_command_has_the_engines_number_of_starts():
    assert MomentFitConfig().starts == STARTS


def test_third_moments_come_unasked_where_they_can():
    options = MomentsOptions(max_radius=3)
    assert resolve_geometry(options, 32, 2.4).third_radius == 3
    assert resolve_geometry(replace(options, max_radius=8), 32, 2.4).third_radius == 6
    assert resolve_geometry(replace(options, third_radius=0), 32, 2.4).third_radius == 0
    assert resolve_geometry(replace(options, form="full"), 32, 2.4).third_radius == 0
