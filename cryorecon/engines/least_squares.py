"""The map that fits images with known poses best, from their normal equations.

Dividing the gridded signal by the gridded weight takes the weight for constant over the
interpolation kernel. At low resolution, where the CTF rises from its amplitude contrast to its
first maximum within a few shells, that biases the map. Conjugate gradients on the normal
equations of maps that fit the box have no such error; the normal matrix is a convolution, so
that a step costs two transforms however many images there are (Wang, Shkolnisky & Singer 2013).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations, shells_of_squares
from cryorecon.physics.fourier import centred_frequencies
from cryorecon.physics.half_space import (
    columns,
    convolve,
    cropped,
    maps_of,
    spans,
    without_fall_off,
)
from cryorecon.physics.projection import gridding_correction


def wiener_map(sums: NormalEquations, prior: Tensor, box: int) -> Tensor:
    """Signal over weight, as :meth:`NormalEquations.solve` has it, as a map.

    Parameters
    ----------
    sums : NormalEquations
    prior : Tensor, shape (n_shells,), real
        Added to the weight; shells beyond its end are zero.
    box : int
        N, on the sums' field of view.

    Returns
    -------
    Tensor, shape (N, N, N), real
        Sums over a voxel's share of the box.
    """
    return _maps(sums, prior, box, seen=False)[0]


def least_squares_map(
    sums: NormalEquations, prior: Tensor, support: Tensor, n_steps: int = 5
) -> Tensor:
    """Regularised least-squares map within a soft mask, by conjugate gradients.

    Parameters
    ----------
    sums : NormalEquations
        With padding 2 or more, so that the box's pairs of points do not wrap around.
    prior : Tensor, shape (n_shells,), real
        As in :func:`wiener_map`, which gives the first guess; the last value holds beyond the end.
    support : Tensor, shape (N, N, N), real
        Mask that the map wears.
    n_steps : int
        Conjugate-gradient steps from there; 0 is the first guess, masked.

    Returns
    -------
    Tensor, shape (N, N, N), real
        Sums over a voxel's share of the box, times the mask.
    """
    box = len(support)
    if n_steps == 0:
        return wiener_map(sums, prior, box) * support
    guess, seen = _maps(sums, prior, box, seen=True)
    kernel = _normal_kernel(sums, prior, box)

    def normal(values: Tensor) -> Tensor:
        return convolve(values * support, kernel) * support

    return _conjugate_gradients(normal, seen * support, guess, n_steps) * support


def _maps(sums: NormalEquations, prior: Tensor, box: int, *, seen: bool) -> Tensor:
    """The Wiener estimate and, if wanted, the signal itself as maps, shape (1 or 2, N, N, N)."""
    size = box * sums.padding
    signal, weight = cropped(sums.signal, size), cropped(sums.weight, size)
    penalty = _Penalty(prior.to(weight), len(weight) - 1, sums.padding)
    # A point that no image came near holds nothing; any positive weight keeps it 0.
    largest = (weight.max() + prior.max()).double()
    floor = (largest * 1e-6 + torch.finfo(weight.dtype).tiny).to(weight)

    def read(start: int, stop: int) -> Tensor:
        added = penalty.columns(start, stop)
        there = columns(signal, start, stop)
        known = torch.maximum(columns(weight, start, stop) + added, floor)
        if not seen:
            return there.div_(known)[None]
        return torch.stack([there / known, there * added.isfinite()])

    found = maps_of(read, len(weight), size, box, weight.device)
    return found / gridding_correction(box, sums.padding, found.dtype, found.device)


def _normal_kernel(sums: NormalEquations, prior: Tensor, box: int) -> Tensor:
    """Transform of the normal matrix's convolution kernel, real, in ``rfftn`` layout."""
    size = box * sums.padding
    weight = cropped(sums.weight, size)
    half = columns(weight, 0, len(weight) // 2)
    inside = _Penalty(prior.to(weight), len(weight) - 1, sums.padding)
    for start, stop in spans(half.shape[-1], size**2, half.device):
        half[..., start:stop] *= inside.columns(start, stop).isfinite()
    kernel = without_fall_off(half, size)
    everywhere = _Penalty(prior.to(weight), size, sums.padding, lasts=True)
    for start, stop in spans(kernel.shape[-1], size**2, half.device):
        added = everywhere.columns(start, stop)
        kernel[..., start:stop] += torch.fft.ifftshift(added, (0, 1))
    return kernel


class _Penalty:
    """What a prior by shell adds to the weights of a grid's columns kx >= 0.

    Parameters
    ----------
    prior : Tensor, shape (n_shells,), real
    points : int
        Points a side of the centred grid.
    padding : int
        Its steps a cycle per box.
    lasts : bool
        Whether the last value holds beyond the end; else infinity stands there.
    """

    def __init__(self, prior: Tensor, points: int, padding: int, *, lasts: bool = False) -> None:
        axis = centred_frequencies(points, prior.device).square()
        self._face = axis[:, None] + axis
        shells = shells_of_squares(3 * (points // 2) ** 2, padding, prior.device)
        beyond = prior[-1:] if lasts else torch.full_like(prior[-1:], torch.inf)
        values = torch.cat([prior, beyond])
        self._of_square = values[shells.clamp(max=len(prior))]

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns `start` <= kx < `stop`, shape (P, P, stop - start)."""
        along = torch.arange(start, stop, device=self._face.device).square()
        return self._of_square[self._face[..., None] + along]


def _conjugate_gradients(
    matrix: Callable[[Tensor], Tensor], right: Tensor, start: Tensor, n_steps: int
) -> Tensor:
    """Solve ``matrix(x) = right`` for a positive semi-definite matrix."""
    found = start
    residual = right - matrix(found)
    direction, power = residual, residual.square().sum()
    for _ in range(n_steps):
        moved = matrix(direction)
        curvature = (direction * moved).sum()
        if not (power > 0 and curvature > 0):
            break
        length = power / curvature
        found = found + length * direction
        residual = residual - length * moved
        before, power = power, residual.square().sum()
        direction = residual + (power / before) * direction
    return found
