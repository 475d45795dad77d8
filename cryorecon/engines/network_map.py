"""A residual multiplicative filter network as the map: fitted to normal equations, not images.

The weighted least-squares distance between the network's transform and the images' normal
equations has the same gradient as the sum over images, up to the diagonal approximation that
gridding makes. So a structure step costs one network evaluation on the smallest grid that holds
its band, however many images the sums stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.adam import Adam
from cryorecon.engines.observations import taken_to
from cryorecon.networks.mfn import MfnConfig, ResidualMfn, grid_points, smallest_grid
from cryorecon.physics.fourier import crop_or_pad_centred
from cryorecon.physics.masks import Support
from cryorecon.physics.projection import Transform, gridded_transform, to_volume

# Cycles per box that a scale's grid holds beyond its band.
GRID_MARGIN = 2
# Of a network that is evaluated once, whatever the box.
_POINTS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class FitConfig:
    """How the network follows the normal equations.

    Attributes
    ----------
    learning_rate : float
        Of Adam.
    n_steps : int
        Structure steps a call.
    """

    learning_rate: float = 3e-2
    n_steps: int = 4


@dataclass(frozen=True)
class _Ball:
    """Points of a grid where the map may have density, with the mask there and their rows."""

    points: Tensor
    weight: Tensor
    rows: Tensor


class NetworkMap:
    """The network with its optimiser, mask and scale.

    Parameters
    ----------
    config : MfnConfig
    support : Support
        Where the map may have density.
    generator : torch.Generator
        On the CPU; draws the network.
    device : torch.device or str
        Where the network lives.
    """

    def __init__(
        self,
        config: MfnConfig,
        support: Support,
        generator: torch.Generator,
        fit: FitConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.fit_config = fit or FitConfig()
        self.network = ResidualMfn(config, generator).to(device)
        self.optimizer = Adam(self.network.parameters(), self.fit_config.learning_rate)
        self.support = support
        self.scale = 1.0
        self._fitted = False
        self._balls: dict[int, _Ball] = {}

    @property
    def bands(self) -> tuple[int, ...]:
        """Cycles per box of each scale, ascending."""
        return self.network.config.bands

    def grid_size(self, scale: int) -> int:
        """Points a side that hold scale `scale` (0-based), with room for the mask's edge."""
        return smallest_grid(self.bands[scale] + GRID_MARGIN)

    def volume(self, scale: int, box: int | None = None) -> Tensor:
        """The map of one scale on a grid of `box` points a side; sums over a voxel's share."""
        size = box or self.grid_size(scale)
        ball = self._balls.get(size) or self._ball(size)
        if box is None:  # Structure steps come again and again.
            self._balls[size] = ball
        parts = ball.points.split(len(ball.points) if box is None else _POINTS_AT_ONCE)
        density = torch.cat([self.network(some, scale + 1)[-1][:, 0] for some in parts])
        density = density * ball.weight * (self.scale * (self.grid_size(0) / size) ** 3)
        return density.new_zeros(size**3).index_copy(0, ball.rows, density).view(size, size, size)

    def _ball(self, size: int) -> _Ball:
        parameter = self.network.phases
        points = grid_points(size, 3, parameter.dtype, parameter.device)
        weight = self.support.on(size, parameter.dtype, parameter.device).flatten()
        rows = weight.nonzero()[:, 0]
        return _Ball(points[rows], weight[rows], rows)

    def fit(
        self, sums: NormalEquations, prior: Tensor, scale: int, n_steps: int | None = None
    ) -> Tensor:
        """Structure steps towards the normal equations; returns the relative loss before them.

        A tensor without axes: as a number it would have to be waited for.

        Parameters
        ----------
        sums : NormalEquations
        prior : Tensor, shape (n_shells,)
            Added to the weights, as in :meth:`NormalEquations.solve`.
        scale : int
            Which output is fitted, 0-based; coarser layers go on training.
        """
        target = sums.solve(prior)
        shells = sums.shells()
        inside = shells < len(prior)
        weight = sums.symmetrised().weight + prior.to(sums.weight)[shells.clamp(max=len(prior) - 1)]
        weight = torch.where(inside, weight, torch.zeros_like(weight))
        norm = (weight * target.values.abs() ** 2).sum().clamp(min=1e-30)
        if not self._fitted:
            self.match_scale(target, scale)
        first = norm.new_zeros(())
        for step in range(n_steps or self.fit_config.n_steps):
            predicted = gridded_transform(self.volume(scale), target.padding).values
            predicted = crop_or_pad_centred(predicted, target.values.shape[-1], 3)
            loss = (weight * (predicted - target.values).abs() ** 2).sum() / norm
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            first = loss.detach() if step == 0 else first
        return first

    def fit_volume(
        self, target: Tensor, scale: int, n_steps: int, n_points: int, generator: torch.Generator
    ) -> float:
        """Fit one scale to a map by stochastic regression on points within the mask.

        Cheaper than :meth:`fit` for a fine scale, where a whole grid is large.

        Parameters
        ----------
        target : Tensor, shape (N, N, N)
            Already limited to the scale's band; sums over a voxel's share.
        n_points : int
            Points a step.

        Returns
        -------
        float
            Mean relative squared residual of the last step.
        """
        box = target.shape[-1]
        if not self._fitted:
            with torch.no_grad():
                drawn = self.volume(scale, box).norm().clamp(min=1e-30)
            self.scale *= float(target.norm() / drawn)
            self._fitted = True
        ball = self._ball(box)
        values = target.flatten()[ball.rows] / (self.scale * (self.grid_size(0) / box) ** 3)
        norm = values.square().mean().clamp(min=1e-30)
        loss = torch.zeros(())
        for _ in range(n_steps):
            draw = torch.randint(len(ball.rows), (n_points,), generator=generator)
            rows = taken_to(draw, ball.rows.device)
            residual = self.network(ball.points[rows], scale + 1)[-1][:, 0] - values[rows]
            loss = residual.square().mean() / norm
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return float(loss.detach())

    def match_scale(self, target: Transform, scale: int) -> None:
        """Give the untrained network the power of a map's transform."""
        with torch.no_grad():
            wanted = to_volume(target, self.grid_size(scale)).norm()
            self.scale *= float(wanted / self.volume(scale).norm().clamp(min=1e-30))
        self._fitted = True

    def state(self) -> dict[str, Any]:
        """All that training has changed, by reference."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state(),
            "scale": self.scale,
            "fitted": self._fitted,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load(state["optimizer"])
        self.scale, self._fitted = state["scale"], state["fitted"]
