"""Whether a map has a mirror plane: the face of a reconstruction stuck between its two hands."""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.maps.sampling import shell_power
from cryorecon.physics.fourier import (
    centred_frequencies,
    fft_centred,
    ifft_centred,
    max_band,
    radius_grid,
)
from cryorecon.physics.masks import on_centre
from cryorecon.physics.rotations import so3_grid

# Planes 8 degrees apart; details of a tenth of the box side.
_NSIDE = 8
_BAND = 8.0


def mirror_score(volume: Tensor, band: float = _BAND) -> float:
    """Correlation of a map with its reflection in the best plane through its centre of mass.

    Shells are whitened, so that the correlation is not that of any two blobs.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
        White on black.
    band : float
        Cycles per box up to which the map counts.

    Returns
    -------
    float
        1 for a map with a mirror plane; cryoAI's supplement D has how one arises.
    """
    box = volume.shape[-1]
    centred = _whitened(volume.double(), min(band, float(max_band(box))))
    axis = centred_frequencies(box, volume.device).double()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    points = torch.stack([x, y, z], -1)
    inside = points.norm(dim=-1) < 0.45 * box
    points, values = points[inside], centred[inside]
    # Third rows of a rotation grid cover the sphere of normals.
    normals = so3_grid(_NSIDE, torch.float64)[0][:, 2].to(volume.device)
    normals = normals[normals[:, 2] >= 0].mul(1e6).round().unique(dim=0).div(1e6)
    best = -1.0
    for normal in normals:
        reflected = points - 2 * (points @ normal)[:, None] * normal
        grid = (reflected / (box / 2) + (1 / box if box % 2 == 0 else 0.0)).view(1, 1, 1, -1, 3)
        # align_corners=False: -1 and 1 are the outer edges; voxel N // 2 lies at 1 / N or 0.
        read = torch.nn.functional.grid_sample(
            centred[None, None], grid, mode="bilinear", align_corners=False
        ).flatten()
        best = max(best, float((read * values).sum() / (read.norm() * values.norm())))
    return best


def _whitened(volume: Tensor, band: float) -> Tensor:
    """The map about its centre of mass, every shell up to a band with the same power."""
    box = volume.shape[-1]
    transform = fft_centred(on_centre(volume, band), 3)
    gain = shell_power(transform).clamp(min=1e-300).rsqrt()
    radius = radius_grid(box, 3, volume.device)
    gain = gain[(radius + 0.5).long()] * ((radius <= band) & (radius > 0.5))
    return ifft_centred(transform * gain, 3).real
