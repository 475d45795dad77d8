"""Images in wrong poses are freed by a new search against the other half set's map."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import MODEL, at_true_poses, simulated, trimer_stack

from cryorecon.engines import new_search
from cryorecon.engines.new_search import least_likely, reassign
from cryorecon.engines.reconstruction import RefineConfig
from cryorecon.engines.rounds import refine_round
from cryorecon.engines.shrinking import ShrinkingBatch
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.rotations import exp_map, geodesic_distance_deg, random_rotations
from cryorecon.physics.symmetry import distance_under_deg, symmetry_group
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig

CONFIG = RefineConfig(search_nside=2)
ONE = torch.eye(3)[None]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("stack"), 300, 24, 1.0)


@pytest.fixture
def case(stack):
    """Images, a state of true poses with its maps, and these poses."""
    images, state = at_true_poses(stack, CONFIG)
    refine_round(state, images, CONFIG, fsc_curve, joint=False, n_steps=0)
    return images, state, state.rotations.clone()


def test_wrong_poses_are_found_again_and_right_ones_stay(case, generator):
    images, state, truth = case
    wrong = torch.arange(300) % 5 == 0
    state.rotations[wrong] = random_rotations(60, generator, torch.float32)
    counts = []
    band = state.band
    share = reassign(state, images, CONFIG, fsc_curve, generator, counts.append)
    assert state.band == band
    error = geodesic_distance_deg(state.rotations, truth)
    assert (error[wrong] < 6).float().mean() > 0.9
    assert (state.rotations[~wrong] == truth[~wrong]).all((1, 2)).float().mean() > 0.97
    assert 0.17 < share < 0.22
    assert counts == sorted(counts)
    assert counts[-1] == 300


def test_a_half_set_is_searched_in_the_other_ones_map(case, generator):
    """Its own map holds each image's noise, at the pose that it has."""
    images, state, truth = case
    first, n = state.half == 0, int((state.half == 0).sum())
    state.maps[0] = torch.zeros_like(state.maps[0])
    state.rotations[first] = random_rotations(n, generator, torch.float32)
    reassign(state, images, CONFIG, fsc_curve, generator)
    assert (geodesic_distance_deg(state.rotations, truth)[first] < 6).float().mean() > 0.9
    assert (state.rotations == truth)[~first].all((1, 2)).float().mean() > 0.97


def test_half_maps_that_are_turned_come_to_one_frame(case, generator):
    """As on two copies of a nearly symmetric particle: at once, they would change places."""
    images, state, truth = case
    turn = exp_map(torch.tensor([0.0, 0.0, 2.0]))
    state.rotations[state.half == 1] = state.rotations[state.half == 1] @ turn
    refine_round(state, images, CONFIG, fsc_curve, joint=False, n_steps=0)
    assert state.fsc[5] < 0.5
    for _ in range(2):
        reassign(state, images, CONFIG, fsc_curve, generator)
        refine_round(state, images, CONFIG, fsc_curve, joint=False)
    assert state.fsc[5] > 0.9
    assert (geodesic_distance_deg(state.rotations, truth @ turn) < 6).float().mean() > 0.9


def test_leaving_hopeless_candidates_out_changes_nothing(case, generator, monkeypatch):
    images, state, truth = case
    wrong = torch.arange(300) % 5 == 0
    state.rotations[wrong] = random_rotations(60, generator, torch.float32)
    other = replace(state, rotations=state.rotations.clone(), offsets_px=state.offsets_px.clone())
    seed = generator.get_state()
    reassign(state, images, CONFIG, fsc_curve, generator)
    monkeypatch.setattr(new_search, "_HOPELESS", torch.inf)
    reassign(other, images, CONFIG, fsc_curve, generator.set_state(seed))
    apart = geodesic_distance_deg(state.rotations, other.rotations)
    assert (apart < 2).float().mean() > 0.99
    assert not torch.equal(state.rotations[wrong], truth[wrong])


