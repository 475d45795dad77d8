"""Soft masks."""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.physics.fourier import radius_grid


def soft_sphere(
    box: int,
    radius_px: float,
    edge_px: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Sphere about the centre: 1 inside `radius_px`, falling to 0 over `edge_px`.

    Returns
    -------
    Tensor, shape (N, N, N)
    """
    ramp = ((radius_grid(box, 3, device).to(dtype) - radius_px) / max(edge_px, 1e-6)).clamp(0, 1)
    return 0.5 + 0.5 * torch.cos(torch.pi * ramp)
