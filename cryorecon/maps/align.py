"""Aligning one map to another: rotation, translation and hand.

The reference stays. The moving map is mirrored if need be, turned about the centre, then shifted.
How particle poses follow their map is in :mod:`cryorecon.maps.poses`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from scipy.ndimage import affine_transform
from torch import Tensor

from cryorecon.physics.fourier import (
    crop_or_pad_centred,
    fft_centred,
    max_band,
    radius_grid,
    resample_volume,
    shell_sums,
)
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.projection import Transform, padded_transform
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
# Power, relative to the strongest shell, of a shell that counts half.
_WEAK_SHELL = 1e-5
# The reference is turned by this rotation vector while it is compared. Interpolated noise is
# strongest on the grid's own points: maps that nearly fit would be held where their grids fit.
_FRAME_RAD = (0.41, -0.73, 0.58)
# Shells whose FSC is below this are not worth climbing on.
_AGREEMENT = 0.3

# Rotations (b, 3, 3) and shifts (b, 3), the latter as fractions of the box.
_Pose = tuple[Tensor, Tensor]


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


@dataclass(frozen=True)
class _Pair:
    """A moving map to be sampled anywhere, a reference to be met, and a weight by shell."""

    moving: Transform
    reference: Tensor
    whitening: Tensor


@dataclass(frozen=True)
class _Band:
    """Coefficients of the half space kx >= 0 up to a radius, and the reference's values there."""

    moving: Transform
    points: Tensor
    shells: Tensor
    multiplicity: Tensor
    wanted: Tensor


def _prepare(volume: Tensor, box: int) -> tuple[Tensor, Tensor]:
    """On a grid of `box` samples in float32: without background and corners, and whole."""
    size = volume.shape[-1]
    mask = soft_ball(size, 0.44 * size, 0.06 * size, 3, torch.float64, volume.device)
    outside = 1 - mask
    level = (volume.double() * outside).sum() / outside.sum()
    whole = volume.double() - level
    if box < size:
        return resample_volume(whole * mask, box).float(), resample_volume(whole, box).float()
    return (whole * mask).float(), whole.float()


def _shell_power(transform: Tensor) -> Tensor:
    box = transform.shape[-1]
    shells = (radius_grid(box, 3, transform.device) + 0.5).long().flatten()
    power = (transform.abs() ** 2).flatten().double()
    counts = torch.bincount(shells)
    return shell_sums(power, shells, len(counts)) / counts


def _whitening(masked: Tensor, whole: Tensor) -> Tensor:
    """One over the amplitude of each shell, less where a shell holds little of its own.

    Shells far below the strongest hold leakage from it, by interpolation or by the edge of the
    mask, which stands still when the map moves. Power that the mask brought in counts little.
    """
    power, before = _shell_power(fft_centred(masked, 3)), _shell_power(fft_centred(whole, 3))
    own = (before / power.clamp(min=1e-300)).clamp(max=1)
    return own * (power + _WEAK_SHELL * power[1:].max()).clamp(min=1e-300).rsqrt()


def _pair(moving: Tensor, reference: Tensor, box: int) -> _Pair:
    first, second = _prepare(moving, box), _prepare(reference, box)
    whitening = _whitening(*first) * _whitening(*second)
    turned = rotate_map(second[0], exp_map(torch.tensor(_FRAME_RAD, dtype=torch.float64)))
    return _Pair(padded_transform(first[0], 2), fft_centred(turned, 3), whitening)


def _within(pair: _Pair, band: float, dtype: torch.dtype = torch.float32) -> _Band:
    reach, centre = int(band), pair.reference.shape[-1] // 2
    device = pair.reference.device
    axis = torch.arange(-reach, reach + 1, device=device)
    points = torch.cartesian_prod(axis[reach:], axis, axis)
    radius = points.double().norm(dim=-1)
    keep = (radius <= band) & (radius > 0)
    points, shells = points[keep], (radius[keep] + 0.5).long()
    x, y, z = (points + centre).unbind(-1)
    # Each point with kx > 0 stands for its Friedel mate as well.
    multiplicity = torch.where(points[:, 0] > 0, 2.0, 1.0).to(dtype)
    weights = pair.whitening[shells].to(dtype) * multiplicity / multiplicity.sum()
    wanted = pair.reference[z, y, x] * weights
    moving = pair.moving.within(band + 1)
    return _Band(moving, points.to(dtype), shells, multiplicity, wanted)