def test_candidates_are_held_of_few_images_at_a_time(case, generator, monkeypatch):
    images, state, _ = case
    monkeypatch.setattr("cryorecon.engines.reconstruction.TURNED_TOGETHER", 30)
    wrong = torch.arange(300) % 5 == 0
    state.rotations[wrong] = random_rotations(60, generator, torch.float32)
    other = replace(state, rotations=state.rotations.clone(), offsets_px=state.offsets_px.clone())
    seed, seen = generator.get_state(), []
    reassign(state, images, CONFIG, fsc_curve, generator)

    climb = new_search._Ladder.climb

    def spy(ladder, batch, held, found):
        seen.append(len(found[0]))
        return climb(ladder, batch, held, found)

    monkeypatch.setattr(new_search._Ladder, "climb", spy)
    monkeypatch.setattr(new_search, "image_batches", lambda *_: ShrinkingBatch(30))
    reassign(other, images, CONFIG, fsc_curve, generator.set_state(seed))
    assert seen == [30] * 10
    apart = geodesic_distance_deg(state.rotations, other.rotations)
    assert (apart < 0.05).float().mean() > 0.99


def off_centre(folder, generator):
    """24 px images, offsets to 5 px; those beyond 2.4, a tenth of the box, lie there, turned."""
    settings = SimulateConfig(
        n_particles=300, box=24, pixel_size_angst=3.2, snr=1.0, seed=4, shift_angst=16.0
    )
    simulate(MODEL, folder, settings)
    images, state = at_true_poses(folder, CONFIG)
    refine_round(state, images, CONFIG, fsc_curve, joint=False, n_steps=0)
    truth, length = state.rotations.clone(), state.offsets_px.norm(dim=1)
    far = length > 2.4
    assert 0.4 < far.float().mean() < 0.95
    state.offsets_px[far] *= 2.4 / length[far, None]
    state.rotations[far] = random_rotations(int(far.sum()), generator, torch.float32)
    return images, state, truth, far


@pytest.mark.parametrize("farthest", [0.25, 0.1])
def test_particles_beyond_the_limit_are_looked_for_farther_out(tmp_path, generator, farthest):
    images, state, truth, far = off_centre(tmp_path, generator)
    ranges = []
    for _ in range(3):
        reassign(state, images, replace(CONFIG, farthest_offset=farthest), fsc_curve, generator)
        ranges.append(state.offset_range)
        refine_round(state, images, CONFIG, fsc_curve, joint=False)
    found = (geodesic_distance_deg(state.rotations, truth) < 6).float()
    assert found[~far].mean() > 0.95
    if farthest > 0.1:
        assert 0.12 < ranges[0] < ranges[-1] <= 0.25
        assert found[far].mean() > 0.9
    else:
        assert ranges == [0.1] * 3
        assert found[far].mean() < 0.6


def test_a_range_that_holds_all_particles_stays(case, generator):
    images, state, _ = case
    reassign(state, images, CONFIG, fsc_curve, generator)
    assert state.offset_range == CONFIG.offset_range


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_candidates_of_one_pose_that_are_as_likely_are_its_mean(generator, sign):
    """Whichever of them rounding makes the likeliest, and others as far as they are as likely."""
    pose = random_rotations(1, generator)
    axis = torch.tensor([[0.01, 0.0, 0.0]], dtype=torch.float64)
    near = [exp_map(axis) @ pose, exp_map(-axis) @ pose, exp_map(3 * axis) @ pose]
    far = random_rotations(5, generator)
    rotations = torch.cat([*near, far])[None]
    offsets_px = torch.arange(16.0, dtype=torch.float64).view(1, 8, 2)
    gain = torch.tensor([[5.0, 5.0 + sign * 1e-6, 4.97, 2.0, 1.0, 0, 0, 0]], dtype=torch.float64)
    found = new_search._best_apart(gain, (rotations, offsets_px), ONE)
    assert geodesic_distance_deg(found[1][0, 0], pose[0]) < 1e-3
    torch.testing.assert_close(found[1][0, 1:], far[:2])
    torch.testing.assert_close(found[0][0], gain[0, [0, 3, 4]], atol=2e-6, rtol=0)
    assert (found[2][0, 0] - torch.tensor([1.0, 2.0])).abs().max() < 1e-3


