"""Aligning one map to another: rotation, translation and hand.

The reference stays. The moving map is mirrored if need be, turned about the centre, then shifted.
How particle poses follow their map is in :mod:`cryorecon.maps.poses`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from scipy.ndimage import affine_transform
from torch import Tensor

from cryorecon.maps.cutting import about_molecules
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
from cryorecon.physics.fourier import (
    crop_or_pad_centred,
    fft_centred,
    max_band,
    radius_grid,
    shell_sums,
)
from cryorecon.physics.projection import padded_transform
from cryorecon.physics.rotations import exp_map, so3_grid

# Coarse search: 9,000 rotations 12 degrees apart, against details of a fifth of the box; a
# rotation off by half a step still correlates there.
_GRID_NSIDE = 5
_SEARCH_BAND = 5.0
_TRANSLATION_GRID = 20
# Rotation steps of 0.02 degrees move the edge of a box by less than one fortieth of its finest
# detail at this band, so finer ones would cost memory and settle nothing.
_FINEST_BAND = 48.0
# (band, candidates kept, steps) of the refinements between search and final climb.
_STAGES = ((5.0, 48, 25), (8.0, 8, 20), (12.0, 2, 20))
# The reference is turned by this rotation vector while it is compared. Interpolated noise is
# strongest on the grid's own points: maps that nearly fit would be held where their grids fit.
_FRAME_RAD = (0.41, -0.73, 0.58)
_SMALLEST_BOX = 8
# Shells whose FSC is below this are not worth climbing on.
_AGREEMENT = 0.3


@dataclass(frozen=True)
class Alignment:
    """How to move a map onto a reference: mirror if `flipped`, rotate, then shift.

    Attributes
    ----------
    rotation : Tensor, shape (3, 3), float64
        R: the moved map is ``V'(r) = V(R.T (r - shift))``, r = (x, y, z) from the centre.
    shift_px : Tensor, shape (3,), float64
        (x, y, z) in pixels; content moves by this much, after the rotation.
    flipped : bool
        Whether the map was mirrored along x first.
    correlation : float
        Between the moved map and the reference, over the coefficients up to `band`.
    band : float
        Radius in cycles per box up to which the maps were compared.
    """

    rotation: Tensor
    shift_px: Tensor
    flipped: bool
    correlation: float
    band: float


def mirror_map(volume: Tensor) -> Tensor:
    """The other hand: mirrored along x about the centre, as ``relion_image_handler`` does.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
    """
    flipped = volume.flip(-1)
    return flipped.roll(1, -1) if volume.shape[-1] % 2 == 0 else flipped


def rotate_map(volume: Tensor, rotation: Tensor, shift_px: Tensor | None = None) -> Tensor:
    """Turn a map about its centre, then shift it: ``V'(r) = V(rotation.T (r - shift))``.

    Cubic spline interpolation of the map on a grid twice as fine: amplitudes stay within 1 % up
    to 0.9 Nyquist, and the correlation with the exactly turned map above 0.998. Coefficients
    beyond Nyquist (the corners of the Fourier cube), which a turned grid cannot hold, are
    removed; what leaves the box is lost.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
    rotation : Tensor, shape (3, 3)
    shift_px : Tensor, shape (3,), optional
        (x, y, z) in pixels.
    """
    box = volume.shape[-1]
    inside = radius_grid(box, 3, volume.device) < box / 2
    transform = crop_or_pad_centred(fft_centred(volume, 3) * inside, 2 * box, 3)
    # Only kx >= 0 is needed of a real map; its Nyquist plane was removed.
    half = torch.fft.ifftshift(transform, (-3, -2))[..., box:]
    half = torch.nn.functional.pad(half, (0, 1))
    fine = torch.fft.fftshift(torch.fft.irfftn(half, s=(2 * box,) * 3)).cpu().numpy() * 8
    # scipy takes output to input indices, both (z, y, x): the axes of rotation.T reversed, and
    # a factor of two for the finer grid.
    turn = rotation.T.double().cpu().flip(0, 1)
    shift = torch.zeros(3) if shift_px is None else shift_px.cpu()
    pivot = torch.full((3,), box // 2, dtype=torch.float64) + shift.double().flip(0)
    offset = box - 2 * (turn @ pivot)
    moved = affine_transform(
        fine,
        (2 * turn).numpy(),
        offset.numpy(),
        (box,) * 3,
        fine.dtype,
        order=3,
        mode="grid-constant",
    )
    return torch.from_numpy(moved).to(volume)


def apply_alignment(volume: Tensor, alignment: Alignment) -> Tensor:
    """The moving map in the reference's place; see :func:`rotate_map` for its resolution.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
    alignment : Alignment
        May come from maps of another box or pixel size once `shift_px` is scaled.
    """
    source = mirror_map(volume) if alignment.flipped else volume
    return rotate_map(source, alignment.rotation, alignment.shift_px)


def _pair(moving: Tensor, reference: Tensor, box: int) -> Pair:
    first, second = prepare(moving, box), prepare(reference, box)
    whitening = whitening_of(*first) * whitening_of(*second)
    turned = rotate_map(second[0], exp_map(torch.tensor(_FRAME_RAD, dtype=torch.float64)))
    return Pair(padded_transform(first[0], 2), fft_centred(turned, 3), whitening)


def _scores(band: Band, rotations: Tensor, shifts: Tensor) -> Tensor:
    """Mean FSC over the band's coefficients, shape (b,); shifts (b, 3) as fractions of the box."""
    angle = 2 * torch.pi * (shifts.to(band.points.dtype) @ band.points.T)
    phases = torch.polar(torch.ones_like(angle), angle)
    return (sample(band, rotations).conj() * band.wanted * phases).real.sum(-1)


