"""The published protocol of the residual MFN, at 24 px."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import cryorecon, simulated
from rich.console import Console

from cryorecon.conventions import euler_to_matrix
from cryorecon.engines.observations import Observations
from cryorecon.engines.rmfn_paper import PaperConfig, PaperProtocol, gaussian_filtered, perturbed
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map, stack_writer
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star, write_star
from cryorecon.maps.poses import compare_pose_sets
from cryorecon.physics.fourier import half_plane, max_band
from cryorecon.physics.rotations import geodesic_distance_deg, random_rotations
from cryorecon.run.load import load_observations
from cryorecon.run.paper_protocol import PaperOptions, abinitio_perturbed


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("stack"), 400, 24, 1.0, seed=2)


def test_poses_are_turned_by_the_angles_asked_for(generator):
    rotations = random_rotations(500, generator)
    angles = geodesic_distance_deg(rotations, perturbed(rotations, 45, 90, generator))
    assert angles.min() >= 45 - 1e-6
    assert angles.max() <= 90 + 1e-6
    assert angles.mean() == pytest.approx(67.5, abs=2)


def test_the_filter_acts_on_image_and_prediction(stack):
    observations = load_observations(read_particles(stack / "particles.star"), 0.8).whole()
    filtered = gaussian_filtered(observations, 6)
    m = len(filtered.plane)
    gain = torch.exp(-0.5 * (filtered.plane.radius / 4) ** 2).float()
    assert torch.allclose(filtered.coefficients, observations.coefficients[:, :m] * gain)
    assert torch.allclose(filtered.ctf, observations.ctf[:, :m] * gain)
    assert filtered.plane.radius.max() == pytest.approx(8, abs=0.5)


def test_the_protocol_brings_poses_closer(stack, generator):
    """From 10 to 20 degrees; from 45 to 90 it does not converge on a stack this small."""
    particles = read_particles(stack / "particles.star")
    observations = load_observations(particles, 0.8).whole()
    true = euler_to_matrix(torch.from_numpy(particles.euler_deg())).float()
    start = perturbed(true, 10, 20, generator)
    config = PaperConfig(epochs=(0, 12, 0), batch=100, width=64, structure_rate=5e-3)
    run = PaperProtocol(config, observations, start, torch.zeros(len(true), 2), generator)
    losses = [loss for _, _, loss in run.epochs()]
    assert run.volume(1).min() >= 0
    assert losses[-1] < 0.8 * losses[0]
    assert compare_pose_sets(run.rotations.double(), true.double()).median_deg < 8


def test_every_scale_of_the_papers_bands_reads_its_own_grid(generator):
    plane = half_plane(64, max_band(64))
    n = len(plane)
    ones = torch.ones(4, n)
    images = Observations(plane, ones.to(torch.complex64), ones, torch.ones(1, plane.n_shells),
                          torch.zeros(4, dtype=torch.int64))  # fmt: skip
    config = PaperConfig(epochs=(1, 1, 0), width=8, structure_steps=1, pose_steps=1)
    start = random_rotations(4, generator).float()
    run = PaperProtocol(config, images, start, torch.zeros(4, 2), generator)
    assert run.bands == (3, 9, 31)
    assert [scale for scale, _, _ in run.epochs()] == [0, 1]


def test_few_poses_move_while_the_structure_sees_many_images(stack, generator, monkeypatch):
    observations = load_observations(read_particles(stack / "particles.star"), 0.8).whole()
    start = random_rotations(400, generator).float()
    config = PaperConfig(epochs=(2, 0, 0), batch=150, pose_batch=64, width=8, structure_steps=1)
    run = PaperProtocol(config, observations, start, torch.zeros(400, 2), generator)
    seen, moved = [], []
    monkeypatch.setattr(run, "_structure_step", lambda b, rows, s: seen.append(rows) or 0.0)
    monkeypatch.setattr(run, "_pose_steps", lambda b, rows, s: moved.append(rows))
    assert len(list(run.epochs())) == 2
    assert torch.equal(torch.cat(moved).bincount(minlength=400), torch.full((400,), 2))
    for all_rows, own in zip(seen, moved, strict=True):
        assert len(all_rows.unique()) == 150
        assert torch.equal(all_rows[: len(own)], own)


def test_black_particles_are_made_white(stack, tmp_path):
    """Only positive density is kept: without that, the map stays empty."""
    particles = read_particles(stack / "particles.star")
    with stack_writer(tmp_path / "black.mrcs", particles.box, particles.pixel_size_angst) as black:
        black.append(-particles.images(np.arange(len(particles))))
    tables = read_star(stack / "particles.star")
    names = [f"{k + 1}@{tmp_path / 'black.mrcs'}" for k in range(len(particles))]
    tables["particles"] = tables["particles"].assign(rlnImageName=names)
    write_star(tmp_path / "black.star", tables)
    config = PaperConfig(epochs=(2, 0, 0), batch=200, width=16, structure_steps=2, pose_steps=2)
    options, quiet = PaperOptions(engine=config, seed=1), Console(quiet=True)
    abinitio_perturbed(stack / "particles.star", tmp_path / "white", options, quiet)
    abinitio_perturbed(tmp_path / "black.star", tmp_path / "job", options, quiet)
    found, expected = (read_map(tmp_path / j / "scale1.mrc").data for j in ("job", "white"))
    np.testing.assert_allclose(found, expected, atol=1e-3 * expected.max())
    assert "BLACK ON WHITE" in (tmp_path / "job" / "run.log").read_text()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"epochs": ()}, "No training has epochs"),
        ({"epochs": (0, 0)}, "No training has epochs"),
        ({"batch": 0}, "batches and steps of 0"),
        ({"epochs": (1,) * 6}, "have no 6 scales"),
        ({"coarsest": 40}, "scales from 40 cycles"),
    ],
)
def test_settings_that_make_no_training_are_refused_before_anything_is_written(
    stack, tmp_path, changed, words
):
    options = PaperOptions(engine=replace(PaperConfig(), **changed))
    with pytest.raises(CryoreconError, match=words):
        abinitio_perturbed(stack / "particles.star", tmp_path / "j", options, Console(quiet=True))
    wide = PaperOptions(diameter_angst=1000.0)
    with pytest.raises(CryoreconError, match="does not fit the images"):
        abinitio_perturbed(stack / "particles.star", tmp_path / "j", wide, Console(quiet=True))
    assert not (tmp_path / "j").exists()


def test_options_that_the_protocol_has_not_are_refused(stack, tmp_path):
    done = cryorecon(
        "abinitio-rmfn", stack / "particles.star", "-o", "j", "--init", "perturbed",
        "--symmetry", "C7", "--box", 16, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--init perturbed has no --symmetry, --box" in " ".join(done.stderr.split())


def test_the_job_starts_from_the_files_poses_and_says_so(stack, tmp_path):
    star = stack / "particles.star"
    config = PaperConfig(epochs=(1, 1, 1), batch=200, width=16, structure_steps=1, pose_steps=2)
    options = PaperOptions(engine=config, seed=1)
    abinitio_perturbed(star, tmp_path / "job", options, Console(quiet=True))
    for name in ("scale1.mrc", "scale2.mrc", "scale3.mrc", "initial_model.mrc"):
        assert read_map(tmp_path / "job" / name).data.std() > 0
    for name in ("pose_errors.png", "run_data.star", "report.html", "RELION_JOB_EXIT_SUCCESS"):
        assert (tmp_path / "job" / name).exists()
    log = (tmp_path / "job" / "run.log").read_text()
    assert "45 to 90 degrees FROM THOSE IN" in log
    assert "epoch 3: scale 3" in log
