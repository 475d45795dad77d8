"""Soft masks."""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.physics.masks import soft_ball


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
    return soft_ball(box, radius_px, edge_px, 3, dtype, device)
