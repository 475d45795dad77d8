"""Where a map's symmetry axes lie, and how well it has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.maps.sampling import (
    Band,
    Pair,
    Pose,
    climb,
    polish,
    prepare,
    sample,
    whitening_of,
    within,
)
from cryorecon.physics.fourier import fft_centred, max_band
from cryorecon.physics.masks import centre_of_mass
from cryorecon.physics.projection import padded_transform
from cryorecon.physics.rotations import so3_grid

# The coarse search is that of map alignment: 12 degrees against details of a fifth of the box.
_GRID_NSIDE = 5
# (band in cycles per box, candidates kept, steps)
_STAGES = ((5.0, 24, 25), (8.0, 6, 20), (12.0, 2, 20))
_FINEST_BAND = 24.0
# Elements a sum of samples may have at once.
_CHUNK = 20_000_000


@dataclass(frozen=True)
class SymmetryFit:
    """How to move a map so that its axes lie where its point group has them.

    Attributes
    ----------
    rotation : Tensor, shape (3, 3), float64
        R: the moved map is ``V'(r) = V(R.T (r - shift))``, as in :mod:`cryorecon.maps.align`.
    shift_px : Tensor, shape (3,), float64
        (x, y, z) in pixels, after the rotation.
    correlation : float
        Mean over the coefficients up to `band`, all shells alike, of the correlation between the
        moved map and its turned copies: 1 for a symmetric map, about 0 for one that is not.
    band : float
        Cycles per box.
    """

    rotation: Tensor
    shift_px: Tensor
    correlation: float
    band: float


def find_symmetry(volume: Tensor, group: Tensor, band: float) -> SymmetryFit:
    """Find the orientation and centre in which a map is most like its turned copies.

    A grid of orientations, one of each class that the group makes equal, about the molecule's
    centre of mass; then gradient ascent of orientation and centre at rising resolution.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
        White on black.
    group : Tensor, shape (g, 3, 3), float64
        Rotations of :func:`cryorecon.physics.symmetry.symmetry_group`, more than one.
    band : float
        Cycles per box up to which the map holds signal.
    """
    box = volume.shape[-1]
    limit = max(3.0, min(band, max_band(box) - 2, _FINEST_BAND))
    masked, whole = prepare(volume, min(box, 2 * (int(limit) + 2)))
    whitening = whitening_of(masked, whole).square()
    pair = Pair(padded_transform(masked, 2), fft_centred(masked, 3), whitening)
    centre = centre_of_mass(volume, limit) / box
    rotations = _distinct_orientations(group).to(centre.device)
    pose = rotations, -(rotations @ centre)
    pose = _best(_copies(pair, group, min(_STAGES[0][0], limit)), pose, _STAGES[0][1])
    for reach, keep, steps in _STAGES:
        copies = _copies(pair, group, min(reach, limit))
        start = pose[0][:keep], pose[1][:keep]
        *found, _ = climb(copies, start, steps, 0.03 / min(reach, limit))
        pose = found[0], found[1]
    copies = _copies(pair, group, limit, torch.float64)
    pose = polish(copies, (pose[0][:1], pose[1][:1]), limit)
    with torch.no_grad():
        correlation = float(copies(*pose)[0])
    rotation, shift = pose[0][0], pose[1][0] * box
    if _has_one_axis(group):
        # Nothing says where along its axis a map should lie: centre its mass.
        shift[2] = -(rotation @ centre)[2] * box
    return SymmetryFit(rotation, shift, correlation, limit)


def _has_one_axis(group: Tensor) -> bool:
    return bool((group[:, 2, 2] > 1 - 1e-9).all())


def _distinct_orientations(group: Tensor) -> Tensor:
    """Grid of rotations without those that the group makes equal to another one's neighbour."""
    rotations, n_inplane = so3_grid(_GRID_NSIDE)
    if _has_one_axis(group):
        # Turning about it changes nothing.
        return rotations[::n_inplane]
    # Nearest to the identity among its equals: the largest trace.
    traces = torch.einsum("gij,nji->ng", group, rotations)
    return rotations[traces[:, 0] >= traces.max(-1).values - 1e-9]


@dataclass(frozen=True)
class _Copies:
    """A map's coefficients in a band, seen from all of a group's rotations.

    Called with rotations (b, 3, 3) and shifts (b, 3), in boxes, it gives the mean correlation of
    the moved map's turned copies with each other, shape (b,).
    """

    band: Band
    weight: Tensor
    group: Tensor

    def __call__(self, rotations: Tensor, shifts: Tensor) -> Tensor:
        b, g, points = len(rotations), len(self.group), self.band.points
        group = self.group.to(rotations)
        turned = (group @ rotations[:, None]).reshape(b * g, 3, 3)
        moved = (shifts[:, None, None] @ group.transpose(-1, -2)).reshape(b * g, 3)
        angle = -2 * torch.pi * (moved.to(points.dtype) @ points.T)
        values = sample(self.band, turned) * torch.polar(torch.ones_like(angle), angle)
        values = values.unflatten(0, (b, g))
        power = (values.abs() ** 2).mean(1) @ self.weight
        common = (values.mean(1).abs() ** 2) @ self.weight
        return (common / power - 1 / g) / (1 - 1 / g)


def _copies(pair: Pair, group: Tensor, reach: float, dtype: torch.dtype = torch.float32) -> _Copies:
    band = within(pair, reach, dtype)
    weight = pair.whitening[band.shells].to(dtype) * band.multiplicity
    return _Copies(band, weight, group)


def _best(copies: _Copies, pose: Pose, keep: int) -> Pose:
    n = max(1, _CHUNK // (len(copies.group) * len(copies.band.points)))
    with torch.no_grad():
        scores = torch.cat(
            [copies(r, s) for r, s in zip(pose[0].split(n), pose[1].split(n), strict=True)]
        )
    order = scores.argsort(descending=True)[:keep]
    return pose[0][order], pose[1][order]