def test_a_place_without_a_candidate_holds_a_rotation(generator):
    rotations = random_rotations(8, generator)[None].float()
    gain = torch.full((1, 8), -torch.inf)
    found = new_search._best_apart(gain, (rotations, torch.zeros(1, 8, 2)), ONE)
    assert (found[0] == -torch.inf).all()
    assert geodesic_distance_deg(found[1][0], rotations[0, :3]).max() < 0.05


def test_copies_of_candidates_are_one_pose_in_a_symmetric_map(generator):
    group = symmetry_group("D2")
    pose = random_rotations(1, generator)
    others = random_rotations(6, generator)
    rotations = torch.cat([pose, pose @ exp_map(torch.tensor([[0.02, 0, 0]]).double()), others])
    rotations = (rotations @ group[torch.arange(8) % 4])[None]
    gain = torch.tensor([[5.0, 5.0, 4.0, 3.0, 2, 1, 0, 0]], dtype=torch.float64)
    found = new_search._best_apart(gain, (rotations, torch.zeros(1, 8, 2).double()), group)
    assert found[0].tolist() == [[5.0, 4.0, 3.0]]
    assert distance_under_deg(found[1][0, 0], pose[0], group) == pytest.approx(0.573, abs=0.01)


@pytest.mark.parametrize("told", [True, False])
def test_copies_are_no_rivals_in_a_symmetric_map(tmp_path, generator, told):
    images, state = at_true_poses(trimer_stack(tmp_path), CONFIG)
    truth, group = state.rotations.clone(), symmetry_group("C3").float()
    state.group = group
    refine_round(state, images, CONFIG, fsc_curve, joint=False, n_steps=0)
    state.group = group if told else ONE
    wrong = torch.arange(300) % 5 == 0
    state.rotations[wrong] = random_rotations(60, generator, torch.float32)
    share = reassign(state, images, CONFIG, fsc_curve, generator)
    error = distance_under_deg(state.rotations, truth, group)
    assert (error < 6).float().mean() > 0.95
    if told:
        assert 0.15 < share < 0.25
        assert state.rivals.in_doubt() < 0.1
    else:
        assert state.rivals.in_doubt() > 0.9


def test_few_rotations_are_enough_for_a_large_group(case, generator):
    """A coarse grid leaves fewer candidates than a rung keeps."""
    images, state, _ = case
    state.group = symmetry_group("I").float()
    reassign(state, images, replace(CONFIG, search_nside=1), fsc_curve, generator)
    assert state.rotations.isfinite().all()


def test_images_that_fit_worst_are_told_by_optics_group(case):
    """Images of one microscope may all look worse than those of another."""
    images, state, _ = case
    group = torch.arange(300) % 3
    worst = torch.arange(300) < 60
    state.log_likelihood = 100.0 * group + torch.arange(300) + 50 * ~worst
    images = replace(images, group=group.int())
    assert (least_likely(state, images, 0.2) == worst).all()
    # Of a few at least one.
    assert least_likely(state, images.apart(torch.arange(300)), 0.001).sum() == 3


def test_those_that_fit_worst_are_searched_alone(case, generator):
    images, state, truth = case
    wrong = torch.arange(300) % 10 == 0
    state.rotations[wrong] = random_rotations(30, generator, torch.float32)
    refine_round(state, images, CONFIG, fsc_curve, joint=False, n_steps=0)
    held, maps, counts = state.rotations.clone(), list(state.maps), []
    asked = least_likely(state, images, 0.25)
    share = reassign(state, images, CONFIG, fsc_curve, generator, counts.append, asked)
    assert counts[-1] == asked.sum() == 75
    assert (state.rotations == held)[~asked].all()
    assert all(mine is before for mine, before in zip(state.maps, maps, strict=True))
    error = geodesic_distance_deg(state.rotations, truth)
    assert (error[wrong] < 6).float().mean() > 0.9
    assert 0.08 < share < 0.12


def test_all_are_searched_where_larger_offsets_are_looked_for(case, generator):
    images, state, _ = case
    state.offset_range, state.offsets_px[:30] = 0.1, torch.tensor([2.4, 0.0])
    counts, few = [], torch.arange(300) < 50
    reassign(state, images, CONFIG, fsc_curve, generator, counts.append, few)
    assert counts[-1] == 300
