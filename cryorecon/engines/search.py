"""Global pose search shared by the engines: every image against every pose of a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.observations import Observations, as_real, centred
from cryorecon.engines.shrinking import ShrinkingBatch, at_once
from cryorecon.physics.fourier import HalfPlane
from cryorecon.physics.projection import extract_slices, padded_transform

# Scores of images against poses: numbers at once on the CPU, bytes each, and most on a GPU.
_BEST, _EXPECTED = 4_000_000, 40_000_000
_SCORE_BYTES, _MOST_SCORES = 8, 1_000_000_000
# Log-likelihood behind the likeliest pose's at which a pose counts for nothing.
_LEAST = -40.0


def offset_grid(range_px: float, step_px: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """In-plane offsets (ox, oy) in pixels on a square lattice within a disc; shape (s, 2)."""
    reach = int(range_px / step_px + 1e-6)
    axis = torch.arange(-reach, reach + 1, dtype=dtype) * step_px
    lattice = torch.cartesian_prod(axis, axis)
    lattice = lattice[lattice.norm(dim=-1) <= range_px + 1e-6]
    return lattice[torch.sort(lattice.norm(dim=-1), stable=True).indices]


@dataclass(frozen=True)
class GridPosterior:
    """What a grid search found.

    Attributes
    ----------
    log_evidence : Tensor, shape (n,)
        Log of the mean likelihood over the grid, against an empty image.
    effective_poses : Tensor, shape (n,)
        Inverse of the sum of squared weights.
    """

    log_evidence: Tensor
    effective_poses: Tensor


@dataclass(frozen=True)
class _Grid:
    """All poses of a grid: templates and their power side by side (r, 3m), offsets."""

    table: Tensor
    offsets_px: Tensor

    @staticmethod
    def of(templates: Tensor, offsets_px: Tensor, temperature: float = 1.0) -> _Grid:
        table = torch.cat([2 * as_real(templates), -(templates.abs() ** 2)], -1)
        return _Grid(table / temperature, offsets_px)

    def scores(self, batch: Observations) -> tuple[Tensor, Tensor]:
        """Log-likelihoods over the temperature (b, s, r), and what they come from (b, s, 3m).

        That is shifted images and their weights: one product says ``2 Re <m, S> - <w, |S|^2>``.
        """
        matched, weights = batch.matched()
        shifted = as_real(centred(matched[:, None, :], self.offsets_px[None], batch.plane))
        rows = torch.cat([shifted, weights[:, None].expand(-1, shifted.shape[1], -1)], -1)
        return (rows.flatten(0, 1) @ self.table.T).unflatten(0, rows.shape[:2]), rows


def best_grid_pose(
    observations: Observations,
    templates: Tensor,
    offsets_px: Tensor,
    chunk_elements: int | None = None,
    count: int = 1,
) -> tuple[Tensor, Tensor]:
    """The likeliest rotations of each image, each with its best offset; indices (n, count), int64.

    Parameters
    ----------
    observations : Observations of n images, m coefficients
    templates : Tensor, shape (r, m), complex
    offsets_px : Tensor, shape (s, 2)
    chunk_elements : int, optional
        Scores that are held at a time; default what the device is good at.
    count : int
        How many rotations, the likeliest first.
    """
    grid, r = _Grid.of(templates, offsets_px), len(templates)

    def best(part: slice) -> tuple[Tensor, Tensor]:
        score = grid.scores(observations.select(part))[0]
        if count == 1:
            found = score.flatten(1).argmax(-1, keepdim=True)
            return found % r, found // r
        at_best, offset = score.max(1)
        rotation = at_best.topk(count, -1).indices
        return rotation, offset.gather(1, rotation)

    parts = _parts(chunk_elements or _scores_at_once(_BEST, templates), r * len(offsets_px))
    found = [indices for _, indices in parts.over(len(observations), best)]
    rotations, offsets = (torch.cat(part) for part in zip(*found, strict=True))
    return rotations, offsets


def _scores_at_once(on_cpu: int, templates: Tensor) -> int:
    return at_once(on_cpu, _SCORE_BYTES, templates.device, _MOST_SCORES)


def _parts(chunk_elements: int, n_poses: int) -> ShrinkingBatch:
    return ShrinkingBatch(max(1, chunk_elements // n_poses))


def grid_expectation(
    observations: Observations,
    templates: Tensor,
    offsets_px: Tensor,
    temperature: float = 1.0,
    chunk_elements: int | None = None,
) -> tuple[GridPosterior, Tensor, Tensor]:
    """Posterior of each image over all grid poses, and its sums over images.

    The likelihood of every (image, offset, rotation) is two matrix products; so are the sums
    that a map update needs, and no image is ever projected by itself.

    Parameters
    ----------
    observations : Observations of n images, m coefficients
    templates : Tensor, shape (r, m), complex
        Slices of the current map at the grid's rotations.
    offsets_px : Tensor, shape (s, 2)
    temperature : float
        Divides the log-likelihood; above 1 spreads the posterior.
    chunk_elements : int, optional
        Scores that are held at a time; default what the device is good at.

    Returns
    -------
    posterior : GridPosterior
    signal : Tensor, shape (r, m), complex
        Posterior-weighted sum of the images, offsets undone, at each rotation.
    weight : Tensor, shape (r, m), real
    """
    (r, m), s = templates.shape, len(offsets_px)
    grid = _Grid.of(templates, offsets_px, temperature)
    sums = torch.zeros_like(grid.table)
    log_poses = math.log(r * s)

    def expect(part: slice) -> tuple[Tensor, Tensor]:
        score, rows = grid.scores(observations.select(part))
        flat = score.flatten(1)
        peak = flat.amax(-1, keepdim=True)
        # Not less: numbers below those of full precision take ten times as long, in exp too.
        flat.sub_(peak).clamp_(min=_LEAST).exp_()
        total = flat.sum(-1, keepdim=True)
        evidence = (peak + total.log()).squeeze(-1) - log_poses
        effective = (total.squeeze(-1) / torch.linalg.vector_norm(flat, dim=-1)).square()
        rows.div_(total[..., None])
        # Sums change last: until then memory may end, and the part be repeated.
        sums.addmm_(score.view(-1, r).T, rows.view(-1, 3 * m))
        return evidence, effective

    parts = _parts(chunk_elements or _scores_at_once(_EXPECTED, templates), r * s)
    # One process of several may have no image of a small batch.
    none = sums.new_zeros(0), sums.new_zeros(0)
    found = [none, *(values for _, values in parts.over(len(observations), expect))]
    posterior = GridPosterior(*(torch.cat(p) for p in zip(*found, strict=True)))
    real, imaginary, weight = sums.split(m, -1)
    return posterior, torch.complex(real.contiguous(), imaginary.contiguous()), weight


def accumulate_grid(
    signal: Tensor, weight: Tensor, rotations: Tensor, plane: HalfPlane, padding: int = 2
) -> NormalEquations:
    """Normal equations of a map from the sums of :func:`grid_expectation`."""
    sums = NormalEquations.empty(float(plane.radius[-1]), padding, weight.dtype, weight.device)
    sums.add(signal, weight, rotations.to(weight.dtype), plane)
    return sums


class Evidence(NamedTuple):
    """How a map explains images over a grid of poses.

    Attributes
    ----------
    mean, error : float
        Log-evidence an image, and its standard error.
    poses : float
        How many poses of the grid an image leaves likely, the median.
    """

    mean: float
    error: float
    poses: float


def evidence(
    observations: Observations, volume: Tensor, grid: Tensor, offsets_px: Tensor
) -> Evidence:
    """Evidence of a map over a grid of poses.

    Parameters
    ----------
    observations : Observations of n images
        Up to the band that is compared.
    volume : Tensor, shape (M, M, M)
        Large enough for that band.
    grid : Tensor, shape (r, 3, 3)
    offsets_px : Tensor, shape (s, 2)
    """
    transform = padded_transform(volume, band=float(observations.plane.radius[-1]))
    grid, offsets_px = grid.to(volume.device), offsets_px.to(volume.device)
    templates = extract_slices(transform, grid, observations.plane)
    posterior = grid_expectation(observations, templates, offsets_px)[0]
    found, poses = posterior.log_evidence, posterior.effective_poses.median()
    error = found.std() / max(len(found), 1) ** 0.5
    return Evidence(float(found.mean()), float(error), float(poses))
