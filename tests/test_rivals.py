"""Images that may have one pose or another go into the map at each of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import at_true_poses, simulated

from cryorecon.engines.new_search import reassign
from cryorecon.engines.reconstruction import Reconstruction, RefineConfig
from cryorecon.engines.rivals import N_RIVALS, Rivals, weighed
from cryorecon.engines.rounds import refine_round
from cryorecon.io.mrc import read_map
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.masks import Support
from cryorecon.physics.rotations import exp_map, geodesic_distance_deg, random_rotations
from cryorecon.physics.symmetry import symmetry_group
from cryorecon.run.results import report_copies

CONFIG = RefineConfig(search_nside=3)
NONE = -torch.inf


def poses(count, generator, *shape):
    rotations = random_rotations(count, generator, torch.float32)
    offsets = torch.randn(count, 2, generator=generator)
    return rotations.unflatten(0, shape), offsets.unflatten(0, shape)


@pytest.mark.parametrize(
    ("gain", "moved", "share"),
    [
        ((NONE, NONE, NONE), False, (0, 0, 0)),
        ((0.0, NONE, NONE), False, (0.5, 0, 0)),
        # An image's own pose stays unless the other is surely likelier.
        ((0.75, NONE, NONE), False, (0.622, 0, 0)),
        ((3.0, -3.0, NONE), True, (0.119, 0, 0)),
        ((30.0, 29.0, NONE), True, (0, 0.339, 0)),
    ],
)
def test_shares_follow_likelihoods(generator, gain, moved, share):
    held, others = poses(1, generator, 1), poses(N_RIVALS, generator, 1, N_RIVALS)
    found, new, rivals = weighed(torch.tensor([gain]), held, others)
    assert found.tolist() == [moved]
    torch.testing.assert_close(
        rivals.share[0], torch.tensor(share, dtype=torch.float32), atol=1e-3, rtol=0
    )
    assert torch.equal(new[0], others[0][:, 0] if moved else held[0])
    assert torch.equal(rivals.offsets_px[:, 0], held[1] if moved else others[1][:, 0])


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("stack"), 400, 24, 0.05)


@pytest.fixture
def case(stack):
    """Images, a state of true poses, and the true map."""
    truth = torch.from_numpy(read_map(stack / "map.mrc").data)
    return *at_true_poses(stack, CONFIG), truth


def averaged(state, images):
    """Half maps from poses as they are."""
    refine_round(state, images, CONFIG, fsc_curve, joint=False, n_steps=0)
    return [half.clone() for half in state.halves]


def test_a_rival_with_its_pose_changes_nothing(case):
    images, state, _ = case
    before = averaged(state, images)
    state.rivals.rotations[:, 0] = state.rotations
    state.rivals.offsets_px[:, 0] = state.offsets_px
    state.rivals.share[:, 0] = torch.linspace(0, 1, len(images))
    for one, other in zip(before, averaged(state, images), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * float(one.abs().max()), rtol=0)


def test_a_rival_with_all_of_an_image_takes_its_place(case, generator):
    images, state, _ = case
    before = averaged(state, images)
    state.rivals.rotations[:, 2], state.rivals.offsets_px[:, 2] = state.rotations, state.offsets_px
    state.rivals.share[:, 2] = 1
    state.rotations = random_rotations(len(images), generator, torch.float32)
    for one, other in zip(before, averaged(state, images), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * float(one.abs().max()), rtol=0)


def test_rounds_leave_rivals_where_they_were_found(case, generator):
    """Own half maps, which hold the images' noise, would draw them to it."""
    images, state, _ = case
    averaged(state, images)
    reassign(state, images, CONFIG, fsc_curve, generator)
    before = state.rivals.copied()
    assert before.share.sum() > 20
    for joint in (False, True):
        refine_round(state, images, CONFIG, fsc_curve, joint=joint, n_steps=2)
    for one, other in zip(state.rivals.tables(), before.tables(), strict=True):
        assert torch.equal(one, other)


def test_equivalents_in_a_symmetric_map_are_no_rivals(generator):
    group = symmetry_group("C3").float()
    own = random_rotations(10, generator, torch.float32)
    rivals = Rivals.none(10)
    rivals.share[:] = 0.2
    rivals.rotations[:, 0] = own @ group[1]
    rivals.rotations[:, 1] = exp_map(torch.tensor([[0.0, 0.05, 0.0]])) @ own @ group[2]
    rivals.rotations[:, 2] = exp_map(torch.tensor([[0.0, 0.3, 0.0]])) @ own
    rivals.fold(own, group)
    torch.testing.assert_close(rivals.share, torch.tensor([[0.0, 0.0, 0.2]]).expand(10, 3))