def _search(pair: Pair, band: Band, keep: int) -> Pose:
    """Best grid rotations (keep, 3, 3) and their best shifts (keep, 3) over all translations."""
    rotations, _ = so3_grid(_GRID_NSIDE)
    rotations = rotations.to(pair.reference.device)
    n = _TRANSLATION_GRID
    x, y, z = (band.points.long() % n).unbind(-1)
    # irfftn adds the Friedel mates of kx > 0 by itself.
    wanted = band.wanted / band.multiplicity
    found = []
    for chunk in rotations.split(500):
        cross = torch.zeros(len(chunk), n, n, n // 2 + 1, dtype=wanted.dtype, device=wanted.device)
        cross[:, z, y, x] = sample(band, chunk).conj() * wanted
        field = torch.fft.irfftn(cross, s=(n, n, n), dim=(1, 2, 3))
        found.append(torch.stack(field.flatten(1).max(-1), -1))
    best, place = torch.cat(found).unbind(-1)
    order = best.argsort(descending=True)[:keep]
    place = place[order].long()
    steps = torch.stack([place % n, place // n % n, place // n**2], -1)
    return rotations[order], ((steps + n // 2) % n - n // 2).double() / n


def _curve(band: Band, pose: Pose) -> Tensor:
    """FSC by shell over the band; shell 0 is 0."""
    angle = 2 * torch.pi * (pose[1].to(band.points.dtype) @ band.points.T)
    phases = torch.polar(torch.ones_like(angle), angle)
    agreement = (sample(band, pose[0]).conj() * band.wanted * phases).real[0]
    n_shells = int(band.shells.max()) + 1
    counts = shell_sums(band.multiplicity, band.shells, n_shells)
    sums = shell_sums(agreement, band.shells, n_shells) * band.multiplicity.sum()
    return sums / counts.clamp(min=1)


def _weighed(band: Band, pose: Pose) -> Band:
    """The same band with each shell weighed by its signal-to-noise ratio, from the FSC so far."""
    with torch.no_grad():
        curve = _curve(band, pose).clamp(0.0, 1.0)
    weights = curve / (1.2 - curve**2)
    return replace(band, wanted=band.wanted * weights[band.shells])


def _ascend(pair: Pair, limit: float) -> tuple[Pose, float]:
    """Search, then refine at rising bands while the maps still agree there."""
    first = within(pair, min(_SEARCH_BAND, limit))
    pose = _search(pair, first, _STAGES[0][1])
    for reach, keep, steps in _STAGES:
        band = within(pair, min(reach, limit))
        start = pose[0][:keep], pose[1][:keep]
        *found, _ = climb(partial(_scores, band), start, steps, 0.03 / min(reach, limit))
        pose = found[0], found[1]
    pose = pose[0][:1], pose[1][:1]
    reach = min(_STAGES[-1][0], limit)
    while True:
        band = within(pair, reach, torch.float64)
        weighed = _weighed(band, pose)
        pose = polish(partial(_scores, weighed), pose, reach)
        with torch.no_grad():
            edge = float(_curve(band, pose)[-2:].mean())
        if reach >= limit or edge < _AGREEMENT:
            return pose, reach
        reach = min(1.5 * reach, limit)


def _judged(pair: Pair, pose: Pose, reach: float) -> tuple[float, float]:
    """Mean whitened FSC over coefficients, and plain correlation, up to a band."""
    plain_pair = replace(pair, whitening=torch.ones_like(pair.whitening))
    band, plain = (within(p, reach, torch.float64) for p in (pair, plain_pair))
    with torch.no_grad():
        weight = plain.multiplicity / plain.multiplicity.sum()
        power = (sample(plain, pose[0])[0].abs() ** 2 * weight).sum()
        norm = (power * (plain.wanted.abs() ** 2 / weight).sum()).sqrt()
        return float(_scores(band, *pose)), float(_scores(plain, *pose) / norm)


def align_maps(
    moving: Tensor,
    reference: Tensor,
    pixel_size_angst: float,
    *,
    both_hands: bool = True,
    finest_angst: float | None = None,
) -> Alignment:
    """Find the hand, rotation and shift that bring a map onto a reference.

    Molecules that are narrow against their box are cut out of it first, each about its own centre.
    Exhaustive search over 9,000 rotations times all translations at a fifth of the box, then
    gradient refinement of the best at rising resolution, as far as the two maps agree (FSC
    above 0.3). All shells weigh alike by whitening, or the outline would outvote the detail.
    The hand with the higher mean FSC over the larger of the two bands wins; of maps that show
    no more than an outline both hands may fit alike.

    Parameters
    ----------
    moving, reference : Tensor, shape (N, N, N), real
        Same box and pixel size. Density beyond the sphere of diameter N is not used.
    pixel_size_angst : float
    both_hands : bool
        Whether to try the mirrored map too.
    finest_angst : float, optional
        No detail finer than this decides; default: Nyquist, or 1/48 of the box.

    Raises
    ------
    ValueError
        If the shapes differ, a map is constant or has less than 8 px a side.
    """
    whole = reference.shape[-1]
    if moving.shape != (whole,) * 3 or reference.shape != (whole,) * 3:
        raise ValueError(f"shapes {tuple(moving.shape)} and {tuple(reference.shape)} differ")
    if float(moving.std()) == 0 or float(reference.std()) == 0:
        raise ValueError("a constant map cannot be aligned")
    if whole < _SMALLEST_BOX:
        raise ValueError(f"maps of less than {_SMALLEST_BOX} px cannot be aligned")
    (moving, reference), centres = about_molecules(moving, reference)
    box = reference.shape[-1]
    limit = min(float(max_band(box)) - 1, _FINEST_BAND)
    if finest_angst is not None:
        limit = max(min(limit, box * pixel_size_angst / finest_angst), 2.0)
    size = min(box, 2 * (int(limit) + 2))
    found = []
    for flipped in (False, True) if both_hands else (False,):
        pair = _pair(mirror_map(moving) if flipped else moving, reference, size)
        found.append((pair, *_ascend(pair, limit), flipped))
    reach = max(entry[2] for entry in found)
    judged = [_judged(pair, pose, reach) for pair, pose, _, _ in found]
    winner = max(range(len(found)), key=lambda i: judged[i][0])
    _, pose, _, flipped = found[winner]
    back = exp_map(torch.tensor(_FRAME_RAD, dtype=torch.float64)).T.to(pose[0].device)
    rotation, shift = back @ pose[0][0], back @ pose[1][0] * box
    start, end = (centre.to(shift) for centre in centres)
    if flipped:
        start = start * start.new_tensor([-1.0, 1.0, 1.0])
    shift = shift + end - rotation @ start
    return Alignment(rotation, shift, flipped, judged[winner][1], reach * whole / box)