def _sample(band: _Band, rotations: Tensor) -> Tensor:
    """Trilinear samples, shape (b, p), of the rotated map's transform, ``F(R.T k)``."""
    values, padding = band.moving.values, band.moving.padding
    size = values.shape[-1]
    points = band.points @ rotations.to(band.points.dtype)
    grid = (points * padding + size // 2) * (2 / (size - 1)) - 1
    source = torch.view_as_real(values).permute(3, 0, 1, 2)[None].to(grid.dtype)
    found = torch.nn.functional.grid_sample(
        source, grid.reshape(1, 1, 1, -1, 3), align_corners=True
    )
    return torch.complex(found[0, 0, 0, 0], found[0, 1, 0, 0]).unflatten(0, points.shape[:-1])


def _scores(band: _Band, rotations: Tensor, shifts: Tensor) -> Tensor:
    """Mean FSC over the band's coefficients, shape (b,); shifts (b, 3) as fractions of the box."""
    angle = 2 * torch.pi * (shifts.to(band.points.dtype) @ band.points.T)
    phases = torch.polar(torch.ones_like(angle), angle)
    return (_sample(band, rotations).conj() * band.wanted * phases).real.sum(-1)


def _search(pair: _Pair, band: _Band, keep: int) -> _Pose:
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
        cross[:, z, y, x] = _sample(band, chunk).conj() * wanted
        field = torch.fft.irfftn(cross, s=(n, n, n), dim=(1, 2, 3))
        found.append(torch.stack(field.flatten(1).max(-1), -1))
    best, place = torch.cat(found).unbind(-1)
    order = best.argsort(descending=True)[:keep]
    place = place[order].long()
    steps = torch.stack([place % n, place // n % n, place // n**2], -1)
    return rotations[order], ((steps + n // 2) % n - n // 2).double() / n


def _move(start: _Pose, step: Tensor) -> _Pose:
    """Turn by the first half of `step` (rad, on the left), shift by the second (boxes).

    Turning about the centre carries the shifted content with it, so that both halves are of
    like importance: one quarter of the box is the lever of a rotation.
    """
    rotations, shifts = start
    return exp_map(4 * step[:, :3]) @ rotations, shifts + step[:, 3:]


def _climb(band: _Band, start: _Pose, steps: int, radius: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient ascent (Adam, steps shrinking from `radius`) of many candidates at once."""
    step = torch.zeros(len(start[0]), 6, dtype=torch.float64, device=start[0].device)
    step.requires_grad_()
    optimiser = torch.optim.Adam([step], lr=radius, betas=(0.7, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, radius * 0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        (-_scores(band, *_move(start, step)).sum()).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        rotations, shifts = _move(start, step)
        scores = _scores(band, rotations, shifts)
    order = scores.argsort(descending=True)
    return rotations[order], shifts[order], scores[order]


def _polish(band: _Band, start: _Pose) -> _Pose:
    """Quasi-Newton ascent of one candidate to the top of its hill."""
    step = torch.zeros(1, 6, dtype=torch.float64, device=start[0].device).requires_grad_()
    scale = 0.1 / float(band.points.max())
    optimiser = torch.optim.LBFGS([step], max_iter=25, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -_scores(band, *_move(start, step * scale)).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    rotations, shifts = _move(start, step.detach() * scale)
    return rotations, shifts


def _curve(band: _Band, pose: _Pose) -> Tensor:
    """FSC by shell over the band; shell 0 is 0."""
    angle = 2 * torch.pi * (pose[1].to(band.points.dtype) @ band.points.T)
    phases = torch.polar(torch.ones_like(angle), angle)
    agreement = (_sample(band, pose[0]).conj() * band.wanted * phases).real[0]
    n_shells = int(band.shells.max()) + 1
    counts = shell_sums(band.multiplicity, band.shells, n_shells)
    sums = shell_sums(agreement, band.shells, n_shells) * band.multiplicity.sum()
    return sums / counts.clamp(min=1)


def _weighed(band: _Band, pose: _Pose) -> _Band:
    """The same band with each shell weighed by its signal-to-noise ratio, from the FSC so far."""
    with torch.no_grad():
        curve = _curve(band, pose).clamp(0.0, 1.0)
    weights = curve / (1.2 - curve**2)
    return replace(band, wanted=band.wanted * weights[band.shells])


def _ascend(pair: _Pair, limit: float) -> tuple[_Pose, float]:
    """Search, then refine at rising bands while the maps still agree there."""
    first = _within(pair, min(_SEARCH_BAND, limit))
    pose = _search(pair, first, _STAGES[0][1])
    for reach, keep, steps in _STAGES:
        band = _within(pair, min(reach, limit))
        start = pose[0][:keep], pose[1][:keep]
        *found, _ = _climb(band, start, steps, 0.03 / min(reach, limit))
        pose = found[0], found[1]
    pose = pose[0][:1], pose[1][:1]
    reach = min(_STAGES[-1][0], limit)
    while True:
        band = _within(pair, reach, torch.float64)
        pose = _polish(_weighed(band, pose), pose)
        with torch.no_grad():
            edge = float(_curve(band, pose)[-2:].mean())
        if reach >= limit or edge < _AGREEMENT:
            return pose, reach
        reach = min(1.5 * reach, limit)


def _judged(pair: _Pair, pose: _Pose, reach: float) -> tuple[float, float]:
    """Mean whitened FSC over coefficients, and plain correlation, up to a band."""
    plain_pair = replace(pair, whitening=torch.ones_like(pair.whitening))
    band, plain = (_within(p, reach, torch.float64) for p in (pair, plain_pair))
    with torch.no_grad():
        weight = plain.multiplicity / plain.multiplicity.sum()
        power = (_sample(plain, pose[0])[0].abs() ** 2 * weight).sum()
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
        If the shapes differ or a map is constant.
    """
    box = reference.shape[-1]
    if moving.shape != (box,) * 3 or reference.shape != (box,) * 3:
        raise ValueError(f"shapes {tuple(moving.shape)} and {tuple(reference.shape)} differ")
    if float(moving.std()) == 0 or float(reference.std()) == 0:
        raise ValueError("a constant map cannot be aligned")
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
    return Alignment(rotation, shift, flipped, judged[winner][1], reach)
