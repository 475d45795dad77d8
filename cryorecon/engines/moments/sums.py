"""Sums over images that moments are made of: they add up exactly, over blocks and over files.

With y an image's samples and C its CTF, each image adds ``C y`` and ``(C y)(C' y')*``, the
weights ``C^2`` and ``C^2 C'^2``, and its noise ``C C' P``, P its own power spectrum outside the
particle. Only :meth:`finalise` subtracts and divides:

    M2 = (sum (C y)(C' y')* - sum C C' B) / sum C^2 C'^2

entry by entry, the weighted least squares of moments under known CTFs, B being what noise of
spectrum P leaves in an entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cryorecon.engines.contrast import FIRST_LOBE, SURE
from cryorecon.engines.moments.forms import Moments, MomentsGeometry

# Entries whose weight is below this share of the largest count as not measured.
_LEAST_WEIGHT = 1e-6


@dataclass(frozen=True)
class MomentBatch:
    """Images for the sums.

    Attributes
    ----------
    images : Tensor, shape (b, N, N), float32
        Shifted to their origins as far as whole pixels go.
    offsets_px : Tensor, shape (b, 2), or None for none
        (ox, oy): the rest of the origins.
    ctf : Tensor, shape (b, p), or None for 1
        At the sums' `frequencies`.
    noise_power : Tensor, shape (b, n_shells)
        Of each image, of the unnormalised transform.
    """

    images: Tensor
    offsets_px: Tensor | None
    ctf: Tensor | None
    noise_power: Tensor

    def __len__(self) -> int:
        return len(self.images)


class MomentSums(Protocol):
    """What both forms of sums can do."""

    geometry: MomentsGeometry
    n_images: int
    arrays: dict[str, Tensor]

    @property
    def frequencies(self) -> Tensor:
        """(kx, ky) in cycles per image box where the CTF is wanted, shape (p, 2), float64."""

    def add(self, batch: MomentBatch) -> None:
        """Add images."""

    def finalise(self, progress: Callable[[int, int], None] | None = None) -> Moments:
        """Subtract the noise, divide by the weights; tells of shells done and their number."""


def shifted(samples: Tensor, offsets_px: Tensor | None, frequencies: Tensor, box: int) -> Tensor:
    """Samples at (p, 2) frequencies of images moved to their origins; shape (b, p)."""
    if offsets_px is None:
        return samples
    points = frequencies.to(samples.device, samples.real.dtype)
    angle = (-2 * torch.pi / box) * (offsets_px.to(points) @ points.T)
    return samples * torch.polar(torch.ones_like(angle), angle)


def merge_arrays(first: MomentSums, second: MomentSums) -> None:
    """Add the second sums to the first; their geometries must be equal.

    Raises
    ------
    ValueError
        Naming the first difference.
    """
    if first.geometry != second.geometry:
        mine, other = first.geometry.attributes(), second.geometry.attributes()
        name = next(key for key in mine if mine[key] != other[key])
        raise ValueError(f"{name} is {mine[name]} in one and {other[name]} in the other")
    first.n_images += second.n_images
    for name, array in first.arrays.items():
        array += second.arrays[name].to(array)


def divided(sums: Tensor, weight: Tensor, measured: Tensor) -> Tensor:
    """Sums over weights where measured, 0 elsewhere."""
    safe = torch.where(measured, weight, torch.ones_like(weight))
    return torch.where(measured, sums / safe, torch.zeros_like(sums))


def is_measured(weight: Tensor) -> Tensor:
    """Where the weight is not negligible beside the largest."""
    return weight > _LEAST_WEIGHT * float(weight.max())


def standard_error(square: Tensor, total: Tensor, weight: Tensor, n_images: int) -> Tensor:
    """Standard error of ``total / weight`` from the sample's variance of the n terms.

    The terms' own variation with the CTF counts as error too: on the safe side.
    """
    if n_images < 2:
        return torch.full_like(square, torch.inf)
    measured = is_measured(weight)
    scatter = (square - total.abs() ** 2 / n_images).clamp(min=0) * (n_images / (n_images - 1))
    error = divided(scatter.sqrt(), weight, measured)
    return torch.where(measured, error, torch.full_like(error, torch.inf))


def contrast_of(geometry: MomentsGeometry, s: Tensor, first: Tensor, error: Tensor) -> float:
    """How surely particles are white (positive) or black, in standard errors.

    The first moment is compared with the transform of a solid ball of the particle's diameter, up
    to its first zero.

    Parameters
    ----------
    s : Tensor, shape (k,)
        Spatial frequencies in 1/angstrom.
    first, error : Tensor, shape (k,), real
    """
    x = torch.pi * geometry.diameter_angst * s.clamp(min=1e-6 / geometry.diameter_angst)
    ball = torch.where(x < 1e-2, torch.ones_like(x), 3 * (x.sin() - x * x.cos()) / x**3)
    known = torch.isfinite(error) & (error > 0) & (s * geometry.diameter_angst < FIRST_LOBE)
    ball, first, error = ball[known], first[known], error[known]
    if len(ball) == 0:
        return 0.0
    return float((first * ball / error**2).sum() / (ball**2 / error**2).sum().sqrt())


def first_sign(geometry: MomentsGeometry, score: float) -> float:
    """Sign that makes particles white: as told, or as the images tell when they are sure."""
    if geometry.contrast == "auto":
        return -1.0 if score < -SURE else 1.0
    return -1.0 if geometry.contrast == "black" else 1.0
