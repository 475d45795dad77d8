"""Soft masks: about the centre of a box, and around a molecule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from cryorecon.physics.fourier import centred_frequencies, lowpass, radius_grid
from cryorecon.physics.resampling import resample_volume, shift_volume


def soft_ball(
    box: int,
    radius_px: float,
    edge_px: float,
    ndim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Disc (ndim 2) or sphere (ndim 3): 1 inside `radius_px`, a raised cosine down to 0.

    Parameters
    ----------
    radius_px : float
        Where the fall begins.
    edge_px : float
        Width of the fall.

    Returns
    -------
    Tensor, shape (N,) * ndim
    """
    radius = radius_grid(box, ndim, device).to(dtype)
    ramp = ((radius - radius_px) / max(edge_px, 1e-6)).clamp(0, 1)
    return 0.5 + 0.5 * torch.cos(torch.pi * ramp)


def molecule_mask(
    volume: Tensor, band: float, threshold: float = 0.15, margin: float = 0.035
) -> Tensor:
    """Around what stands out of a map: 1 on the molecule and a margin about it, softly 0 beyond.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
        White on black.
    band : float
        Cycles per box that the map is low-passed to before the cut.
    threshold : float
        Share of the low-passed map's maximum that counts as molecule.
    margin : float
        Width of the margin as a fraction of the box.

    Returns
    -------
    Tensor, shape (N, N, N)
        Ones if nothing stands out.
    """
    box = volume.shape[-1]
    inside = standing_out(volume, band, threshold)
    if not inside.any():
        return torch.ones_like(volume)
    reach = max(1, round(margin * box))
    grown = inside.to(volume.dtype)[None, None]
    for axis in range(3):  # A cube's maximum is that of its rows, one axis after the other.
        wide, pad = [1, 1, 1], [0, 0, 0]
        wide[axis], pad[axis] = 2 * reach + 1, reach
        grown = torch.nn.functional.max_pool3d(grown, wide, 1, pad)
    return lowpass(grown[0, 0], box / 6.4, 3, box / 8).clamp(0, 1)


def centre_of_mass(volume: Tensor, band: float) -> Tensor:
    """(x, y, z) from the centre of the box in pixels, of what stands out; float64, shape (3,).

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
        White on black.
    band : float
        Cycles per box that the map holds; details finer than an eighth of the box tell nothing
        of where a molecule lies.
    """
    density = (volume * molecule_mask(volume, min(band, 8.0))).clamp(min=0).double()
    axis = centred_frequencies(volume.shape[-1], volume.device).double()
    total = density.sum().clamp(min=1e-300)
    return torch.stack([(density.sum(d) * axis).sum() / total for d in ((0, 1), (0, 2), (1, 2))])


def on_centre(volume: Tensor, band: float) -> Tensor:
    """A map moved by its :func:`centre_of_mass`, around the borders of its box."""
    return shift_volume(volume, -centre_of_mass(volume, band))


def solvent_mask(
    volume: Tensor,
    band: float,
    threshold: float = 0.15,
    margin: float = 0.035,
    edge: float = 0.05,
) -> Tensor:
    """A mask to hand on: 1 within a margin of the molecule, a raised cosine down to exactly 0.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
        White on black.
    band : float
        Cycles per box that the map is low-passed to before the cut.
    threshold : float
        Share of the low-passed map's maximum that counts as molecule.
    margin, edge : float
        Widths of the margin and of the fall as fractions of the box.

    Returns
    -------
    Tensor, shape (N, N, N)
        On the CPU; zeros if nothing stands out.
    """
    inside = standing_out(volume, band, threshold).cpu()
    if not inside.any():
        return torch.zeros(volume.shape, dtype=volume.dtype)
    away = torch.from_numpy(distance_transform_edt(~inside.numpy())) / volume.shape[-1]
    ramp = ((away - margin) / edge).clamp(0, 1)
    return (0.5 + 0.5 * torch.cos(torch.pi * ramp)).to(volume.dtype)


def standing_out(volume: Tensor, band: float, threshold: float = 0.15) -> Tensor:
    """What of a map, low-passed to a band, is above a share of its maximum; (N, N, N), bool."""
    smooth = lowpass(volume, band, 3)
    return smooth > threshold * smooth.max().clamp(min=0)


@dataclass(frozen=True)
class Support:
    """Where a map may have density: a soft sphere, and within it a mask if one is given.

    Attributes
    ----------
    radius : float
        Of the sphere, as a fraction of the box; it falls to 0 over another 0.07 of the box.
    mask : Tensor, shape (N, N, N), real, optional
        From 0 to 1; any box, of the same width in angstrom.
    """

    radius: float
    mask: Tensor | None = None

    def on(
        self, box: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Tensor:
        """The soft mask on a grid of `box` points a side."""
        ball = soft_ball(box, self.radius * box, 0.07 * box, 3, dtype, device)
        if self.mask is None:
            return ball
        mask = self.mask.to(ball)
        return ball * (mask if len(mask) == box else resample_volume(mask, box).clamp(0, 1))
