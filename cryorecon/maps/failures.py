"""The known faces of a reconstruction that went wrong, each measured by one number.

The measures are made for finished maps and pose tables; what a number means is judged in
:mod:`cryorecon.run.report.doubts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.maps.contour import contour_level
from cryorecon.physics.fourier import centred_frequencies, lowpass, max_band, radius_grid
from cryorecon.physics.resampling import resample_volume

# Detail, in cycles per box, that the shape of a map is judged at.
_BAND = 8.0
_MOST_PIXELS = 128
# Two views this close count as the same.
_VIEW_DEG = 15.0
_MOST_VIEWS = 3000


def hollowness(volume: Tensor) -> float:
    """Density in the middle of a molecule over its density at its radius of gyration.

    The map is low-passed to 8 cycles per box. The middle is the ball of half the radius of
    gyration about the centre of mass of what stands above the contour; the other is the mean over
    a spherical shell from 0.8 to 1.2 of it.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
        White on black.

    Returns
    -------
    float
        1 for a solid ball, 0 for an empty shell, negative where the middle is darker than what is
        around the molecule; infinite if nothing stands out.
    """
    smooth = _shape(volume)
    mass = (smooth - contour_level(smooth)).clamp(min=0)
    if not float(mass.sum()) > 0:
        return float("inf")
    distance = _distance_from_mass(mass)
    gyration = float(((distance**2 * mass).sum() / mass.sum()).sqrt())
    # No middle is smaller than a voxel and its neighbours.
    middle = smooth[distance <= max(0.5 * gyration, 1.0)].mean()
    around = smooth[(distance > 0.8 * gyration) & (distance < 1.2 * gyration)].mean()
    return float(middle / around) if float(around) > 0 else float("inf")


def whiteness(volume: Tensor) -> float:
    """Skewness of a map, low-passed to 8 cycles per box, about the level of its solvent.

    A molecule that is white on black is a small part of the box far above the rest: the third
    moment is positive. A negative blob has a negative one.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)

    Returns
    -------
    float
        Third moment about the median over the second one to the power 1.5; 0 for a constant map.
    """
    smooth = _shape(volume)
    apart = smooth - smooth.median()
    spread = apart.square().mean()
    return float(apart.pow(3).mean() / spread.pow(1.5)) if float(spread) > 0 else 0.0


def mass_at_rim(volume: Tensor, radius: float) -> float:
    """Share of a molecule's mass that lies in the outermost tenth of the allowed sphere.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
        White on black.
    radius : float
        Of the sphere that may hold density, as a fraction of the box side.

    Returns
    -------
    float
        Of what stands above the contour, beyond 0.9 radii from the centre of the box.
    """
    smooth = resample_volume(volume, min(len(volume), _MOST_PIXELS)).double()
    mass = (smooth - contour_level(smooth)).clamp(min=0)
    total = float(mass.sum())
    beyond = radius_grid(len(mass), 3, volume.device) > 0.9 * radius * len(mass)
    return float(mass[beyond].sum()) / total if total > 0 else 0.0


def view_spread(views: Tensor, weights: Tensor | None = None) -> float:
    """Share of the sphere that views fill, as if they were uniform over that much of it.

    Two images seen along directions closer than 15 degrees, or from opposite sides along such,
    show nearly the same. With uniform views a share of ``1 - cos(15 deg)`` of all pairs does;
    views that crowd together have more.

    Parameters
    ----------
    views : Tensor, shape (n, 3)
        Unit vectors: third rows of A. Of more than 3,000, every k-th counts.
    weights : Tensor, shape (n,), optional
        Of directions that stand for many images; pairs of a direction with itself then count.

    Returns
    -------
    float
        About 1 for uniform views, 0.034 for a single one.
    """
    if weights is None:
        views = views[:: -(-len(views) // _MOST_VIEWS)]
    cosine = torch.cos(torch.deg2rad(torch.tensor(_VIEW_DEG)))
    near = ((views @ views.T).abs() > cosine.to(views)).to(views)
    if weights is None:
        n = len(views)
        share = float(near.sum() - n) / max(n * (n - 1), 1)
    else:
        weights = weights.to(views) / weights.sum()
        share = float(weights @ near @ weights)
    return float(1 - cosine) / max(share, 1e-9)


def at_limit(lengths: Tensor, limit: float, step: float) -> Tensor:
    """Which in-plane offsets are as long as was searched, within half a step.

    None of them where not even half a step was searched.

    Parameters
    ----------
    lengths : Tensor, shape (n,)
    limit, step : float
        In the same unit.
    """
    return (lengths > limit - step / 2) & (limit >= step / 2)


def _shape(volume: Tensor) -> Tensor:
    # Large maps hold nothing more of it.
    small = resample_volume(volume, min(len(volume), _MOST_PIXELS)).double()
    return lowpass(small, min(_BAND, float(max_band(len(small)))), 3)


def _distance_from_mass(mass: Tensor) -> Tensor:
    """Distance of every voxel from the centre of mass, in voxels."""
    axis = centred_frequencies(len(mass), mass.device).to(mass)
    total = mass.sum()
    z, y, x = (
        axis - (mass.sum(others) * axis).sum() / total for others in ((1, 2), (0, 2), (0, 1))
    )
    squared = z[:, None, None] ** 2 + y[None, :, None] ** 2 + x[None, None, :] ** 2
    return squared.sqrt()
