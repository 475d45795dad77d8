"""A map's transform compared with a reference's at any rotation: sampling, bands, whitening."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.physics.fourier import fft_centred, radius_grid, shell_sums
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.projection import Transform
from cryorecon.physics.resampling import resample_volume
from cryorecon.physics.rotations import exp_map

# Power, relative to the strongest shell, of a shell that counts half.
_WEAK_SHELL = 1e-5

# Rotations (b, 3, 3) and shifts (b, 3), the latter as fractions of the box.
Pose = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pair:
    """A moving map to be sampled anywhere, a reference to be met, and a weight by shell."""

    moving: Transform
    reference: Tensor
    whitening: Tensor


@dataclass(frozen=True)
class Band:
    """Coefficients of the half space kx >= 0 up to a radius, and the reference's values there."""

    moving: Transform
    points: Tensor
    shells: Tensor
    multiplicity: Tensor
    wanted: Tensor


def prepare(volume: Tensor, box: int) -> tuple[Tensor, Tensor]:
    """On a grid of `box` samples in float32: without background and corners, and whole."""
    size = volume.shape[-1]
    mask = soft_ball(size, 0.44 * size, 0.06 * size, 3, torch.float64, volume.device)
    outside = 1 - mask
    level = (volume.double() * outside).sum() / outside.sum()
    whole = volume.double() - level
    if box < size:
        return resample_volume(whole * mask, box).float(), resample_volume(whole, box).float()
    return (whole * mask).float(), whole.float()


def shell_power(transform: Tensor) -> Tensor:
    """Mean power of a centred transform by shell, shape (n_shells,), float64."""
    box = transform.shape[-1]
    shells = (radius_grid(box, 3, transform.device) + 0.5).long().flatten()
    power = (transform.abs() ** 2).flatten().double()
    counts = torch.bincount(shells)
    return shell_sums(power, shells, len(counts)) / counts


def whitening_of(masked: Tensor, whole: Tensor) -> Tensor:
    """One over the amplitude of each shell, less where a shell holds little of its own.

    Shells far below the strongest hold leakage from it, by interpolation or by the edge of the
    mask, which stands still when the map moves. Power that the mask brought in counts little.
    """
    power, before = shell_power(fft_centred(masked, 3)), shell_power(fft_centred(whole, 3))
    own = (before / power.clamp(min=1e-300)).clamp(max=1)
    return own * (power + _WEAK_SHELL * power[1:].max()).clamp(min=1e-300).rsqrt()


def within(pair: Pair, band: float, dtype: torch.dtype = torch.float32) -> Band:
    """A pair's coefficients up to a radius in cycles per box, without the origin."""
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
    return Band(moving, points.to(dtype), shells, multiplicity, wanted)


def sample(band: Band, rotations: Tensor) -> Tensor:
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


Score = Callable[[Tensor, Tensor], Tensor]


def _move(start: Pose, step: Tensor) -> Pose:
    """Turn by the first half of `step` (rad, on the left), shift by the second (boxes).

    Turning about the centre carries the shifted content with it, so that both halves are of
    like importance: one quarter of the box is the lever of a rotation.
    """
    rotations, shifts = start
    return exp_map(4 * step[:, :3]) @ rotations, shifts + step[:, 3:]


def climb(scores: Score, start: Pose, steps: int, radius: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient ascent (Adam, steps shrinking from `radius`) of many candidates at once.

    Returns rotations, shifts and scores, best first.
    """
    step = torch.zeros(len(start[0]), 6, dtype=torch.float64, device=start[0].device)
    step.requires_grad_()
    optimiser = torch.optim.Adam([step], lr=radius, betas=(0.7, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, radius * 0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        (-scores(*_move(start, step)).sum()).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        rotations, shifts = _move(start, step)
        found = scores(rotations, shifts)
    order = found.argsort(descending=True)
    return rotations[order], shifts[order], found[order]


def polish(scores: Score, start: Pose, band: float) -> Pose:
    """Quasi-Newton ascent of one candidate to the top of its hill; steps fit the band."""
    step = torch.zeros(1, 6, dtype=torch.float64, device=start[0].device).requires_grad_()
    scale = 0.1 / band
    optimiser = torch.optim.LBFGS([step], max_iter=25, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -scores(*_move(start, step * scale)).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return _move(start, step.detach() * scale)
