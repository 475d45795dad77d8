"""On what several jobs agree: parts by property, then whole jobs with real files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODEL
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from cryorecon.cli.main import app
from cryorecon.conventions import euler_to_matrix, matrix_to_euler
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star, write_star
from cryorecon.maps import agreement, align
from cryorecon.maps.agreement import (
    Volumes,
    largest_cluster,
    map_agreement,
    mean_rotations,
    moved_poses,
)
from cryorecon.maps.align import Alignment, apply_alignment
from cryorecon.physics.fourier import lowpass, radius_grid
from cryorecon.physics.masks import Support
from cryorecon.physics.rotations import exp_map, geodesic_distance_deg, random_rotations
from cryorecon.run.compare_poses import read_pose_table
from cryorecon.run.consensus import agreed
from cryorecon.run.consensus.compare import ConsensusOptions, consensus
from cryorecon.run.curves import FscCurve, write_fsc_star
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig

QUIET = Console(quiet=True)
PIXEL, BOX = 3.2, 24
FAST = ConsensusOptions(chance_trials=1)
UNMOVED = Alignment(torch.eye(3).double(), torch.zeros(3).double(), False, 1.0, 8.0)


def noise(seed, box=BOX):
    return torch.randn(box, box, box, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 6), st.integers(0, 2**15 - 1))
def test_the_largest_cluster_agrees_within_and_none_is_larger(n, edges):
    """Against all subsets: every two of the cluster agree, and every larger set has a quarrel."""
    matrix = torch.zeros(n, n)
    places = torch.tril_indices(n, n, -1).T.tolist()
    for bit, (i, j) in enumerate(places):
        matrix[i, j] = matrix[j, i] = float(edges >> bit & 1)
    found = largest_cluster(matrix)
    assert all(matrix[i, j] > 0 for i in found for j in found if i != j)
    sizes = [
        members.bit_count()
        for members in range(1, 2**n)
        if all(matrix[i, j] > 0 for i, j in places if members >> i & 1 and members >> j & 1)
    ]
    assert len(found) == max(sizes)


def test_of_two_clusters_the_one_that_agrees_further_is_taken():
    matrix = torch.zeros(4, 4)
    matrix[0, 1] = matrix[1, 0] = 5.0
    matrix[2, 3] = matrix[3, 2] = 7.0
    assert largest_cluster(matrix) == [2, 3]
    assert largest_cluster(torch.zeros(0, 0)) == []


def test_mean_rotation_lies_halfway(generator):
    first = random_rotations(5, generator)
    step = torch.tensor([0.0, 0.2, 0.1], dtype=torch.float64)
    mean = mean_rotations([first, first @ exp_map(step)])
    assert torch.allclose(mean, first @ exp_map(step / 2), atol=1e-10)


def test_shared_noise_agrees_between_joint_maps_and_not_between_crossed_half_sets(
    molecule_32, monkeypatch
):
    """Two methods, the same images: their half maps hold the same noise, set by set."""
    monkeypatch.setattr(agreement, "align_maps", lambda *_: UNMOVED)
    signal = lowpass(molecule_32, 6, 3)
    halves = [signal + 3 * signal.std() * noise(seed, 32) for seed in (1, 2)]
    both = Volumes((halves[0] + halves[1]) / 2, (halves[0], halves[1]))
    mask, none = Support(0.4).on(32), torch.zeros(17, dtype=torch.float64)
    crossed = map_agreement(both, both, mask, 2.4, none, crossed=True)
    assert crossed.threshold == 0.143
    assert crossed.joint[1:14].min() > 0.98
    assert crossed.curve[12:16].abs().max() < 0.143
    assert crossed.curve[1:4].min() > 0.5
    ended = map_agreement(both, both, mask, 2.4, none, crossed=True, last_shell=10)
    assert torch.equal(ended.curve[:11], crossed.curve[:11])
    assert (ended.curve[11:] == 0).all()
    assert (ended.joint[11:] == 0).all()
    plain = map_agreement(both, both, mask, 2.4, none, crossed=False)
    assert plain.threshold == 0.5
    assert torch.equal(plain.curve, crossed.joint)
    with pytest.raises(ValueError, match="has none"):
        map_agreement(Volumes(both.joint), both, mask, 2.4, none, crossed=True)


# Jobs as files


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """60 particles of 24 px with shifts; only their table and the true map matter."""
    folder = tmp_path_factory.mktemp("consensus")
    config = SimulateConfig(
        n_particles=60, box=BOX, pixel_size_angst=PIXEL, shift_angst=4.0, seed=1
    )
    simulate(MODEL, folder, config)
    return folder


def moving(seed, *, flipped):
    """A way to move a map: turn, shift and perhaps mirror."""
    turn = random_rotations(1, torch.Generator().manual_seed(seed))[0].double()
    shift = torch.tensor([0.8, -0.5, 1.1], dtype=torch.float64)
    return Alignment(turn, shift, flipped, 1.0, 8.0)


def write_job(folder, stack, truth, moved, *, seed, wrong=(), claim=9.0, shared_seed=None):
    """A finished job of a map that was moved: noisy half maps, poses and a claim."""
    folder.mkdir()
    volume = apply_alignment(truth, moved)
    loud = 0.3 * truth.std()
    for number in (1, 2):
        own = volume + loud * noise(10 * seed + number)
        write_map(folder / f"run_half{number}_class001_unfil.mrc", own.numpy(), PIXEL)
    write_map(folder / "initial_model.mrc", (volume + 0.7 * loud * noise(seed)).numpy(), PIXEL)
    particles = read_particles(stack / "particles.star")
    poses = euler_to_matrix(torch.from_numpy(particles.euler_deg()))
    origins = torch.from_numpy(particles.origins_angst())
    poses, origins = moved_poses(poses, origins, moved, PIXEL)
    poses[list(wrong)] = random_rotations(len(wrong), torch.Generator().manual_seed(seed)).double()
    subsets = np.random.default_rng(shared_seed or 0).integers(1, 3, len(particles))
    particles.write(
        folder / "run_data.star",
        euler_deg=matrix_to_euler(poses).numpy(),
        origins_angst=origins.numpy(),
        random_subsets=subsets,
    )
    curve = torch.linspace(1, 0, BOX // 2 + 1, dtype=torch.float64)
    curve = (curve - curve[0]) * (1 - 0.143) / (BOX * PIXEL / claim) * (BOX // 2) + 1
    write_fsc_star(folder / "fsc.star", FscCurve(curve, BOX, PIXEL, "half maps"))
    (folder / "RELION_JOB_EXIT_SUCCESS").touch()
    return folder


@pytest.fixture
def truth(stack):
    return torch.from_numpy(read_map(stack / "map.mrc").data)


@pytest.fixture
def other_molecule(truth):
    """Something else of the same size and spectrum."""
    inside = lowpass(noise(77) * (radius_grid(BOX, 3) < 8), 2.5, 3)
    inside = (inside > inside.flatten().quantile(0.95)).float()
    other = lowpass(inside * noise(78).abs(), 9, 3)
    return other * truth.std() / other.std()


@pytest.fixture
def coarser_search(monkeypatch):
    """Fewer rotations and candidates: these maps are clear enough."""
    monkeypatch.setattr(align, "_GRID_NSIDE", 3)
    monkeypatch.setattr(align, "_STAGES", ((5.0, 16, 20), (8.0, 3, 15), (12.0, 1, 15)))


@pytest.fixture
def usual_chance(monkeypatch):
    """What chance reaches between maps like these, measured once."""
    curve = torch.full((BOX // 2 + 1,), 0.12, dtype=torch.float64)
    curve[:6] = torch.tensor([0.9, 0.86, 0.51, 0.48, 0.48, 0.32], dtype=torch.float64)
    monkeypatch.setattr("cryorecon.run.consensus.compare.chance_fsc", lambda *_: curve)


def run(*arguments):
    """Through the command; errors that a user can mend are raised."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, CryoreconError):
        raise result.exception
    return result


