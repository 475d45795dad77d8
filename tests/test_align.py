"""Aligning maps, against maps whose rotation, shift and hand are known analytically."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import affine_transform
from torch import Tensor

from cryorecon.maps.align import (
    Alignment,
    align_maps,
    apply_alignment,
    mirror_map,
    rotate_map,
)
from cryorecon.maps.fsc import fsc_curve
from cryorecon.maps.poses import mirror_poses, rotate_poses, shift_origins
from cryorecon.physics.imaging import render
from cryorecon.physics.rotations import geodesic_distance_deg, random_rotations


class Blobs:
    """Gaussian blobs at random places: a map that can be moved without interpolation."""

    def __init__(
        self, box: int, seed: int, n: int = 150, width: float = 0.025, reach: float = 0.3
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        directions /= directions.norm(dim=1, keepdim=True)
        radii = torch.rand(n, 1, generator=generator, dtype=torch.float64) ** (1 / 3)
        self.centres = reach * box * radii * directions * torch.tensor([1.0, 0.8, 0.6])
        self.weights = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
        self.box, self.width = box, width * box

    def sample(self, centres: Tensor) -> Tensor:
        axis = torch.arange(self.box).double() - self.box // 2
        x, y, z = (
            torch.exp(-((axis - centres[:, i, None]) ** 2) / (2 * self.width**2)) for i in range(3)
        )
        return torch.einsum("n,nz,ny,nx->zyx", self.weights, z, y, x)

    def map(self) -> Tensor:
        return self.sample(self.centres)

    def moved(self, rotation: Tensor, shift: Tensor, flipped: bool = False) -> Tensor:
        centres = self.centres * torch.tensor([-1.0, 1, 1]) if flipped else self.centres
        return self.sample(centres @ rotation.T + shift)


def movement(seed: int, box: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rotation = random_rotations(1, generator)[0]
    return rotation, (torch.rand(3, generator=generator, dtype=torch.float64) - 0.5) * 0.1 * box


def project(volume: Tensor, rotation: Tensor) -> Tensor:
    """Sum over z of V(A.T r) in real space: independent of the package's Fourier slices."""
    matrix = rotation.T.flip(0, 1).numpy()
    centre = torch.full((3,), len(volume) // 2, dtype=torch.float64).numpy()
    turned = affine_transform(volume.numpy(), matrix, centre - matrix @ centre, order=5)
    return torch.from_numpy(turned.sum(0))


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])


@pytest.mark.parametrize("box", [32, 33])
def test_mirror_is_along_x_about_the_centre_voxel(box: int) -> None:
    blobs = Blobs(box, 0)
    identity, still = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(mirror_map(blobs.map()), blobs.moved(identity, still, True))
    assert torch.equal(mirror_map(mirror_map(blobs.map())), blobs.map())


@pytest.mark.parametrize("box", [40, 41])
def test_rotating_a_map_keeps_all_frequencies(box: int) -> None:
    blobs = Blobs(box, 1, width=0.03)
    rotation, shift = movement(1, box)
    expected = blobs.moved(rotation, shift)
    found = rotate_map(blobs.map(), rotation, shift)
    assert fsc_curve(found, expected)[: int(0.9 * box / 2)].min() > 0.999
    scale = float((found * expected).sum() / (expected**2).sum())
    assert scale == pytest.approx(1, abs=1e-3)
    wrong = blobs.moved(rotation.T, shift)
    assert correlation(found, wrong) < 0.9


@pytest.mark.parametrize(("box", "flipped"), [(48, False), (33, True), (64, True)])
def test_known_movement_is_found(box: int, flipped: bool) -> None:
    blobs = Blobs(box, box)
    rotation, shift = movement(box + 1, box)
    reference = blobs.moved(rotation, shift, flipped)
    found = align_maps(blobs.map().float(), reference.float(), 1.3)
    assert found.flipped == flipped
    assert geodesic_distance_deg(found.rotation, rotation) < 0.3
    assert (found.shift_px - shift).norm() < 0.1
    assert found.correlation > 0.99
    curve = fsc_curve(apply_alignment(blobs.map(), found), reference)
    assert curve[: int(0.7 * box / 2) + 1].min() > 0.98


@pytest.mark.parametrize(("box", "flipped"), [(48, True), (49, False)])
@pytest.mark.parametrize("away", [(0.0, 0.0, 0.0), (0.2, -0.2, 0.1), (-0.35, 0.3, 0.0)])
def test_a_narrow_molecule_far_off_centre_is_found(box: int, flipped: bool, away: tuple) -> None:
    """A tenth of the box in radius, in its corner."""
    blobs = Blobs(box, 3, reach=0.1, width=0.025)
    rotation, _ = movement(7, box)
    here = box * torch.tensor(away, dtype=torch.float64)
    reference = blobs.moved(rotation, -here.roll(1), flipped)
    moving = blobs.moved(torch.eye(3, dtype=torch.float64), here)
    found = align_maps(moving.float(), reference.float(), 4.0)
    assert found.flipped == flipped
    # Of a molecule of ten voxels a degree and a half moves the edge by an eighth of one.
    assert geodesic_distance_deg(found.rotation, rotation) < 1.5
    start = here * torch.tensor([-1.0 if flipped else 1.0, 1, 1])
    assert (found.shift_px + found.rotation @ start + here.roll(1)).norm() < 0.1
    curve = fsc_curve(apply_alignment(moving, found), reference)
    assert curve[: int(0.7 * box / 2)].min() > 0.98