def test_maps_are_better_with_rivals(case, generator):
    """Every third image begins at a wrong pose; noise leaves the search in doubt of many."""
    images, state, truth = case
    right = state.rotations.clone()
    averaged(state, images)
    lost = torch.arange(len(images)) % 3 == 0
    state.rotations = right.clone()
    state.rotations[lost] = random_rotations(int(lost.sum()), generator, torch.float32)
    reassign(state, images, CONFIG, fsc_curve, generator)
    wrong = geodesic_distance_deg(state.rotations, right) > 15
    assert 0.1 < wrong.float().mean() < 0.6
    assert (state.rivals.share.sum(1) > 0.2).float().mean() > 0.2
    soft = sum(averaged(state, images))
    state.rivals = Rivals.none(len(images))
    hard = sum(averaged(state, images))
    gain = (fsc_curve(soft, truth) - fsc_curve(hard, truth))[2:10]
    assert gain.mean() > 0.02


def test_rivals_move_as_own_poses_do(generator):
    rivals = Rivals(*poses(10 * N_RIVALS, generator, 10, N_RIVALS), torch.rand(10, N_RIVALS))
    before = rivals.copied()
    (turn,) = random_rotations(1, generator, torch.float32)
    rivals.move(lambda rotations, offsets: (rotations @ turn, offsets + 1))
    torch.testing.assert_close(rivals.rotations, before.rotations @ turn)
    torch.testing.assert_close(rivals.offsets_px, before.offsets_px + 1)
    assert torch.equal(rivals.share, before.share)


@pytest.mark.parametrize(
    ("of_copies", "angle_deg", "told"),
    [
        (
            1.0,
            180.0,
            "180 degrees away, as copies in a symmetric particle do, or in one that nearly",
        ),
        (0.8, 120.0, "nearly is (--symmetry C3)"),
        (0.8, 100.0, "lie one turn of 100 degrees away"),
        (0.3, 120.0, None),
        (0.0, 120.0, None),
    ],
)
def test_copies_of_a_symmetric_particle_are_told_of(generator, of_copies, angle_deg, told):
    """Half of the images may have a pose one turn of the map away, give or take some degrees."""
    n, said = 2000, []
    own = random_rotations(n, generator, torch.float32)
    turn = exp_map(torch.deg2rad(torch.tensor([0.0, 0.6, 0.8]) * angle_deg))
    either = torch.where((torch.arange(n) % 2 == 0)[:, None, None], turn, turn.mT)
    jitter = exp_map(0.03 * torch.randn(n, 3, generator=generator))
    away = own @ either @ jitter
    scattered = torch.rand(n, generator=generator) >= of_copies
    away[scattered] = random_rotations(int(scattered.sum()), generator, torch.float32)
    blank = [torch.zeros(4, 4, 4)] * 2
    state = Reconstruction(own, torch.zeros(n, 2), torch.arange(n) % 2, blank, 2.0, Support(0.4))
    assert state.rivals.commonest_turn(own) == (0.0, 0.0)
    state.rivals.rotations[:, 1], state.rivals.share[::2, 1] = away, 0.4
    share, angle = state.rivals.commonest_turn(own)
    assert share == pytest.approx(of_copies, abs=0.05)
    report_copies(SimpleNamespace(say=said.append), state)
    if told is None:
        assert said == []
        return
    assert angle == pytest.approx(angle_deg, abs=8)
    assert said[0].startswith(f"{100 * share:.0f} % of the other poses")
    state.rivals.share[300:] = 0.0
    report_copies(SimpleNamespace(say=said.append), state)
    assert len(said) == 1


def test_poses_beside_an_images_own_one_are_no_copies(generator):
    own = random_rotations(500, generator, torch.float32)
    rivals = Rivals.none(500)
    rivals.rotations[:, 0] = own @ exp_map(torch.tensor([0.0, 0.14, 0.0]))
    rivals.share[:, 0] = 0.4
    assert rivals.commonest_turn(own) == (0.0, 0.0)
