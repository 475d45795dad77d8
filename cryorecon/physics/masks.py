"""Soft masks: about the centre of a box, and around a molecule."""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.physics.fourier import lowpass, radius_grid


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
    smooth = lowpass(volume, band, 3)
    if not smooth.max() > 0:
        return torch.ones_like(volume)
    inside = (smooth > threshold * smooth.max()).to(volume.dtype)
    reach = max(1, round(margin * box))
    grown = torch.nn.functional.max_pool3d(inside[None, None], 2 * reach + 1, 1, reach)[0, 0]
    return lowpass(grown, box / 6.4, 3, box / 8).clamp(0, 1)
