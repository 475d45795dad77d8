"""What users can choose of an ab initio run, at 24 to 32 px."""

from __future__ import annotations

import dataclasses
import functools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MODEL, cryorecon, simulated, trimer_stack
from rich.console import Console

from cryorecon.conventions import euler_to_matrix
from cryorecon.engines.contrast import contrast_score
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.engines.rounds import refine_round
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import open_stack, read_map, stack_writer, write_map
from cryorecon.io.particles import read_particles
from cryorecon.io.star import read_star, write_star
from cryorecon.maps.align import align_maps, apply_alignment, rotate_map
from cryorecon.maps.fsc import fsc_curve
from cryorecon.maps.poses import compare_pose_sets
from cryorecon.physics.fourier import lowpass
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.rotations import exp_map, geodesic_distance_deg
from cryorecon.physics.symmetry import symmetry_group
from cryorecon.run import independent_halves, load, refining, stages
from cryorecon.run.abinitio import abinitio
from cryorecon.run.abinitio_input import AbinitioOptions, prepared
from cryorecon.run.load import load_observations
from cryorecon.run.results import report_offsets
from cryorecon.run.rmfn_stages import RmfnStages
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig

pytestmark = pytest.mark.usefixtures("no_pictures")

QUIET = Console(quiet=True)
SHORT = RmfnConfig(n_starts=1, half_rounds=4, joint_rounds=1, final_steps=2)
# Not long enough to find a molecule.
TINY = RmfnConfig(
    search_nside=2,
    n_starts=1,
    temperatures=(5.0, 1.0),
    width=16,
    half_rounds=2,
    joint_rounds=1,
    final_steps=1,
)


def rewritten(folder, change):
    """The particles of a folder with their pixels changed."""
    images = open_stack(folder / "particles.mrcs")
    (folder / "new").mkdir(exist_ok=True)
    with stack_writer(folder / "new" / "changed.mrcs", images.shape[-1], 3.2) as stack:
        stack.append(change(images.astype("float32")))
    tables = read_star(folder / "particles.star")
    names = [f"{i + 1}@changed.mrcs" for i in range(len(images))]
    tables["particles"]["rlnImageName"] = names
    write_star(folder / "new" / "particles.star", tables)
    return folder / "new" / "particles.star"


@pytest.fixture(scope="module")
def bright(tmp_path_factory):
    """300 particles, 24 px at 3.2 A, SNR 1."""
    return simulated(tmp_path_factory.mktemp("bright"), 300, 24, 1.0)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """500 particles, 32 px at 2.4 A, SNR 0.5: enough to find the molecule from random poses."""
    return simulated(tmp_path_factory.mktemp("large"), 500, 32, 0.5)


@pytest.fixture(scope="module")
def start(bright, tmp_path_factory):
    """The molecule of `bright` at 19 A, 40 times too strong: a map that needs no search."""
    truth = torch.from_numpy(read_map(bright / "map.mrc").data)
    path = tmp_path_factory.mktemp("start") / "start.mrc"
    write_map(path, (40 * lowpass(truth, 4, 3)).numpy(), 3.2)
    return path


def log_of(job):
    return (job / "run.log").read_text()


def stages_of(job):
    """Of rounds.star, each once, in order."""
    return list(dict.fromkeys(read_star(job / "rounds.star")["rounds"]["cryoreconStage"]))


def agreement(job, folder, shell, *, aligned=False, both_hands=True):
    """Least FSC with the truth up to a shell; a map that began at the truth is in its place."""
    maps = [read_map(path) for path in (job / "initial_model.mrc", folder / "map.mrc")]
    found, truth = (torch.from_numpy(source.data) for source in maps)
    if not aligned:
        pixel = maps[1].pixel_size_angst
        found = apply_alignment(found, align_maps(found, truth, pixel, both_hands=both_hands))
    return float(fsc_curve(found, truth)[1 : shell + 1].min())


@pytest.mark.slow
def test_particles_that_show_one_image_share_a_quarter(large, tmp_path, monkeypatch):
    """Or the maps that a half set is refined by agree in their images' noise."""
    tables, seen = read_star(large / "particles.star"), []
    n = len(tables["particles"])
    twice = tables["particles"].iloc[np.r_[0:n, 0:n]].reset_index(drop=True)
    write_star(large / "twice.star", tables | {"particles": twice})

    def begin(stages, images, quarters, part="map"):
        seen.append((images.rows.long() % n, quarters))
        raise KeyboardInterrupt

    monkeypatch.setattr(RmfnStages, "from_scratch", begin)
    options = AbinitioOptions(halves="independent", engine=SHORT)
    with pytest.raises(KeyboardInterrupt):
        abinitio(large / "twice.star", tmp_path / "job", options, QUIET)
    ((image, quarters),) = seen
    of_image = torch.stack([quarters[image == number] for number in image.unique()])
    assert of_image.shape[1] == 2
    assert torch.equal(of_image[:, 0], of_image[:, 1])
    assert abs(int(of_image[:, 0].sum()) - len(of_image) / 2) < 1


