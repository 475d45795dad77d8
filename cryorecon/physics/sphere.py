"""Viewing directions: quadrature rules on the sphere and frames about a direction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import lebedev_rule
from scipy.optimize import least_squares
from scipy.special import sph_harm_y
from torch import Tensor

from cryorecon.conventions import euler_to_matrix

# Degrees of the Lebedev rules with positive weights only.
_LEBEDEV = (3, 5, 7, 9, 11, 15, 17, 19, 21, 23, 29, 31, 35, 41, 47, 53, 59, 65, 71, 77, 83, 89,
            95, 101, 107, 113, 119, 125, 131)  # fmt: skip


@dataclass(frozen=True)
class SphereRule:
    """Points and weights whose weighted sums are means over the sphere.

    Attributes
    ----------
    directions : Tensor, shape (q, 3), float64
        Unit vectors.
    weights : Tensor, shape (q,), float64
        Positive, summing to 1.
    degree : int
        Spherical harmonics up to this degree are summed exactly.
    """

    directions: Tensor
    weights: Tensor
    degree: int

    def __len__(self) -> int:
        return len(self.weights)

    def hemisphere(self) -> SphereRule:
        """One of each antipodal pair, with both weights: exact for even functions alone.

        Raises
        ------
        ValueError
            If the rule does not hold the antipode of each point with the same weight.
        """
        exact = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(self.directions, -self.directions, compute_mode=exact)
        mate = distance.argmin(1)
        near = distance.gather(1, mate[:, None])[:, 0]
        same = (self.weights - self.weights[mate]).abs() < 1e-12
        if not bool(((near < 1e-9) & same).all()):
            raise ValueError("the rule is not symmetric about the origin")
        kept = torch.arange(len(self)) < mate
        return SphereRule(self.directions[kept], 2 * self.weights[kept], self.degree)


def lebedev(degree: int) -> SphereRule:
    """The smallest Lebedev rule exact to at least `degree`; antipodally symmetric.

    About ``(degree + 1)^2 / 3`` points (Lebedev and Laikov 1999; SciPy's tables).

    Raises
    ------
    ValueError
        Above degree 131.
    """
    if degree > _LEBEDEV[-1]:
        raise ValueError(f"no Lebedev rule of degree {degree}; the largest has {_LEBEDEV[-1]}")
    found = next(d for d in _LEBEDEV if d >= degree)
    points, weights = lebedev_rule(found)
    total = torch.from_numpy(weights / weights.sum())
    directions = torch.nn.functional.normalize(torch.from_numpy(points.T.copy()), dim=-1)
    return SphereRule(directions, total, found)


def spherical_design(degree: int) -> SphereRule:
    """A symmetric spherical design: equal weights, found by Gauss-Newton from a spiral.

    Of odd degree t, with ``2 ceil((t^2 + t + 4) / 4)`` points (Womersley 2018) or a few more:
    antipodal pairs sum odd harmonics to 0, so that only even degrees are left to solve for.
    Seconds for degree 21.

    Raises
    ------
    ValueError
        If the sums do not vanish to 1e-12.
    """
    degree += 1 - degree % 2
    pairs = -(-(degree**2 + degree + 4) // 4)
    for extra in range(4):
        half, residual = _design(degree, pairs + extra)
        if residual < 1e-12:
            weights = torch.full((2 * len(half),), 0.5 / len(half), dtype=torch.float64)
            return SphereRule(torch.cat([half, -half]), weights, degree)
    raise ValueError(f"no design of degree {degree} found: sums of {residual:.1e} are left")


def _design(degree: int, pairs: int) -> tuple[Tensor, float]:
    """One of each pair, shape (pairs, 3), and the largest sum that is left."""
    index = np.arange(pairs) + 0.5
    start = np.concatenate([np.arccos(1 - index / pairs), np.pi * (1 + 5**0.5) * index])
    even = range(2, degree, 2)

    def sums(angles: NDArray[np.float64]) -> NDArray[np.float64]:
        return _harmonics(angles[:pairs], angles[pairs:], even).mean(0)

    def slopes(angles: NDArray[np.float64]) -> NDArray[np.float64]:
        # Each pair's angles move its own terms alone: two differences give all derivatives.
        tilt, rot, step = angles[:pairs], angles[pairs:], 1e-5
        by_tilt = _harmonics(tilt + step, rot, even) - _harmonics(tilt - step, rot, even)
        by_rot = _harmonics(tilt, rot + step, even) - _harmonics(tilt, rot - step, even)
        return np.concatenate([by_tilt, by_rot]).T / (2 * step * pairs)

    # An underdetermined system: more angles than sums. The spiral is near a solution.
    exact = 1e-15
    solved = least_squares(sums, start, jac=slopes, xtol=exact, ftol=exact, gtol=exact)
    tilt, rot = torch.from_numpy(solved.x).view(2, -1)
    flat = torch.stack([torch.cos(rot), torch.sin(rot)], -1) * torch.sin(tilt)[:, None]
    half = torch.cat([flat, torch.cos(tilt)[:, None]], -1)
    return half, float(np.abs(solved.fun).max())


def real_harmonics(degree: int, directions: Tensor) -> Tensor:
    """Real spherical harmonics up to a degree; their mean square over the sphere is 1.

    Parameters
    ----------
    degree : int
    directions : Tensor, shape (q, 3)
        Unit vectors.

    Returns
    -------
    Tensor, shape (q, (degree + 1)^2), float64
        Degree l takes columns l^2 to (l + 1)^2 - 1; within it come, for m = 0, 1, ..., the
        cosine and (from m = 1 on) the sine.
    """
    x, y, z = directions.double().unbind(-1)
    tilt, rot = torch.acos(z.clamp(-1, 1)).numpy(), torch.atan2(y, x).numpy()
    return torch.from_numpy(_harmonics(tilt, rot, range(degree + 1)))


def _harmonics(
    tilt: NDArray[np.float64], rot: NDArray[np.float64], degrees: range
) -> NDArray[np.float64]:
    columns = []
    for degree in degrees:
        for order in range(degree + 1):
            value = sph_harm_y(degree, order, tilt, rot) * (4 * np.pi) ** 0.5
            columns += [value.real] if order == 0 else [value.real * 2**0.5, value.imag * 2**0.5]
    return np.stack(columns, -1)


def frames(directions: Tensor) -> Tensor:
    """Rotations A, reference to image, that look along given directions, with psi = 0.

    Parameters
    ----------
    directions : Tensor, shape (q, 3)
        Unit vectors.

    Returns
    -------
    Tensor, shape (q, 3, 3), float64
        The third row is the direction, the first two the image's x and y axes; right-handed.
    """
    x, y, z = directions.double().unbind(-1)
    rot, tilt = torch.atan2(y, x), torch.atan2(torch.hypot(x, y), z)
    return euler_to_matrix(torch.rad2deg(torch.stack([rot, tilt, torch.zeros_like(rot)], -1)))
