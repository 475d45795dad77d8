"""Point groups, and finding them in maps."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import GOLDEN

from cryorecon.maps.align import rotate_map
from cryorecon.maps.symmetry import find_symmetry
from cryorecon.physics.fourier import lowpass
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.rotations import exp_map, geodesic_distance_deg, random_rotations, so3_grid
from cryorecon.physics.symmetry import (
    distance_under_deg,
    distinct_rotations,
    nearest_copies,
    symmetry_group,
)


def relions_group(name):
    text = (GOLDEN / "symmetry.txt").read_text()
    block = re.search(rf"^# {name}\n(.*?)(?=^# |\Z)", text, re.M | re.S)[1]
    rows = re.findall(r"^ +(-?[\d.e-]+) +(-?[\d.e-]+) +(-?[\d.e-]+) *$", block, re.M)
    return torch.tensor([[float(v) for v in row] for row in rows]).double().reshape(-1, 3, 3)


@pytest.mark.parametrize("name", ["C3", "D2", "D7", "T", "O", "I", "I1", "I2", "I3", "I4"])
def test_groups_are_relions(name):
    mine, theirs = symmetry_group(name), relions_group(name)
    assert len(mine) == len(theirs)
    distances = geodesic_distance_deg(mine[:, None], theirs[None])
    assert distances.min(0).values.max() < 0.01


ORDERS = {"c1": 1, "C5": 5, "d3": 6, "T": 12, "O": 24, "i": 60, "i3": 60}


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_groups_are_closed(name, order):
    group = symmetry_group(name)
    assert len(group) == order
    assert torch.equal(group[0], torch.eye(3, dtype=torch.float64))
    products = (group[:, None] @ group[None]).reshape(-1, 1, 3, 3)
    assert geodesic_distance_deg(products, group).min(-1).values.max() < 1e-4


@pytest.mark.parametrize("name", ["", "C0", "X3", "C100", "D0", "T2", "C-1", "HELIX"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="C1, Cn, Dn, T, O, I or I1 to I4"):
        symmetry_group(name)


def symmetric_map(group, box, generator):
    """Gaussian blobs at random places and at all their images under the group."""
    radius = 0.15 + 0.17 * torch.rand(6, 1, generator=generator).double()
    places = torch.nn.functional.normalize(torch.randn(6, 3, generator=generator).double(), dim=-1)
    places = (group[:, None] @ (places * radius * box)[None, :, :, None]).reshape(-1, 3)
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    waves = [torch.exp(-((axis - places[:, i, None]) ** 2) / 4.5) for i in range(3)]
    return torch.einsum("px,py,pz->zyx", *waves).float()


def test_along_a_single_axis_the_mass_is_centred(generator):
    box, group = 40, symmetry_group("C3")
    clean = symmetric_map(group, box, generator)
    moved = rotate_map(clean, random_rotations(1, generator)[0], torch.tensor([0.5, -3.0, 2.5]))
    fit = find_symmetry(moved, group, 10.0)
    back = rotate_map(moved, fit.rotation, fit.shift_px)
    along_z = back.sum((1, 2)).double()
    axis = torch.arange(box, dtype=torch.float64) - box // 2
    assert abs(float((along_z * axis).sum() / along_z.sum())) < 0.3


@pytest.mark.parametrize("name", ["C2", "C5", "D3", "T", "O", "I"])
def test_axes_and_centre_are_found_in_noise(name, generator):
    """Wherever the map was turned and shifted to, it comes back onto its axes."""
    box, group = 40, symmetry_group(name)
    clean = symmetric_map(group, box, generator)
    turn = random_rotations(1, generator)[0]
    moved = rotate_map(clean, turn, torch.tensor([1.2, -0.7, 0.5]))
    noise = lowpass(torch.randn(moved.shape, generator=generator), 12, 3)
    noisy = moved + noise * (0.3 * moved.std() / noise.std())
    fit = find_symmetry(noisy, group, 10.0)
    assert fit.correlation > 0.4
    assert fit.shift_px.norm() < 3
    back = rotate_map(moved, fit.rotation, fit.shift_px)
    ball = soft_ball(box, 0.36 * box, 3, 3)
    for rotation in group[1:4]:
        pair = torch.stack([back * ball, rotate_map(back, rotation) * ball]).flatten(1)
        assert float(torch.corrcoef(pair)[0, 1]) > 0.97


def test_a_map_without_the_symmetry_scores_low(molecule_32):
    assert find_symmetry(molecule_32, symmetry_group("D3"), 10.0).correlation < 0.35


@pytest.mark.parametrize("name", ["C1", "C4", "D3", "T", "O", "I"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_grid_holds_one_of_all_poses_that_are_equal(name, dtype, generator):
    group = symmetry_group(name).to(dtype)
    turned = so3_grid(3, dtype)[0] @ random_rotations(1, generator).to(dtype)[0]
    few = distinct_rotations(turned, group)
    assert len(few) == pytest.approx(len(turned) / len(group), rel=0.2)
    asked = random_rotations(100, generator).to(dtype)
    away = distance_under_deg(few[:, None], asked, group).amin(0)
    whole = geodesic_distance_deg(turned[:, None], asked).amin(0)
    # Rotations are 20 degrees apart: as near as the whole grid's, but for where classes meet.
    assert away.max() < 20
    assert away.median() < whole.median() + 1.5


@pytest.mark.parametrize("name", ["C1", "C5", "D2", "O"])
def test_the_nearest_copy_is_one_and_none_is_nearer(name, generator):
    group = symmetry_group(name)
    poses, to = random_rotations(30, generator), random_rotations(30, generator)
    found = nearest_copies(poses, to, group)
    copies = poses[:, None] @ group
    assert geodesic_distance_deg(copies, found[:, None]).amin(1).max() < 1e-5
    nearest = geodesic_distance_deg(copies, to[:, None]).amin(1)
    torch.testing.assert_close(geodesic_distance_deg(found, to), nearest)
    torch.testing.assert_close(distance_under_deg(poses, to, group), nearest)
    turn = exp_map(torch.tensor([0.1, 0.2, -0.3]).double())
    moved = distance_under_deg(turn @ poses @ group[-1], turn @ to, group)
    torch.testing.assert_close(moved, nearest)