def one_trial(monkeypatch):
    fewer = functools.partial(independent_halves.chance_fsc, n_trials=1)
    monkeypatch.setattr(independent_halves, "chance_fsc", fewer)


def test_independent_halves_from_scratch(large, tmp_path, monkeypatch):
    # How much agreement chance brings is for test_chance.py: one trial here.
    one_trial(monkeypatch)
    options = AbinitioOptions(halves="independent", engine=SHORT)
    abinitio(large / "particles.star", tmp_path / "job", options, QUIET)
    assert "half set 2 moved onto half set 1" in log_of(tmp_path / "job")
    assert "independent half maps (gold standard)" in log_of(tmp_path / "job")
    halves = [
        torch.from_numpy(read_map(tmp_path / "job" / f"run_half{n}_class001_unfil.mrc").data)
        for n in (1, 2)
    ]
    assert fsc_curve(*halves)[1:8].min() > 0.8
    assert agreement(tmp_path / "job", large, 9) > 0.9
    subsets = read_particles(tmp_path / "job" / "run_data.star").random_subsets()
    assert sorted(set(subsets)) == [1, 2]
    assert stages_of(tmp_path / "job") == [
        f"half-set-{number}-{kind}" for number in (1, 2) for kind in ("half-maps", "joint-map")
    ] + ["joint-map"]


def test_black_particles_are_found_and_said(bright, start, tmp_path):
    """A white map explains them only once they are inverted."""
    star = rewritten(bright, lambda images: -images)
    options = AbinitioOptions(halves="none", init_map=start, engine=SHORT)
    abinitio(star, tmp_path / "job", options, QUIET)
    assert "particles look BLACK ON WHITE" in log_of(tmp_path / "job")
    assert "the CTF is inverted" in log_of(tmp_path / "job")
    assert agreement(tmp_path / "job", bright, 9, aligned=True) > 0.9
    assert not (tmp_path / "job" / "fsc.star").exists()
    assert not (tmp_path / "job" / "run_half1_class001_unfil.mrc").exists()


@pytest.mark.parametrize("looks", [True, False])
def test_images_that_look_phase_flipped_are_warned_of(bright, start, tmp_path, monkeypatch, looks):
    monkeypatch.setattr("cryorecon.run.abinitio.look_flipped", lambda *_: looks)
    options = AbinitioOptions(halves="none", init_map=start, engine=SHORT)
    abinitio(bright / "particles.star", tmp_path / "job", options, QUIET)
    assert ("look phase flipped" in log_of(tmp_path / "job")) == looks


def test_contrast_is_sure_of_particles_and_unsure_of_noise(bright, generator):
    particles = read_particles(bright / "particles.star")
    images = load_observations(particles, 0.8)
    assert contrast_score(images, 0.8) > 20
    images.gain.neg_()
    assert contrast_score(images, 0.8) < -20
    noise = torch.randn(len(images), len(images.plane), 2, generator=generator)

    def source(rows, count):
        return torch.view_as_complex(noise)[rows, :count], torch.ones(len(rows), count)

    assert abs(contrast_score(dataclasses.replace(images, source=source), 0.8)) < 4


def test_pure_noise_gives_no_map(bright, tmp_path):
    generator = torch.Generator().manual_seed(0)
    star = rewritten(bright, lambda images: torch.randn(images.shape, generator=generator).numpy())
    with pytest.raises(CryoreconError, match="No signal found"):
        abinitio(star, tmp_path / "job", AbinitioOptions(engine=SHORT), QUIET)
    assert (tmp_path / "job" / "RELION_JOB_EXIT_FAILURE").exists()
    assert not (tmp_path / "job" / "initial_model.mrc").exists()


@pytest.mark.slow
def test_a_grid_can_hold_the_map(large, tmp_path):
    options = AbinitioOptions(engine=dataclasses.replace(SHORT, volume="grid"))
    abinitio(large / "particles.star", tmp_path / "job", options, QUIET)
    assert agreement(tmp_path / "job", large, 9) > 0.9
    assert (tmp_path / "job" / "scale3.mrc").exists()


@pytest.mark.parametrize("box", [25, 33, 38, 45])
def test_any_box_runs(box, tmp_path):
    config = SimulateConfig(
        n_particles=30, box=box, pixel_size_angst=76.8 / box, snr=float("inf"), seed=1
    )
    simulate(MODEL, tmp_path / "s", config)
    abinitio(
        tmp_path / "s" / "particles.star", tmp_path / "job", AbinitioOptions(engine=TINY), QUIET
    )
    assert read_map(tmp_path / "job" / "initial_model.mrc").data.shape == (box, box, box)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """80 particles, 24 px at 3.2 A, SNR 2."""
    return simulated(tmp_path_factory.mktemp("few"), 80, 24, 2.0)