def test_noise_and_background_do_not_mislead() -> None:
    box = 48
    blobs = Blobs(box, 5)
    rotation, shift = movement(6, box)
    clean = blobs.moved(rotation, shift, True)
    generator = torch.Generator().manual_seed(7)

    def noisy(volume: Tensor) -> Tensor:
        noise = torch.randn(volume.shape, generator=generator, dtype=volume.dtype)
        return 3.0 * volume + volume.std() * 6.0 * noise + 40.0

    found = align_maps(noisy(blobs.map()), noisy(clean), 1.0)
    assert found.flipped
    assert geodesic_distance_deg(found.rotation, rotation) < 1.5
    assert (found.shift_px - shift).norm() < 0.3


def test_one_hand_and_a_resolution_limit_are_honoured() -> None:
    box = 32
    blobs = Blobs(box, 8)
    rotation, shift = movement(9, box)
    reference = blobs.moved(rotation, shift, True)
    found = align_maps(blobs.map(), reference, 2.0, both_hands=False, finest_angst=8.0)
    assert not found.flipped
    assert found.band == pytest.approx(8.0)
    assert found.correlation < 0.95


def test_constant_and_differing_maps_are_refused() -> None:
    volume = Blobs(16, 0).map()
    with pytest.raises(ValueError, match="constant"):
        align_maps(torch.ones(16, 16, 16), volume, 1.0)
    with pytest.raises(ValueError, match="differ"):
        align_maps(Blobs(17, 0).map(), volume, 1.0)
    with pytest.raises(ValueError, match="less than 8 px"):
        align_maps(torch.rand(4, 4, 4), torch.rand(4, 4, 4), 1.0)


@pytest.mark.parametrize("box", [32, 33])
def test_turned_and_mirrored_poses_see_the_same_images(box: int) -> None:
    blobs = Blobs(box, 2, width=0.04)
    turn, shift = movement(3, box)[0], torch.tensor([2.0, -1.5, 1.0], dtype=torch.float64)
    still = torch.zeros(3, dtype=torch.float64)
    poses = random_rotations(3, torch.Generator().manual_seed(4))
    images = [project(blobs.map(), pose) for pose in poses]

    turned = blobs.moved(turn, still)
    mirrored = mirror_map(blobs.map())
    for image, pose in zip(images, poses, strict=True):
        assert correlation(project(turned, rotate_poses(pose, turn)), image) > 0.999
        assert correlation(project(turned, rotate_poses(pose, turn.T)), image) < 0.95
        assert correlation(project(mirrored, mirror_poses(pose)), image) > 0.999
        assert correlation(project(mirrored, pose), image) < 0.98
    assert torch.allclose(torch.linalg.det(mirror_poses(poses)), torch.ones(3).double())
    torch.testing.assert_close(mirror_poses(mirror_poses(poses)), poses)

    # The image model agrees, origins and the shift of the map included.
    origins = torch.tensor([[1.5, -0.5], [0.0, 2.0], [-1.0, -1.0]], dtype=torch.float64)
    before = render(blobs.map(), poses, origins, padding=4)
    new = rotate_poses(mirror_poses(poses), turn)
    moved = blobs.moved(turn, shift, flipped=True)
    after = render(moved, new, shift_origins(origins, new, shift), padding=4)
    assert correlation(before, after) > 0.999
    wrong = render(moved, new, shift_origins(origins, new, -shift), padding=4)
    assert correlation(before, wrong) < 0.95


def test_an_alignment_takes_poses_along() -> None:
    box = 32
    blobs = Blobs(box, 2, width=0.04)
    rotation, shift = movement(3, box)
    alignment = Alignment(rotation, shift, True, 1.0, 10.0)
    poses = random_rotations(2, torch.Generator().manual_seed(4))
    new = rotate_poses(mirror_poses(poses), alignment.rotation)
    origins = shift_origins(torch.zeros(2, 2, dtype=torch.float64), new, alignment.shift_px)
    moved = apply_alignment(blobs.map(), alignment)
    assert correlation(moved, blobs.moved(rotation, shift, True)) > 0.9999
    before, after = render(blobs.map(), poses), render(moved, new, origins)
    assert correlation(before, after) > 0.999
