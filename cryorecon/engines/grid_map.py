"""An explicit grid as the map: what the network is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.networks.mfn import smallest_grid
from cryorecon.physics.fourier import crop_or_pad_centred, fft_centred, ifft_centred, lowpass
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.projection import to_volume


class GridMap:
    """The Wiener solution of the normal equations itself, within a soft spherical mask.

    Parameters
    ----------
    bands : tuple of int
        Cycles per box of each scale, ascending.
    mask_radius : float
        Radius of the mask as a fraction of the box.
    """

    def __init__(self, bands: tuple[int, ...], mask_radius: float) -> None:
        self.bands = bands
        self.mask_radius = mask_radius
        self._volumes: dict[int, Tensor] = {}

    def grid_size(self, scale: int) -> int:
        """Points a side that hold scale `scale` (0-based), with room for the mask's edge."""
        return smallest_grid(self.bands[scale] + 2)

    def volume(self, scale: int, box: int | None = None) -> Tensor:
        """The map of one scale on a grid of `box` points a side; sums over a voxel's share."""
        values = self._volumes[scale]
        size = box or self.grid_size(scale)
        if size == len(values):
            return values
        return ifft_centred(crop_or_pad_centred(fft_centred(values, 3), size, 3), 3).real

    def fit(
        self, sums: NormalEquations, prior: Tensor, scale: int, n_steps: int | None = None
    ) -> None:
        """Take the solution of the normal equations; `n_steps` is for networks."""
        del n_steps
        size = self.grid_size(scale)
        mask = soft_ball(size, self.mask_radius * size, 0.07 * size, 3, prior.dtype, prior.device)
        self._volumes[scale] = to_volume(sums.solve(prior), size) * mask

    def fit_volume(
        self, target: Tensor, scale: int, n_steps: int, n_points: int, generator: torch.Generator
    ) -> None:
        """Take a map; the other arguments are for networks."""
        del n_steps, n_points, generator
        self._volumes[scale] = lowpass(target, self.bands[scale], 3)