def test_images_read_again_give_the_same_map(few, tmp_path):
    """Not one number differs between images held in memory and images read when needed."""
    maps = []
    engine = dataclasses.replace(TINY, update_scale=True)
    for keep in ("memory", "disk"):
        options = AbinitioOptions(keep=keep, engine=engine)
        abinitio(few / "particles.star", tmp_path / keep, options, QUIET)
        maps.append(read_map(tmp_path / keep / "initial_model.mrc").data)
    assert (maps[0] == maps[1]).all()


def test_particles_at_the_offset_limit_are_reported(few, tmp_path):
    options = AbinitioOptions(offset_range_angst=2.0, engine=TINY)
    abinitio(few / "particles.star", tmp_path / "job", options, QUIET)
    assert "at the limit of 2.0 A" in log_of(tmp_path / "job")
    assert "give a larger --offset-range" in log_of(tmp_path / "job")


def test_no_larger_offset_range_is_advised_beyond_a_quarter_of_the_box(few):
    said = []
    particles = read_particles(few / "particles.star")
    state = SimpleNamespace(offsets_px=torch.full((80, 2), 6 / 2**0.5), searched_to=lambda _: 0.25)
    report_offsets(SimpleNamespace(say=said.append), state, TINY, particles)
    assert "80 of 80 at the limit of 19.2 A" in said[0]
    assert "junk or neighbours" in said[1]
    assert "--offset-range" not in said[1]


@pytest.mark.parametrize("angst", [-5.0, 0.51 * 24 * 3.2, float("nan")])
def test_offsets_that_no_particle_can_have_are_refused(bright, angst):
    given = AbinitioOptions(offset_range_angst=angst)
    by_setting = AbinitioOptions(engine=RmfnConfig(offset_range=angst / (24 * 3.2)))
    for options in (given, by_setting):
        with pytest.raises(CryoreconError, match=r"cannot lie .* A off the middle") as caught:
            prepared(bright / "particles.star", options)
        assert caught.value.remedy == "Give --offset-range in angstrom, from 0 to 38.4"
    half = AbinitioOptions(offset_range_angst=12 * 3.2)
    assert prepared(bright / "particles.star", half).config.offset_range == 0.5


@pytest.mark.parametrize("method", [(), ("--method", "all"), ("--method", "amortized")])
def test_a_negative_offset_range_is_no_option(bright, tmp_path, method):
    words = (bright / "particles.star", "-o", tmp_path / "job", "--offset-range", -5)
    assert cryorecon("abinitio", *words, *method).returncode == 2
    assert not (tmp_path / "job").exists()


def test_particles_outside_a_subset_join_later(bright, start, tmp_path):
    """Engine rmfn searches them against the map that the subset has made."""
    options = AbinitioOptions(engine=SHORT, subset=150, init_map=start)
    abinitio(bright / "particles.star", tmp_path / "job", options, QUIET)
    given, found = (
        read_particles(path)
        for path in (bright / "particles.star", tmp_path / "job" / "run_data.star")
    )
    assert len(found) == len(given) == 300
    kinds = ["half-maps", "joint-map"]
    parts = [*kinds, *(f"all-particles-{kind}" for kind in kinds)]
    assert stages_of(tmp_path / "job") == parts
    matrices = [euler_to_matrix(torch.from_numpy(p.euler_deg())) for p in (found, given)]
    assert compare_pose_sets(*matrices).fraction_within(15) > 0.8


def test_a_mask_is_worn_and_checked(few, tmp_path):
    ball = soft_ball(24, 7.0, 2.0, 3)
    write_map(tmp_path / "mask.mrc", ball.numpy(), 3.2)
    options = AbinitioOptions(mask=tmp_path / "mask.mrc", engine=TINY)
    abinitio(few / "particles.star", tmp_path / "job", options, QUIET)
    found = torch.from_numpy(read_map(tmp_path / "job" / "initial_model.mrc").data)
    assert found[ball == 0].abs().max() == 0
    assert "soft sphere of the diameter times --mask" in log_of(tmp_path / "job")
    write_map(tmp_path / "loud.mrc", 3 * ball.numpy(), 3.2)
    write_map(tmp_path / "other.mrc", ball.numpy(), 1.2)
    for name, words in (("loud", "goes from 0 to 1"), ("other", "Resample the mask")):
        options = AbinitioOptions(mask=tmp_path / f"{name}.mrc", engine=TINY)
        with pytest.raises(CryoreconError, match=words):
            abinitio(few / "particles.star", tmp_path / "no", options, QUIET)
    assert not (tmp_path / "no").exists()