def test_three_jobs_of_which_one_is_wrong(
    tmp_path, stack, truth, other_molecule, coarser_search, usual_chance
):
    """The wrong one comes first; the others are of opposite hands."""
    wrong = write_job(tmp_path / "wrong", stack, other_molecule, UNMOVED, seed=1)
    plain = write_job(tmp_path / "plain", stack, truth, UNMOVED, seed=2)
    stray = (4, 17, 33)
    mirrored = moving(5, flipped=True)
    turned = write_job(tmp_path / "turned", stack, truth, mirrored, seed=3, wrong=stray)
    consensus([wrong, plain, turned], tmp_path / "out", FAST, QUIET)
    out = tmp_path / "out"
    assert (out / "RELION_JOB_EXIT_SUCCESS").exists()
    tables = read_star(out / "agreement.star")
    assert list(tables["jobs"]["cryoreconRole"]) == ["disagrees", "agrees", "agrees"]
    last = tables["pairs"].iloc[-1]
    assert (last["cryoreconJobA"], last["cryoreconJobB"]) == ("plain", "turned")
    assert last["cryoreconCompared"] == "half_sets_crossed"
    assert list(tables["pairs"]["cryoreconAgree"].astype(int)) == [0, 0, 1]
    assert int(last["cryoreconMirrored"]) == 1
    assert float(last["cryoreconPosesWithinLimit"]) == pytest.approx(57 / 60)
    log = (out / "run.log").read_text()
    assert "WARNING: wrong disagrees with the majority" in log
    assert "AGREEMENT: 2 of 3 (plain, turned)" in log
    assert "agreement speaks for the poses, not for the data" in log
    # The map is that of the two, in the frame of the first of them.
    found = torch.from_numpy(read_map(out / "initial_model.mrc").data)
    reached = BOX * PIXEL / float(last["cryoreconAgreeToAngst"])
    assert agreement.fsc_curve(found, truth)[1 : int(reached)].min() > 0.8
    mask = torch.from_numpy(read_map(out / "initial_model_mask.mrc").data)
    assert float((truth * mask).square().sum() / truth.square().sum()) > 0.95
    assert not (out / "initial_model_masked.mrc").exists()
    # Every row is there, in order, and those that disagree are labelled.
    rows = read_star(out / "run_data.star")["particles"]
    assert list(rows["rlnImageName"]) == list(
        read_star(plain / "run_data.star")["particles"]["rlnImageName"]
    )
    agree = rows["cryoreconPosesAgree"].astype(int).to_numpy()
    assert tuple(np.flatnonzero(agree == 0)) == stray
    assert list(rows["rlnClassNumber"].astype(int)) == list(2 - agree)
    poses = euler_to_matrix(torch.from_numpy(read_particles(out / "run_data.star").euler_deg()))
    true = read_particles(stack / "particles.star")
    error = geodesic_distance_deg(poses, euler_to_matrix(torch.from_numpy(true.euler_deg())))
    assert error.max() < 3.0
    origins = read_particles(out / "run_data.star").origins_angst()
    assert np.abs(origins - true.origins_angst()).max() < 1.0
    for name in ("slices.png", "difference.png", "fsc.png", "map.png", "views.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "fsc.xml").read_text().startswith("<fsc title=")


def test_scripts_read_who_agrees(tmp_path, stack, truth):
    """Two jobs of one map, as they lie."""
    one = write_job(tmp_path / "one", stack, truth, UNMOVED, seed=1)
    two = write_job(tmp_path / "two", stack, truth, UNMOVED, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "align_maps", lambda *_: UNMOVED)
        patch.setattr(
            "cryorecon.run.consensus.compare.chance_fsc", lambda *_: torch.zeros(13).double()
        )
        found = run("consensus", one, two, "-o", tmp_path / "out", "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)["consensus"]
    assert [job["Role"] for job in told["jobs"]] == ["agrees", "agrees"]
    assert told["pairs"][0]["PosesWithinLimit"] == 1


def test_another_molecule_does_not_agree(
    tmp_path, stack, truth, other_molecule, coarser_search, usual_chance
):
    wrong = write_job(tmp_path / "wrong", stack, other_molecule, UNMOVED, seed=1)
    plain = write_job(tmp_path / "plain", stack, truth, UNMOVED, seed=2, shared_seed=9)
    with pytest.raises(CryoreconError, match="No agreement: plain and wrong agree"):
        run("consensus", plain, wrong, "-o", tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "RELION_JOB_EXIT_FAILURE").exists()
    assert (out / "difference.png").exists()
    for name in ("fsc.star", "fsc.xml"):
        assert "NO AGREEMENT: plain and wrong" in (out / name).read_text()
    assert not (out / "initial_model.mrc").exists()
    assert not (out / "run_data.star").exists()
    tables = read_star(out / "agreement.star")
    assert list(tables["jobs"]["cryoreconRole"]) == ["undecided"] * 2
    # Half sets drawn apart cannot be crossed.
    assert tables["pairs"]["cryoreconCompared"][0] == "maps_that_share_their_images'_noise"


def test_what_cannot_be_compared_is_said(tmp_path, stack, truth):
    job = write_job(tmp_path / "job", stack, truth, UNMOVED, seed=1)

    def other(name):
        return write_job(tmp_path / name, stack, truth, UNMOVED, seed=2)

    small = other("small")
    write_map(small / "initial_model.mrc", noise(1, 20).numpy(), PIXEL)
    for name in (1, 2):
        (small / f"run_half{name}_class001_unfil.mrc").unlink()
    finer = tmp_path / "finer.mrc"
    write_map(finer, truth.numpy(), PIXEL / 2)
    strange = other("strange")
    tables = read_star(strange / "run_data.star")
    names = tables["particles"]["rlnImageName"].str.replace("particles", "others")
    tables["particles"]["rlnImageName"] = names
    write_star(strange / "run_data.star", tables)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for second, what in (
        (small, "The boxes differ"),
        (finer, "The pixel sizes differ"),
        (strange, "no image in common"),
        (job, "given twice"),
        (tmp_path / "empty", "has no initial_model.mrc"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(CryoreconError, match=what):
            run("consensus", job, second, "-o", out)
    assert not out.exists()
    assert run("consensus", job, "-o", out).exit_code == 2
    like = other("like")
    with pytest.raises(CryoreconError, match="beyond the maps' Nyquist"):
        run("consensus", job, like, "-o", out, "--agree-to", 3)
    assert run("consensus", job, like, "-o", out, "--agree-to", 0).exit_code == 2


def test_one_map_and_failed_jobs_make_no_majority(tmp_path, stack, truth):
    job = write_job(tmp_path / "job", stack, truth, UNMOVED, seed=1)
    for name, inside in (("broken", "RELION_JOB_EXIT_FAILURE"), ("moments", "starts.star")):
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).touch()
    paths = [job, tmp_path / "broken", tmp_path / "moments"]
    with pytest.raises(CryoreconError, match="No agreement: one job claims enough to vote"):
        consensus(paths, tmp_path / "out", FAST, QUIET)
    jobs = read_star(tmp_path / "out" / "agreement.star")["jobs"]
    assert list(jobs["cryoreconRole"]) == ["undecided", "no_map", "no_map"]
    assert "ambiguous" in jobs["cryoreconClaim"][2]
    with pytest.raises(CryoreconError, match="no job has a map"):
        consensus(paths[1:], tmp_path / "none", FAST, QUIET)
    allowed = ConsensusOptions(chance_trials=1, allow_ambiguous=True)
    consensus(paths, tmp_path / "out", allowed, QUIET)
    kept = read_map(tmp_path / "out" / "initial_model.mrc").data
    np.testing.assert_array_equal(kept, read_map(job / "initial_model.mrc").data)
    log = (tmp_path / "out" / "run.log").read_text()
    assert "NO AGREEMENT" in log
    assert "of the agreeing jobs" not in log


def test_an_agreed_table_has_origins_in_one_unit(tmp_path):
    """Of a 3.1 table that has them in pixels, too, and says of poses what is not true of others."""
    names = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginX", "rlnOriginY")
    stale = {**dict.fromkeys(names, "7"), "rlnOriginXAngst": "1", "rlnOriginYAngst": "1"}
    table = {"rlnImageName": ["1@a.mrcs", "2@a.mrcs"], "rlnOpticsGroup": "1", **stale}
    optics = pd.DataFrame({"rlnOpticsGroup": ["1"], "rlnImagePixelSize": ["2.0"]})
    particles = pd.DataFrame({**table, "rlnLogLikeliContribution": "50"})
    write_star(tmp_path / "run_data.star", {"optics": optics, "particles": particles})
    base = SimpleNamespace(path=tmp_path, pixel_size_angst=2.0)
    job = SimpleNamespace(path=lambda name: tmp_path / f"agreed_{name}")
    poses = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    agreed._write_table(job, base, poses, torch.full((2, 2), 5.0), {})
    found = read_star(tmp_path / "agreed_run_data.star")["particles"]
    assert not {"rlnOriginX", "rlnOriginY", "rlnLogLikeliContribution"} & set(found)
    read = read_pose_table(tmp_path / "agreed_run_data.star")
    torch.testing.assert_close(read.origins_angst, torch.full((2, 2), 5.0).double())
