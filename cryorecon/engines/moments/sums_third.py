"""Sums for third moments, beside those of the first two.

With z the harmonics of ``C y`` (CTF times image), D_0 the mean of C^2 over a circle and c_0 that
of C, each image adds ``z_m(k) z_m'(k') z_{m+m'}(k'')*``, the weight ``D_0(k) D_0(k') D_0(k'')``
and, for its noise of power P, ``D_0(k) c_0(k') c_0(k'') P``. The noise is Gaussian: of its own it
has no third moment, and with the first moment it adds what :func:`noise_in_third` says.
Astigmatism is left in: of first order in it nothing remains, as three orders must sum to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.engines.moments.forms import MomentsGeometry
from cryorecon.engines.moments.sums import divided, is_measured, standard_error
from cryorecon.engines.moments.third import (
    n_pairs,
    noise_in_third,
    third_moment,
    third_of_powers,
)


def third_shapes(geometry: MomentsGeometry, n_shells: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the sums; none without third moments."""
    R = geometry.third_radius
    if not R:
        return {}
    entries = (n_pairs(geometry.third_order), R, R, R)
    return {
        "third": entries,
        "third_square": entries,
        "third_weight": (R, R, R),
        "third_spread": (n_shells, R, R, R),
    }


def add_third(
    sums: dict[str, Tensor],
    geometry: MomentsGeometry,
    harmonics: Tensor,
    squared: Tensor,
    plain: Tensor,
    noise_power: Tensor,
) -> None:
    """Add images.

    Parameters
    ----------
    harmonics : Tensor, shape (b, K, M + 1), complex128
        Of ``C y``.
    squared, plain : Tensor, shape (b, K), float64
        Means of C^2 and of C over each circle.
    noise_power : Tensor, shape (b, n_shells), float64
    """
    R = geometry.third_radius
    z = harmonics[:, :R, : geometry.third_order + 1]
    ones = torch.ones(len(z), dtype=torch.float64, device=z.device)
    sums["third"] += third_moment(z, ones)
    sums["third_square"] += third_of_powers(z.abs().square())
    square, mean = squared[:, :R], plain[:, :R]
    pairs = square[:, :, None] * square[:, None]
    sums["third_weight"] += torch.einsum("bij,bk->ijk", pairs, square)
    triples = square[:, :, None, None] * (mean[:, :, None] * mean[:, None])[:, None]
    spread = noise_power.T @ triples.flatten(1)
    sums["third_spread"] += spread.view(sums["third_spread"].shape)


class ThirdNoise:
    """Covariance of the noise that meets the first moment, collected shell by shell."""

    def __init__(self, geometry: MomentsGeometry) -> None:
        R, orders = geometry.third_radius, geometry.third_order + 1
        self._radii = R
        self.total = torch.zeros(orders, R, R, R, dtype=torch.complex128)

    def add(self, spread: Tensor, covariance: Tensor) -> None:
        """One shell: its sums, (R, R, R), and what it leaves in orders 0, 1, ..., (., K, K)."""
        orders, R = len(self.total), self._radii
        self.total += spread * covariance[:orders, None, :R, :R]


def finished_third(
    sums: dict[str, Tensor], noise: ThirdNoise, first: Tensor, n_images: int
) -> tuple[Tensor, Tensor]:
    """Third moment and its standard error, the noise subtracted.

    Parameters
    ----------
    first : Tensor, shape (K,), float64
        The first moment, with the sign of the images.
    """
    total = sums["third"] - noise_in_third(first[: len(sums["third_weight"])], noise.total)
    weight = sums["third_weight"].expand_as(sums["third_square"])
    error = standard_error(sums["third_square"], sums["third"], weight, n_images)
    return divided(total, weight, is_measured(weight)), error