def test_a_map_can_take_the_place_of_the_search(large, tmp_path, coarse_alignment):
    """Of any scale, blurred; an unrelated one is refused."""
    truth = torch.from_numpy(read_map(large / "map.mrc").data)
    write_map(tmp_path / "start.mrc", (40 * lowpass(truth, 4, 3)).numpy(), 2.4)
    options = AbinitioOptions(60.0, init_map=tmp_path / "start.mrc", engine=SHORT)
    abinitio(large / "particles.star", tmp_path / "job", options, QUIET)
    assert "searching" not in log_of(tmp_path / "job").replace("searching again", "")
    assert agreement(tmp_path / "job", large, 9, both_hands=False) > 0.95
    write_map(tmp_path / "black.mrc", -truth.numpy(), 2.4)
    for changed, words in (
        ({"init_map": tmp_path / "black.mrc"}, "no better than an empty"),
        ({"halves": "independent"}, "not independent"),
    ):
        wrong = dataclasses.replace(options, **changed)
        with pytest.raises(CryoreconError, match=words):
            abinitio(large / "particles.star", tmp_path / "no", wrong, QUIET)


@pytest.fixture(scope="module")
def trimer(tmp_path_factory):
    return trimer_stack(tmp_path_factory.mktemp("trimer"))


def test_symmetry_makes_half_maps_from_poses_before_the_joint_rounds(trimer, tmp_path, monkeypatch):
    """Joint rounds would make the half maps agree too well; one rotation apart is all they are."""
    seen = []

    def spy(state, *args, joint, n_steps=4, **kwargs):
        if n_steps == 0:
            seen.append(("symmetry", state.rotations.clone()))
        report = refine_round(state, *args, joint=joint, n_steps=n_steps, **kwargs)
        if not joint and n_steps > 0:
            seen.append(("half", state.rotations.clone()))
        return report

    for module in (refining, stages):
        monkeypatch.setattr(module, "refine_round", spy)
    engine = dataclasses.replace(TINY, joint_rounds=2)
    options = AbinitioOptions(symmetry="C3", engine=engine)
    abinitio(trimer / "particles.star", tmp_path / "job", options, QUIET)
    kinds = [kind for kind, _ in seen]
    at = kinds.index("symmetry")
    assert kinds[at - 1 : at + 2] == ["half", "symmetry", "half"]
    before, after = seen[at - 1][1], seen[at][1]
    turns = before.transpose(-1, -2) @ after
    assert geodesic_distance_deg(turns, turns[:1]).max() < 0.1


def test_symmetry_is_found_and_applied(trimer, tmp_path, coarse_alignment):
    """About an axis that the map to start from has tilted."""
    given = torch.from_numpy(read_map(trimer / "trimer.mrc").data)
    tilted = rotate_map(lowpass(given, 4, 3), exp_map(torch.tensor([0.5, -0.8, 0.3])))
    write_map(tmp_path / "tilted.mrc", tilted.numpy(), 3.2)
    options = AbinitioOptions(symmetry="c3", init_map=tmp_path / "tilted.mrc", engine=SHORT)
    abinitio(trimer / "particles.star", tmp_path / "job", options, QUIET)
    said = re.search(r"C3: turned copies of the map correlate (\S+)", log_of(tmp_path / "job"))
    assert float(said[1]) > 0.8
    found = torch.from_numpy(read_map(tmp_path / "job" / "initial_model.mrc").data)
    turned = rotate_map(found, symmetry_group("C3")[1])
    assert fsc_curve(found, turned)[1:8].min() > 0.98
    assert (tmp_path / "job" / "initial_model_C1.mrc").exists()
    parts = ["half-maps", "joint-map", "symmetric-half-maps", "symmetric-joint-map"]
    assert stages_of(tmp_path / "job") == parts
    assert agreement(tmp_path / "job", trimer, 7, both_hands=False) > 0.95
    with pytest.raises(CryoreconError, match="C1, Cn, Dn, T, O, I or I1 to I4"):
        options = AbinitioOptions(symmetry="Q7", engine=SHORT)
        abinitio(trimer / "particles.star", tmp_path / "no", options, QUIET)


def test_noise_is_measured_on_some_images_the_same_from_disk_and_memory(bright, monkeypatch):
    particles = read_particles(bright / "particles.star")
    whole = load_observations(particles, 0.8).noise_power
    monkeypatch.setattr(load, "_NOISE_IMAGES", 100)
    seen = [load_observations(particles, 0.8, keep=keep).noise_power for keep in ("disk", "memory")]
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], whole)
    assert (seen[0] / whole - 1).abs()[:, 2:].max() < 0.15
