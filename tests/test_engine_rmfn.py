"""Engine rmfn: its parts by property, then the whole from random poses at 32 px."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MODEL

from cryorecon.conventions import euler_to_matrix
from cryorecon.engines import accumulate, refine, search
from cryorecon.engines.observations import ImageSet, Observations
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star, write_star
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve, resolution_at
from cryorecon.maps.poses import compare_pose_sets
from cryorecon.physics.fourier import half_plane, lowpass, shift_phases
from cryorecon.physics.imaging import log_likelihood, predict
from cryorecon.physics.pose_derivatives import derivatives, slices_with_gradient
from cryorecon.physics.projection import (
    extract_slices,
    padded_transform,
    project_slowly,
    to_volume,
)
from cryorecon.physics.rotations import exp_map, geodesic_distance_deg, random_rotations, so3_grid
from cryorecon.run.abinitio import abinitio
from cryorecon.run.abinitio_input import AbinitioOptions
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig


@pytest.fixture
def scene(molecule_32, generator):
    """Noisy observations of a known map in float64: (observations, volume, rotations, offsets)."""
    volume = molecule_32.double()
    plane = half_plane(32)
    rotations = random_rotations(12, generator)
    offsets = 2 * torch.randn(12, 2, generator=generator, dtype=torch.float64)
    gain = 0.3 + 0.7 * torch.rand(12, len(plane), generator=generator, dtype=torch.float64)
    clean = predict(padded_transform(volume), rotations, offsets, gain, plane)
    power = torch.full((1, plane.n_shells), float(clean.abs().square().mean()))
    noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
    images = clean + noise * power[0, 0].sqrt()
    zeros = torch.zeros(12, dtype=torch.int64)
    return Observations(plane, images, gain, power.double(), zeros), volume, rotations, offsets


def test_grid_scores_are_log_likelihoods(scene):
    """The matrix product agrees with the image model, pose by pose."""
    observations, volume, rotations, offsets = scene
    band = observations.select(torch.arange(12), 6)
    transform = padded_transform(volume)
    templates = extract_slices(transform, rotations[:3], band.plane)
    posterior, _, _ = search.grid_expectation(band, templates, offsets[:2])
    scores = torch.stack(
        [
            log_likelihood(
                band.coefficients,
                predict(
                    transform,
                    rotations[r].expand(12, 3, 3),
                    offsets[s].expand(12, 2),
                    band.ctf,
                    band.plane,
                ),
                band.noise_power[0],
                band.plane,
            )
            for s in range(2)
            for r in range(3)
        ],
        -1,
    )
    empty = log_likelihood(
        band.coefficients, torch.zeros_like(band.coefficients), band.noise_power[0], band.plane
    )
    expected = torch.logsumexp(scores, -1) - torch.log(torch.tensor(6.0)) - empty
    assert torch.allclose(posterior.log_evidence, expected)
    best = scores.argmax(-1)
    rotation, offset = search.best_grid_pose(band, templates, offsets[:2], chunk_elements=13)
    assert torch.equal(rotation[:, 0], best % 3)
    assert torch.equal(offset[:, 0], best // 3)
    rotation, offset = search.best_grid_pose(band, templates, offsets[:2], count=3)
    by_rotation = scores.view(-1, 2, 3).amax(1)
    assert torch.equal(rotation, by_rotation.sort(descending=True).indices)
    assert torch.equal(offset[:, 0], best // 3)


def test_only_likely_offsets_are_tried(scene):
    """As if the other pairs of image and offset had no likelihood; evidence counts all poses."""
    observations, volume, rotations, offsets = scene
    band = observations.select(torch.arange(12), 6)
    templates = extract_slices(padded_transform(volume), rotations[:4], band.plane)
    likely = torch.rand(12, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    likely[:, 1] |= ~likely.any(-1)
    posterior, signal, weight = search.grid_expectation(
        band, templates, offsets[:3], 1.5, chunk_elements=13, likely=likely
    )
    assert torch.equal(posterior.offset_shares > 0, likely)
    torch.testing.assert_close(posterior.offset_shares.sum(-1), torch.ones(12).double())
    parts = [
        search.grid_expectation(band.select(torch.tensor([i])), templates, offsets[:3][mine], 1.5)
        for i, mine in enumerate(likely)
    ]
    counts = likely.sum(-1) / 3
    one = torch.cat([p.log_evidence for p, _, _ in parts]) + counts.double().log()
    torch.testing.assert_close(posterior.log_evidence, one)
    torch.testing.assert_close(signal, sum(part[1] for part in parts))
    torch.testing.assert_close(weight, sum(part[2] for part in parts))
    rotation, offset = search.best_grid_pose(band, templates, offsets[:3], 13, 2, likely)
    for i, mine in enumerate(likely):
        image = band.select(torch.tensor([i]))
        r, o = search.best_grid_pose(image, templates, offsets[:3][mine], count=2)
        assert torch.equal(rotation[i], r[0])
        assert torch.equal(offset[i], mine.nonzero()[:, 0][o[0]])


def test_offsets_beside_likely_ones_are_tried():
    """On the lattice itself the four next to one; on a finer one all within a step."""
    lattice, finer = search.offset_grid(4.0, 2.0), search.offset_grid(4.0, 1.0)
    shares = torch.zeros(3, len(lattice))
    at = int((lattice == torch.tensor([2.0, 0.0])).all(-1).nonzero())
    shares[0, at], shares[1] = 1.0, torch.nan
    shares[2, :2] = torch.tensor([0.0005, 0.9995])
    near = search.offsets_to_try(shares, lattice, lattice)
    here = (lattice - lattice[at]).norm(dim=-1) < 2.1
    assert torch.equal(near[0], here)
    assert near[1].all()
    assert torch.equal(near[2], (lattice - lattice[1]).norm(dim=-1) < 2.1)
    fine = search.offsets_to_try(shares, lattice, finer)
    assert torch.equal(fine[0], (finer - lattice[at]).norm(dim=-1) < 2.1)
    assert search.offsets_to_try(torch.ones(2, 1), torch.zeros(1, 2), torch.zeros(1, 2)).all()


def test_chunks_do_not_change_the_grid_sums(scene):
    observations, volume, rotations, offsets = scene
    band = observations.select(torch.arange(12), 6)
    templates = extract_slices(padded_transform(volume), rotations[:4], band.plane)
    whole = search.grid_expectation(band, templates, offsets[:3], 2.0)
    parts = search.grid_expectation(band, templates, offsets[:3], 2.0, chunk_elements=13)
    assert torch.allclose(whole[1], parts[1])
    assert torch.allclose(whole[2], parts[2])


def test_of_no_images_the_grid_sums_are_nothing(scene):
    """A process of several may have none of a small batch."""
    observations, volume, rotations, offsets = scene
    none = observations.select(torch.arange(0), 6)
    templates = extract_slices(padded_transform(volume), rotations[:4], none.plane)
    posterior, signal, weight = search.grid_expectation(none, templates, offsets[:3])
    assert len(posterior.log_evidence) == len(posterior.effective_poses) == 0
    assert signal.shape == weight.shape == templates.shape
    assert not signal.any()
    assert not weight.any()


def test_slice_gradients_are_those_of_the_transform(scene):
    """Against finite differences of exact slices of a smooth map."""
    observations, volume, rotations, _ = scene
    plane = observations.plane.within(6)
    model = derivatives(volume, 4, 8)
    slices, gradient = slices_with_gradient(model, rotations, plane)
    assert torch.allclose(
        slices, extract_slices(padded_transform(volume, 4), rotations, plane), atol=1e-9
    )
    step = 0.01
    for axis in range(3):
        turn = torch.zeros(12, 3, dtype=torch.float64)
        turn[:, axis] = step
        plus, minus = (
            project_slowly(volume, exp_map(s * turn) @ rotations, plane) for s in (1, -1)
        )
        numeric = (plus - minus) / (2 * step)
        error = (numeric - gradient[..., axis]).norm()
        assert error < 0.05 * gradient.norm() / 3**0.5


def test_refinement_follows_the_gradient_of_the_image_model(scene):
    """Gradient and value against finite differences of the log-likelihood itself."""
    observations, volume, rotations, offsets = scene
    model, sigma = derivatives(volume, 4, 15), 10.0
    objective = refine.PoseObjective(observations, model)

    def value(step):
        poses = exp_map(step[:, :3]) @ rotations, offsets + step[:, 3:]
        predicted = refine.predictions(observations, model, refine.Poses(*poses, offsets))
        noise, plane = observations.noise_power[0], observations.plane
        found = log_likelihood(observations.coefficients, predicted, noise, plane)
        return found - poses[1].square().sum(-1) / (2 * sigma**2)

    values, gradient, _ = objective(rotations, offsets)
    zero = torch.zeros(12, 5, dtype=torch.float64)
    empty = log_likelihood(
        observations.coefficients,
        torch.zeros_like(observations.coefficients),
        observations.noise_power[0],
        observations.plane,
    )
    assert torch.allclose(values, value(zero) - empty)
    for column in range(5):
        step = zero.clone()
        step[:, column] = 0.01
        numeric = (value(step) - value(-step)) / 0.02
        scale = gradient[:, column].norm()
        assert (numeric - gradient[:, column]).norm() < 0.1 * scale


def test_refinement_finds_the_pose_and_never_gets_worse(scene, generator):
    observations, volume, rotations, offsets = scene
    start = exp_map(0.08 * torch.randn(12, 3, generator=generator).double()) @ rotations
    model = derivatives(volume, 2, 15)
    before = refine.refine_poses(observations, model, start, offsets * 0, n_steps=0)
    after = refine.refine_poses(observations, model, start, offsets * 0, n_steps=12)
    assert (after.log_likelihood >= before.log_likelihood).all()
    assert geodesic_distance_deg(after.rotations, rotations).median() < 2.0
    assert (after.offsets_px - offsets).norm(dim=-1).median() < 0.3


def test_residuals_at_the_true_poses_are_the_noise(scene):
    """By optics group and shell, from images whose groups have different noise."""
    observations, volume, rotations, offsets = scene
    loud = observations.coefficients.clone()
    model = derivatives(volume, 2, 15)
    poses = refine.Poses(rotations, offsets, torch.zeros(12))
    clean = predict(
        padded_transform(volume), rotations, offsets, observations.ctf, observations.plane
    )
    loud[6:] = clean[6:] + 2 * (loud[6:] - clean[6:])
    groups = torch.tensor([0] * 6 + [1] * 6)
    two = Observations(
        observations.plane, loud, observations.ctf, observations.noise_power.repeat(2, 1), groups
    )
    power, count = refine.residual_power(two, refine.predictions(two, model, poses))
    measured = (power / count)[:, 4:].mean(1)
    expected = observations.noise_power[0, 0] * torch.tensor([1.0, 4.0])
    assert torch.allclose(measured, expected.to(measured), rtol=0.05)
    assert count.sum() == 12 * len(observations.plane)


def in_memory(observations):
    """The observations as the set of images that a job works on."""
    n = len(observations)
    return ImageSet(
        observations.plane,
        lambda rows, count: (
            observations.coefficients[rows, :count],
            observations.ctf[rows, :count],
        ),
        observations.noise_power.clone(),
        observations.group,
        torch.ones(n, dtype=torch.float64),
        torch.arange(n),
    )


def test_what_is_learned_from_one_half_set_stays_out_of_the_other(scene):
    observations, *_ = scene
    images, rows = in_memory(scene[0]), torch.arange(6)
    halves = [images.apart(rows), images.apart(rows + 6)]
    halves[0].noise_power.mul_(3)
    halves[0].gain.mul_(2)
    assert torch.equal(halves[1].noise_power, observations.noise_power)
    assert torch.equal(images.noise_power, observations.noise_power)
    second = halves[1].whole()
    assert torch.equal(second.ctf, observations.ctf[6:])
    assert torch.equal(second.coefficients, observations.coefficients[6:])
    assert torch.equal(halves[0].whole().ctf, 2 * observations.ctf[:6])


def test_image_scales_are_found(scene, generator):
    """Images of twice the contrast get twice the scale; weak ones stay near 1."""
    observations, volume, rotations, offsets = scene
    poses = refine.Poses(rotations, offsets, torch.zeros(12))
    predicted = refine.predictions(observations, derivatives(volume, 2, 15), poses)
    wanted = 0.7 + 0.6 * torch.rand(12, generator=generator).double()
    noise = observations.coefficients - predicted
    scaled = replace(observations, coefficients=predicted * wanted[:, None] + noise)
    found = refine.image_scales(scaled, predicted, spread=1.0)
    assert torch.allclose(found, wanted, atol=0.15)
    faint = replace(scaled, noise_power=observations.noise_power * 1e6)
    assert torch.allclose(refine.image_scales(faint, predicted), torch.ones(12).double(), atol=0.01)


def test_normal_equations_recover_the_map(molecule_32, generator):
    plane = half_plane(32)
    rotations = random_rotations(1500, generator, torch.float32)
    slices = extract_slices(padded_transform(molecule_32), rotations, plane)
    sums = accumulate.NormalEquations.empty(15, 2, torch.float32, "cpu")
    sums.add(slices, torch.ones(1500, len(plane)), rotations, plane)
    volume = to_volume(sums.solve(1e-3 * sums.shell_mean_weight()[:16]), 32)
    assert fsc_curve(volume, molecule_32)[:14].min() > 0.99
    volume, truth = lowpass(volume, 13.0, 3), lowpass(molecule_32, 13.0, 3)
    ratio = (volume * truth).sum() / truth.square().sum()
    assert float(ratio) == pytest.approx(1, abs=0.02)


def test_offset_grid_is_a_disc_with_zero_first():
    grid = search.offset_grid(6, 3)
    assert torch.equal(grid[0], torch.zeros(2))
    assert len(grid) == 13
    assert grid.norm(dim=-1).max() == 6


def test_shift_phases_are_undone_by_centring(scene):
    observations, _, _, offsets = scene
    from cryorecon.engines.observations import centred

    moved = observations.coefficients * shift_phases(offsets, observations.plane)
    assert torch.allclose(centred(moved, offsets, observations.plane), observations.coefficients)


def test_the_search_band_follows_the_particle_not_the_box():
    assert RmfnConfig(diameter=0.8).search_band(64) == 4
    assert RmfnConfig(diameter=0.4).search_band(64) == 8
    assert RmfnConfig().bands(64) == (4, 11, 31)
    assert len(so3_grid(RmfnConfig().search_nside)[0]) == 4608


QUICK = RmfnConfig(final_steps=10)


@pytest.fixture(scope="module")
def recovered(stack_32, tmp_path_factory):
    """Ab initio from a STAR file whose pose columns hold no numbers at all."""
    from rich.console import Console

    job = tmp_path_factory.mktemp("job") / "run"
    tables = read_star(stack_32 / "particles.star")
    for column in tables["particles"]:
        if column.startswith(("rlnAngle", "rlnOrigin")):
            tables["particles"][column] = "secret"
    blind = job.parent / "blind.star"
    write_star(blind, tables)
    abinitio(blind, job, AbinitioOptions(seed=5, engine=QUICK), Console(quiet=True))
    return job


def test_recovery_from_scratch_without_reading_the_truth(recovered, stack_32):
    truth = read_map(stack_32 / "map.mrc")
    volume = torch.from_numpy(read_map(recovered / "initial_model.mrc").data)
    reference = torch.from_numpy(truth.data)
    moved = apply_alignment(volume, align_maps(volume, reference, truth.pixel_size_angst))
    curve = fsc_curve(moved, reference)
    assert resolution_at(curve, 0.5, 32, 2.4) < 6.2
    mine, true = (
        read_particles(p) for p in (recovered / "run_data.star", stack_32 / "particles.star")
    )
    found = compare_pose_sets(
        euler_to_matrix(torch.from_numpy(mine.euler_deg())),
        euler_to_matrix(torch.from_numpy(true.euler_deg())),
        torch.from_numpy(mine.origins_angst()),
        torch.from_numpy(true.origins_angst()),
    )
    assert found.median_deg < 4.0
    assert found.fraction_within(10) > 0.9
    assert found.median_offset_angst < 1.0


def test_the_job_directory_is_whole(recovered, stack_32):
    names = {p.name for p in recovered.iterdir()}
    wanted = "initial_model.mrc run_data.star fsc.star fsc.xml job.yaml run.log scale1.mrc"
    assert names >= {*wanted.split(), "RELION_JOB_EXIT_SUCCESS", "RELION_OUTPUT_NODES.star"}
    assert names >= {f"run_half{h}_class001_unfil.mrc" for h in (1, 2)}
    assert names >= {"initial_model_masked.mrc", "initial_model_mask.mrc"}
    nodes = read_star(recovered / "RELION_OUTPUT_NODES.star")["output_nodes"]
    types = {Path(n).name: t for n, t in nodes[list(nodes)].itertuples(index=False)}
    assert types == {
        "initial_model.mrc": "6", "initial_model_masked.mrc": "6", "initial_model_mask.mrc": "7",
        "run_data.star": "3", "run_half1_class001_unfil.mrc": "10", "logfile.pdf": "13",
    }  # fmt: skip
    assert not any(n.endswith(".tmp") for n in names)
    before = read_star(stack_32 / "particles.star")["particles"]
    after = read_star(recovered / "run_data.star")["particles"]
    assert list(after["rlnImageName"]) == list(before["rlnImageName"])
    assert set(before) <= set(after)
    assert set(after["rlnRandomSubset"]) == {"1", "2"}
    shares = after["rlnMaxValueProbDistribution"].astype(float)
    assert shares.between(0, 1).all()
    assert shares.median() > 0.9
    assert after["rlnLogLikeliContribution"].astype(float).gt(0).all()
    halves = [read_map(recovered / f"run_half{h}_class001_unfil.mrc") for h in (1, 2)]
    assert all(h.pixel_size_angst == pytest.approx(2.4) for h in halves)


def test_the_mask_holds_the_molecule_and_the_masked_map_is_nearer_the_truth(recovered, stack_32):
    names = ("initial_model.mrc", "initial_model_masked.mrc", "initial_model_mask.mrc")
    maps = [read_map(recovered / name) for name in names]
    assert all(m.pixel_size_angst == pytest.approx(2.4) for m in maps)
    plain, masked, mask = (torch.from_numpy(m.data) for m in maps)
    torch.testing.assert_close(masked, plain * mask)
    assert float(mask.min()) == 0
    assert float(mask.max()) <= 1
    truth = read_map(stack_32 / "map.mrc")
    reference = torch.from_numpy(truth.data)
    turned = align_maps(plain, reference, truth.pixel_size_angst)
    around = apply_alignment(mask, turned)
    assert float((reference * around).square().sum() / reference.square().sum()) > 0.95
    one, other = (fsc_curve(apply_alignment(m, turned), reference) for m in (plain, masked))
    assert bool((other[1:4] >= one[1:4]).all())
    assert resolution_at(other, 0.5, 32, 2.4) <= resolution_at(one, 0.5, 32, 2.4)


def test_one_seed_gives_one_result_and_half_sets_are_honoured(tmp_path, no_pictures):
    from rich.console import Console

    simulate(MODEL, tmp_path / "s", SimulateConfig(n_particles=60, box=24, snr=1.0))
    tables = read_star(tmp_path / "s" / "particles.star")
    tables["particles"]["rlnRandomSubset"] = ["1", "1", "2"] * 20
    write_star(tmp_path / "p.star", tables)
    tiny = RmfnConfig(
        search_nside=2, n_starts=1, temperatures=(5.0, 1.0), width=16, half_rounds=2,
        joint_rounds=1, final_steps=2,
    )  # fmt: skip
    for name in ("a", "b"):
        options = AbinitioOptions(seed=1, engine=tiny)
        abinitio(tmp_path / "p.star", tmp_path / name, options, Console(quiet=True))
    a, b = (read_map(tmp_path / n / "initial_model.mrc").data for n in "ab")
    assert (a == b).all()
    subsets = read_star(tmp_path / "a" / "run_data.star")["particles"]["rlnRandomSubset"]
    assert list(subsets) == ["1", "1", "2"] * 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_recovery_at_64_px(tmp_path, seed):
    """2,000 images, SNR 0.1, shifts of up to 3 px: within 1.25x and 2x of the limits.

    These, 2.5 A and 0.73 degrees, are what examples/benchmarks/limits.py finds for such a stack.
    """
    from rich.console import Console

    config = SimulateConfig(pixel_size_angst=1.2, shift_angst=3.6, b_factor_angst2=20.0, seed=seed)
    simulate(MODEL, tmp_path / "s", config)
    job = tmp_path / "job"
    star = tmp_path / "s" / "particles.star"
    abinitio(star, job, AbinitioOptions(seed=seed), Console(quiet=True))
    truth = torch.from_numpy(read_map(tmp_path / "s" / "map.mrc").data)
    volume = torch.from_numpy(read_map(job / "initial_model.mrc").data)
    moved = apply_alignment(volume, align_maps(volume, truth, 1.2))
    assert resolution_at(fsc_curve(moved, truth), 0.5, 64, 1.2) < 1.25 * 2.5
    mine, true = read_particles(job / "run_data.star"), read_particles(star)
    poses = [euler_to_matrix(torch.from_numpy(p.euler_deg())) for p in (mine, true)]
    assert compare_pose_sets(*poses).median_deg < 2 * 0.73
