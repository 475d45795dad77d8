"""An explicit grid as the map: what the network is measured against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.least_squares import wiener_map
from cryorecon.networks.mfn import smallest_grid
from cryorecon.physics.fourier import lowpass
from cryorecon.physics.masks import Support
from cryorecon.physics.resampling import resample_sums


class GridMap:
    """The Wiener solution of the normal equations itself, within a soft spherical mask.

    Parameters
    ----------
    bands : tuple of int
        Cycles per box of each scale, ascending.
    support : Support
        Where the map may have density.
    """

    def __init__(self, bands: tuple[int, ...], support: Support) -> None:
        self.bands = bands
        self.support = support
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
        return resample_sums(values, size)

    def fit(
        self, sums: NormalEquations, prior: Tensor, scale: int, n_steps: int | None = None
    ) -> None:
        """Take the solution of the normal equations; `n_steps` is for networks."""
        del n_steps
        size = self.grid_size(scale)
        mask = self.support.on(size, prior.dtype, prior.device)
        self._volumes[scale] = wiener_map(sums, prior, size) * mask

    def fit_volume(
        self, target: Tensor, scale: int, n_steps: int, n_points: int, generator: torch.Generator
    ) -> None:
        """Take a map; the other arguments are for networks."""
        del n_steps, n_points, generator
        self._volumes[scale] = lowpass(target, self.bands[scale], 3)

    def state(self) -> dict[str, Any]:
        """The maps of the scales, by reference."""
        return {"volumes": dict(self._volumes)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._volumes = dict(state["volumes"])

    def to(self, device: torch.device | str) -> GridMap:
        """Take the maps to a device."""
        self._volumes = {scale: volume.to(device) for scale, volume in self._volumes.items()}
        return self
