"""Soft masks about the centre of a box, for images and maps alike."""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.physics.fourier import radius_grid


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
