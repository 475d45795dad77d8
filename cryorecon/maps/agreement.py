"""How far maps and poses of several reconstructions of the same images agree.

Methods that are given the same images see the same noise: it makes their maps agree even where
there is no signal. Half set 1 of one method against half set 2 of the other has none in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from cryorecon.maps.align import Alignment, align_maps, apply_alignment
from cryorecon.maps.chance import beyond_chance
from cryorecon.maps.fsc import fsc_curve
from cryorecon.maps.poses import mirror_poses, rotate_poses, shift_origins
from cryorecon.physics.fourier import fft_centred, ifft_centred, radius_grid


@dataclass(frozen=True)
class Volumes:
    """What a reconstruction says of the density.

    Attributes
    ----------
    joint : Tensor, shape (N, N, N)
        The map of all images.
    halves : tuple of two Tensor, shape (N, N, N), or None
        Maps of the half sets, in the frame of the joint map.
    """

    joint: Tensor
    halves: tuple[Tensor, Tensor] | None = None

    def moved(self, alignment: Alignment) -> Volumes:
        """All maps turned, shifted and perhaps mirrored alike."""
        halves = self.halves and (
            apply_alignment(self.halves[0], alignment),
            apply_alignment(self.halves[1], alignment),
        )
        return Volumes(apply_alignment(self.joint, alignment), halves)


@dataclass(frozen=True)
class MapAgreement:
    """Two reconstructions after one was moved onto the other.

    Attributes
    ----------
    alignment : Alignment
        Of the moving joint map on the reference's.
    moved : Volumes
    curve : Tensor, shape (N // 2 + 1,), float64
        FSC with what chance explains taken out: half sets crossed, or joint maps.
    crossed : bool
        Whether `curve` compares half set 1 of one with half set 2 of the other.
    joint : Tensor, shape (N // 2 + 1,), float64
        FSC of the joint maps, chance taken out; holds the noise that both share.
    """

    alignment: Alignment
    moved: Volumes
    curve: Tensor
    crossed: bool
    joint: Tensor

    @property
    def threshold(self) -> float:
        """0.143 for half sets, as between half maps; 0.5 for joint maps, which share noise."""
        return 0.143 if self.crossed else 0.5


def map_agreement(
    moving: Volumes,
    reference: Volumes,
    mask: Tensor,
    pixel_size_angst: float,
    chance: Tensor,
    *,
    crossed: bool,
    last_shell: int | None = None,
) -> MapAgreement:
    """Move one reconstruction onto another, both hands tried, and measure how far they agree.

    Parameters
    ----------
    moving, reference : Volumes
        Unmasked, on the same grid.
    mask : Tensor, shape (N, N, N)
        Worn by both when they are compared.
    pixel_size_angst : float
    chance : Tensor, shape (N // 2 + 1,)
        FSC that aligned noise would reach (:func:`cryorecon.maps.chance.chance_fsc`).
    crossed : bool
        Compare half set 1 of each with half set 2 of the other, and take the mean of the two;
        both must have half maps of the same half sets.
    last_shell : int, optional
        How far both hold something: a mask, and turning a map, put what they have into shells
        beyond, where it correlates.
    """
    found = align_maps(moving.joint * mask, reference.joint * mask, pixel_size_angst)
    moved = moving.moved(found)
    joint = beyond_chance(fsc_curve(moved.joint * mask, reference.joint * mask), chance)
    end = reference.joint.shape[-1] if last_shell is None else last_shell + 1
    joint[end:] = 0
    if not crossed:
        return MapAgreement(found, moved, joint, False, joint)
    if moved.halves is None or reference.halves is None:
        raise ValueError("half sets are crossed, but one reconstruction has none")
    (first, second), (one, two) = moved.halves, reference.halves
    curves = (fsc_curve(first, two, mask), fsc_curve(second, one, mask))
    curve = beyond_chance((curves[0] + curves[1]) / 2, chance)
    curve[end:] = 0
    return MapAgreement(found, moved, curve, True, joint)


def moved_poses(
    rotations: Tensor, origins: Tensor, alignment: Alignment, pixel_size: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Poses of the same images for the map that an alignment moved.

    Parameters
    ----------
    rotations : Tensor, shape (n, 3, 3)
    origins : Tensor, shape (n, 2)
    alignment : Alignment
    pixel_size : float
        A pixel in the unit of the origins.
    """
    poses = mirror_poses(rotations) if alignment.flipped else rotations
    poses = rotate_poses(poses, alignment.rotation)
    return poses, shift_origins(origins, poses, alignment.shift_px * pixel_size)


def mean_rotations(sets: Sequence[Tensor]) -> Tensor:
    """Chordal mean of several poses of each image, shape (n, 3, 3).

    The rotation matrix nearest to the mean of the matrices (Moakher 2002).

    Parameters
    ----------
    sets : sequence of Tensor, shape (n, 3, 3)
    """
    import roma  # loads torch._dynamo, which takes a second: only when needed

    return roma.special_procrustes(torch.stack(list(sets)).mean(0))


def largest_cluster(agreement: Tensor) -> list[int]:
    """The largest set of items that all agree with each other; of equals the likeliest.

    Parameters
    ----------
    agreement : Tensor, shape (n, n), symmetric
        How well two items agree; 0 where they do not. n at most 16.

    Returns
    -------
    list of int
        Ascending; a single item if no two agree, none if n is 0.
    """
    n = len(agreement)
    for size in range(n, 0, -1):
        groups = [
            (float(sum(agreement[i, j] for i, j in combinations(members, 2))), members)
            for members in combinations(range(n), size)
            if all(agreement[i, j] > 0 for i, j in combinations(members, 2))
        ]
        if groups:
            return list(max(groups, key=lambda group: group[0])[1])
    return []


def mean_map(volumes: Sequence[Tensor]) -> Tensor:
    """Mean of aligned maps, each brought to the first one's scale by least squares.

    Parameters
    ----------
    volumes : sequence of Tensor, shape (N, N, N)
    """
    first = volumes[0]
    scales = [(first * v).sum() / (v * v).sum().clamp(min=1e-30) for v in volumes]
    total = torch.stack([v * scale for v, scale in zip(volumes, scales, strict=True)])
    return total.mean(0)


def shell_filtered(volume: Tensor, gain: Tensor) -> Tensor:
    """A map with each Fourier shell multiplied by its gain; 0 beyond the last.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
    gain : Tensor, shape (N // 2 + 1,)
    """
    shells = (radius_grid(len(volume), 3, volume.device) + 0.5).long()
    full = torch.cat([gain, gain.new_zeros(int(shells.max()) + 1)]).to(volume)
    return ifft_centred(fft_centred(volume, 3) * full[shells], 3).real
