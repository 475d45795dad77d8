"""Pose errors after global alignment: frame, hand and map shift taken out, outliers survived."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from cryorecon.maps.poses import (
    compare_pose_sets,
    mirror_poses,
    rotate_poses,
    shift_origins,
)
from cryorecon.physics.rotations import exp_map, geodesic_distance_deg, random_rotations
from cryorecon.physics.symmetry import distance_under_deg, symmetry_group
from cryorecon.run.compare_poses import turned_text


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disturbed(poses: Tensor, spread_deg: float, generator: torch.Generator) -> Tensor:
    vectors = torch.randn(len(poses), 3, generator=generator, dtype=torch.float64)
    return exp_map(vectors * math.radians(spread_deg)) @ poses


@pytest.mark.parametrize("flipped", [False, True])
def test_equal_poses_in_another_frame_have_no_error(flipped: bool) -> None:
    generator = generator_of(0)
    b = random_rotations(300, generator)
    turn = random_rotations(1, generator)[0]
    a = rotate_poses(mirror_poses(b) if flipped else b, turn)
    found = compare_pose_sets(a, b)
    assert found.flipped == flipped
    assert geodesic_distance_deg(found.rotation, turn) < 1e-5
    assert found.angles_deg.max() < 1e-5
    assert found.fraction_within(1.0) == 1
    assert found.shift_angst is None
    assert found.median_offset_angst is None


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("spread_deg", [0.3, 3.0])
def test_half_the_images_may_be_wrong(flipped: bool, spread_deg: float) -> None:
    generator = generator_of(1)
    n = 2000
    b = random_rotations(n, generator)
    turn = random_rotations(1, generator)[0]
    a = disturbed(rotate_poses(mirror_poses(b) if flipped else b, turn), spread_deg, generator)
    a[: n // 2] = random_rotations(n // 2, generator)
    found = compare_pose_sets(a, b)
    assert found.flipped == flipped
    assert geodesic_distance_deg(found.rotation, turn) < 0.3 * spread_deg
    good = found.angles_deg[n // 2 :]
    expected = geodesic_distance_deg(
        rotate_poses(mirror_poses(b) if flipped else b, turn), a
    )[n // 2 :]  # fmt: skip
    assert good.median() == pytest.approx(float(expected.median()), rel=0.03)
    assert found.fraction_within(30) == pytest.approx(0.5, abs=0.02)


def test_clustered_outliers_do_not_win() -> None:
    generator = generator_of(2)
    b = random_rotations(1000, generator)
    turns = random_rotations(2, generator)
    a = disturbed(rotate_poses(b, turns[0]), 2.0, generator)
    a[:400] = rotate_poses(b[:400], turns[1])
    found = compare_pose_sets(a, b)
    assert geodesic_distance_deg(found.rotation, turns[0]) < 0.5


def test_wide_errors_still_find_the_frame() -> None:
    generator = generator_of(3)
    b = random_rotations(3000, generator)
    turn = random_rotations(1, generator)[0]
    found = compare_pose_sets(disturbed(rotate_poses(b, turn), 15.0, generator), b)
    assert geodesic_distance_deg(found.rotation, turn) < 2.0
    # The length of a Gaussian vector of 15 degrees a component has median 1.538 * 15.
    assert found.median_deg == pytest.approx(23.1, abs=1.0)


def test_random_poses_show_the_errors_of_chance() -> None:
    generator = generator_of(4)
    found = compare_pose_sets(random_rotations(4000, generator), random_rotations(4000, generator))
    # Haar-distributed angles: mean pi/2 + 2/pi = 126.5 degrees, median 132.3.
    assert found.mean_deg == pytest.approx(126.5, abs=2.5)
    assert found.median_deg == pytest.approx(132.3, abs=3)
    assert found.fraction_within(10) < 0.01


@pytest.mark.parametrize("flipped", [False, True])
def test_shift_of_the_map_is_taken_out_of_the_origins(flipped: bool) -> None:
    generator = generator_of(5)
    n = 1500
    b = random_rotations(n, generator)
    turn = random_rotations(1, generator)[0]
    shift = torch.tensor([12.0, -7.0, 3.0], dtype=torch.float64)
    origins_b = 5 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    a = rotate_poses(mirror_poses(b) if flipped else b, turn)
    origins_a = shift_origins(origins_b, a, shift)
    origins_a += 0.5 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    wrong = n // 2
    a[:wrong] = random_rotations(wrong, generator)
    origins_a[:wrong] += 30 * torch.randn(wrong, 2, generator=generator, dtype=torch.float64)
    found = compare_pose_sets(a, b, origins_a, origins_b)
    assert found.shift_angst is not None
    assert found.offsets_angst is not None
    assert (found.shift_angst - shift).norm() < 0.15
    # Median length of a plane Gaussian of 0.5 angstrom a component: 0.5 sqrt(2 ln 2).
    left = found.offsets_angst[wrong:].norm(dim=-1)
    assert left.median() == pytest.approx(0.589, abs=0.05)


def test_one_viewing_direction_leaves_the_depth_of_the_shift_at_zero() -> None:
    a = torch.eye(3, dtype=torch.float64).repeat(20, 1, 1)
    origins = torch.tensor([[2.0, -1.0]], dtype=torch.float64).repeat(20, 1)
    found = compare_pose_sets(a, a, origins, torch.zeros_like(origins))
    assert found.shift_angst is not None
    torch.testing.assert_close(found.shift_angst, torch.tensor([2.0, -1.0, 0.0]).double())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_images_are_enough(n: int) -> None:
    poses = random_rotations(n, generator_of(n))
    found = compare_pose_sets(poses.float(), poses.float())
    assert found.angles_deg.max() < 0.1
    assert found.angles_deg.dtype == torch.float64


def test_wrong_input_is_refused() -> None:
    poses = random_rotations(4, generator_of(0))
    with pytest.raises(ValueError, match="4 and 3 poses"):
        compare_pose_sets(poses, poses[:3])
    with pytest.raises(ValueError, match="0 and 0 poses"):
        compare_pose_sets(poses[:0], poses[:0])
    with pytest.raises(ValueError, match="both sets"):
        compare_pose_sets(poses, poses, torch.zeros(4, 2))


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("name", ["C3", "D2", "O"])
def test_copies_in_a_symmetric_particle_are_one_pose(name: str, flipped: bool) -> None:
    generator, group, n = generator_of(5), symmetry_group(name), 600
    b, turn = random_rotations(n, generator), random_rotations(1, generator)[0]
    copy = group[torch.randint(len(group), (n,), generator=generator)]
    there = rotate_poses(mirror_poses(b) if flipped else b, turn)
    a = disturbed(there, 1.0, generator) @ copy
    a[: n // 4] = random_rotations(n // 4, generator)
    shift = torch.tensor([2.0, 0.0, -1.0]).double()
    origins = torch.zeros(n, 2).double()
    moved = shift_origins(origins, there, shift)
    found = compare_pose_sets(a, b, moved, origins, group)
    assert found.flipped == flipped
    assert found.angles_deg[n // 4 :].max() < 6
    assert found.offsets_angst[n // 4 :].norm(dim=-1).median() < 0.1
    assert distance_under_deg(turn.mT, found.rotation.mT, group) < 0.5
    assert turned_text(found) is None
    alone = compare_pose_sets(a, b, moved, origins)
    assert alone.angles_deg.median() > 60
    told = turned_text(alone)
    if name == "C3":
        assert re.match(r"(4|5)\d % of the poses differ by one turn of 120 degrees", told)
        assert "such as C3" in told
