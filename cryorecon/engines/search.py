"""Global pose search shared by the engines: every image against every pose of a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.observations import Observations, as_real
from cryorecon.engines.shrinking import ShrinkingBatch, at_once
from cryorecon.physics.fourier import HalfPlane, shift_phases
from cryorecon.physics.likely import add_likely, are_few, likely_sums
from cryorecon.physics.projection import extract_slices, padded_transform

# Scores of images against poses: numbers at once on the CPU, bytes each, and most on a GPU.
_BEST, _EXPECTED = 4_000_000, 40_000_000
_SCORE_BYTES, _MOST_SCORES = 8, 1_000_000_000
# Log-likelihood behind the likeliest pose's at which a pose counts for nothing.
_LEAST = -40.0
# Share of an image's posterior below which an offset need not be tried again, if those beside it
# have no more. With a hundredth searches still end at the same evidence.
_UNLIKELY = 1e-3


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
    offset_shares : Tensor, shape (n, s)
        How much of an image's posterior each offset has.
    """

    log_evidence: Tensor
    effective_poses: Tensor
    offset_shares: Tensor


@dataclass(frozen=True)
class _Grid:
    """All poses of a grid: templates (r, 2m) and their power (r, m), phases of offsets (s, m)."""

    templates: Tensor
    power: Tensor
    phases: Tensor

    @staticmethod
    def of(
        templates: Tensor, offsets_px: Tensor, plane: HalfPlane, temperature: float = 1.0
    ) -> _Grid:
        phases = shift_phases(offsets_px, plane).conj().to(templates.dtype)
        power = templates.abs().square() / temperature
        return _Grid(as_real(templates) * (2 / temperature), power, phases)

    def scores(
        self, batch: Observations, image: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-likelihoods over the temperature, of pairs of image and offset with every rotation.

        Returns
        -------
        scores : Tensor, shape (p, r)
            ``2 Re <m, S> - <w, |S|^2>``; the second product is the same for all offsets.
        shifted : Tensor, shape (p, 2m)
            What the first comes from: images with their offsets undone.
        weights : Tensor, shape (b, m)
            Of each image.
        """
        matched, weights = batch.matched()
        shifted = as_real(matched[image] * self.phases[offset])
        scores = (weights @ -self.power.T)[image]
        return scores.addmm_(shifted, self.templates.T), shifted, weights


def _pairs(likely: Tensor) -> tuple[Tensor, Tensor]:
    """Images and offsets that go together, of a table that says so; shape (p,) each."""
    image, offset = likely.nonzero().unbind(-1)
    return image, offset


def _largest(values: Tensor, image: Tensor, n: int) -> Tensor:
    """Of each image the largest value of its rows; shape (p, r) to (n, r)."""
    least = values.new_full((n, values.shape[1]), -torch.inf)
    return least.scatter_reduce(0, image[:, None].expand_as(values), values, "amax")


def best_grid_pose(
    observations: Observations,
    templates: Tensor,
    offsets_px: Tensor,
    chunk_elements: int | None = None,
    count: int = 1,
    likely: Tensor | None = None,
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
    likely : Tensor, shape (n, s), bool, optional
        Which offsets of each image are tried, at least one.
    """
    grid = _Grid.of(templates, offsets_px, observations.plane)
    r, n, s = len(templates), len(observations), len(offsets_px)
    if likely is None:
        likely = torch.ones(n, s, dtype=torch.bool, device=templates.device)

    def best(part: slice) -> tuple[Tensor, Tensor]:
        image, offset = _pairs(likely[part])
        score = grid.scores(observations.select(part), image, offset)[0]
        # Where a largest value lies takes ten times as long to tell as what it is: of few only.
        at_best = _largest(score, image, len(likely[part]))
        rotation = at_best.topk(count, -1).indices
        is_best = score.gather(1, rotation[image]) == at_best.gather(1, rotation)[image]
        place = torch.where(is_best, offset[:, None], s - 1)
        first = torch.full_like(rotation, s - 1)
        return rotation, first.scatter_reduce(0, image[:, None].expand_as(place), place, "amin")

    each = max(1, r * int(likely.sum()) // max(1, n))
    parts = _parts(chunk_elements or _scores_at_once(_BEST, templates), each)
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
    likely: Tensor | None = None,
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
    likely : Tensor, shape (n, s), bool, optional
        Which offsets of each image are tried, at least one; the others count for nothing.

    Returns
    -------
    posterior : GridPosterior
    signal : Tensor, shape (r, m), complex
        Posterior-weighted sum of the images, offsets undone, at each rotation.
    weight : Tensor, shape (r, m), real
    """
    (r, m), s = templates.shape, len(offsets_px)
    n, device = len(observations), templates.device
    if likely is None:
        likely = torch.ones(n, s, dtype=torch.bool, device=device)
    grid = _Grid.of(templates, offsets_px, observations.plane, temperature)
    sums, shares = grid.power.new_zeros(r, 3 * m), likely.to(grid.power)
    log_poses = math.log(r * s)

    def expect(part: slice) -> tuple[Tensor, Tensor]:
        image, offset = _pairs(likely[part])
        score, rows, weights = grid.scores(observations.select(part), image, offset)
        nothing = score.new_zeros(len(likely[part]))
        peak = _largest(score.amax(-1, keepdim=True), image, len(nothing))[:, 0]
        if few := are_few(score, peak[image]):
            of_pair, squares = likely_sums(score, peak[image])
        else:
            # Not less: numbers below those of full precision take ten times as long, in exp too.
            score.sub_(peak[image, None]).clamp_(min=_LEAST).exp_()
            of_pair = score.sum(-1)
            squares = torch.linalg.vector_norm(score, dim=-1).square()
        total = nothing.index_add(0, image, of_pair)
        effective = total.square() / nothing.index_add(0, image, squares)
        shares[part][image, offset] = of_pair / total[image]
        rows, weights = rows / total[image, None], weights / total[:, None]
        # Sums change last: until then memory may end, and the part be repeated.
        if few:
            add_likely(score, peak[image], torch.cat([rows, weights[image]], -1), sums)
        else:
            _add_all(score, image, rows, weights, sums)
        return peak + total.log() - log_poses, effective

    tried = int(likely.sum()) / max(1, n)
    parts = _parts(chunk_elements or _scores_at_once(_EXPECTED, templates), max(1, int(r * tried)))
    # One process of several may have no image of a small batch.
    none = sums.new_zeros(0), sums.new_zeros(0)
    found = [none, *(values for _, values in parts.over(n, expect))]
    evidence, poses = (torch.cat(part) for part in zip(*found, strict=True))
    real, imaginary, weight = sums.split(m, -1)
    signal = torch.complex(real.contiguous(), imaginary.contiguous())
    return GridPosterior(evidence, poses, shares), signal, weight


def _add_all(score: Tensor, image: Tensor, rows: Tensor, weights: Tensor, sums: Tensor) -> None:
    """``sums += score.T @ (rows, weights[image])``; an image's offsets share its weights."""
    of_image = score.new_zeros(len(weights), score.shape[1]).index_add(0, image, score)
    sums[:, : rows.shape[1]].addmm_(score.T, rows)
    sums[:, rows.shape[1] :].addmm_(of_image.T, weights)


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

    @staticmethod
    def of(posterior: GridPosterior) -> Evidence:
        """Of the images that a posterior is of."""
        found, poses = posterior.log_evidence, posterior.effective_poses.median()
        error = found.std() / max(len(found), 1) ** 0.5
        return Evidence(float(found.mean()), float(error), float(poses))


def posterior_of(
    observations: Observations,
    volume: Tensor,
    grid: Tensor,
    offsets_px: Tensor,
    likely: Tensor | None = None,
) -> GridPosterior:
    """Posterior of images over a grid of poses in a map.

    Parameters
    ----------
    observations : Observations of n images
        Up to the band that is compared.
    volume : Tensor, shape (M, M, M)
        Large enough for that band.
    grid : Tensor, shape (r, 3, 3)
    offsets_px : Tensor, shape (s, 2)
    likely : Tensor, shape (n, s), bool, optional
        As in :func:`grid_expectation`.
    """
    transform = padded_transform(volume, band=float(observations.plane.radius[-1]))
    grid, offsets_px = grid.to(volume.device), offsets_px.to(volume.device)
    templates = extract_slices(transform, grid, observations.plane)
    return grid_expectation(observations, templates, offsets_px, likely=likely)[0]


def evidence(
    observations: Observations, volume: Tensor, grid: Tensor, offsets_px: Tensor
) -> Evidence:
    """Evidence of a map over a grid of poses; see :func:`posterior_of`."""
    return Evidence.of(posterior_of(observations, volume, grid, offsets_px))


def offsets_to_try(shares: Tensor, offsets_px: Tensor, wanted_px: Tensor) -> Tensor:
    """Which offsets of a lattice lie no more than a step from likely ones; shape (n, t), bool.

    Parameters
    ----------
    shares : Tensor, shape (n, s)
        Of each image's posterior.
    offsets_px : Tensor, shape (s, 2)
        A lattice of :func:`offset_grid`.
    wanted_px : Tensor, shape (t, 2)
        The same one, or a finer one.
    """
    step = offsets_px[1:2].norm() if len(offsets_px) > 1 else offsets_px.new_tensor(torch.inf)
    near = torch.cdist(offsets_px, wanted_px) < 1.01 * step
    # Of very many offsets a likely one may have less.
    least = min(_UNLIKELY, 0.1 / len(offsets_px))
    found = (shares > least).to(wanted_px) @ near.to(wanted_px) > 0
    # All, if none of many stands out, or what is not finite has no posterior.
    return found | ~found.any(-1, keepdim=True)
