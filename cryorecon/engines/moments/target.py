"""What steerable moments ask of a fit: entries up to a radius, with their weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from cryorecon.engines.moments.forms import SteerableMoments
from cryorecon.engines.moments.third import ThirdTarget
from cryorecon.physics.polar import PolarGrid


@dataclass(frozen=True)
class Target:
    """Moments up to a radius, with the weight of each entry.

    Attributes
    ----------
    grid : PolarGrid
        Circles in cycles per particle box.
    first, second : Tensor, shape (K,) and (M + 1, K, K)
    first_weight, second_weight : Tensor, real, same shapes
        Inverse variances; orders above 0 count twice.
    power : Tensor, shape (K,)
        Of each radius, over all orders.
    third : ThirdTarget, optional
    """

    grid: PolarGrid
    first: Tensor
    second: Tensor
    first_weight: Tensor
    second_weight: Tensor
    power: Tensor
    third: ThirdTarget | None = field(default=None, kw_only=True)

    @staticmethod
    def of(
        moments: SteerableMoments, radius: int, model_error: float, third_radius: int = 0
    ) -> Target:
        """Moments of radii 1 to `radius`, of the angular orders that they hold.

        Third moments, if there are any, of radii to `third_radius`.
        """
        whole, k = moments.geometry, radius
        order = min(whole.order_at(k), whole.max_order)
        grid = replace(whole, max_radius=k, max_order=order).map_grid()
        second = moments.second[: order + 1, :k, :k]
        error = moments.second_error[: order + 1, :k, :k]
        twice = torch.full((order + 1, 1, 1), 2.0, dtype=torch.float64)
        twice[0] = 1
        diagonal = (twice * second).diagonal(dim1=-2, dim2=-1).real.sum(0)
        noise = (twice * error).diagonal(dim1=-2, dim2=-1).square().sum(0).sqrt()
        power = torch.maximum(diagonal, noise.nan_to_num(posinf=0.0)).clamp(min=1e-30)
        floor = model_error**2
        by_first = 1 / (moments.first_error[:k] ** 2 + floor * power)
        by_second = twice / (error**2 + floor * power[:, None] * power)
        third, reach = None, min(k, whole.third_radius, third_radius)
        if reach and moments.third is not None and moments.third_error is not None:
            orders = [min(whole.order_at(r), order) for r in range(1, reach + 1)]
            args = (moments.third, moments.third_error, power[:reach], orders, model_error)
            third = ThirdTarget.of(*args)
        return Target(grid, moments.first[:k], second, by_first, by_second, power, third=third)

    def to(self, device: str) -> Target:
        """Single precision on a device."""
        parts = (self.first, self.second, self.first_weight, self.second_weight, self.power)
        single = [p.to(device, torch.complex64 if p.is_complex() else torch.float32) for p in parts]
        moved = Target(self.grid, *single)
        return moved if self.third is None else replace(moved, third=self.third.to(device))

    def misfit(self, first: Tensor, second: Tensor, third: Tensor | None = None) -> Tensor:
        """Weighted squares of what is left of the moments."""
        one = (self.first_weight * (first - self.first) ** 2).sum()
        two = (self.second_weight * (second - self.second).abs().square()).sum()
        if self.third is None or third is None:
            return one + two
        # The second's entries off the diagonal stand there twice.
        return one + two + 2 * self.third.misfit(third)

    def whitened(self, first: Tensor, second: Tensor, third: Tensor | None = None) -> Tensor:
        """The moments in units of their standard errors, real and imaginary parts; float64."""
        # Orders -m and the other triangle say the same again: half weight, but for k = k', m = 0.
        share = torch.full_like(self.second_weight, 0.5)
        share[0].fill_diagonal_(1.0)
        root = (share * self.second_weight).sqrt()
        parts = (self.first_weight.sqrt() * first, root * second.real, root * second.imag)
        flat = [part.double().flatten() for part in parts]
        if self.third is not None and third is not None:
            flat.append(self.third.whitened(third))
        return torch.cat(flat)

    def total(self, second: Tensor) -> Tensor:
        """Power that a map's amplitude is first set by."""
        return second[0].diagonal().real.sum()

    def fields(self) -> tuple[Tensor, Tensor]:
        """Both moments over the radii, every radius of power 1: what an encoder reads.

        Shapes (1, K) and (2 (M + 1) K, K): order, part and other radius are channels.
        """
        by = self.power.rsqrt()
        second = (self.second * by[:, None] * by).nan_to_num()
        return (self.first * by)[None], torch.view_as_real(second).permute(0, 3, 2, 1).flatten(0, 2)

    @cached_property
    def count(self) -> float:
        """Real and imaginary parts of all measured entries: the scale of a misfit."""
        third = 2 * self.third.count if self.third is not None else 0.0
        return len(self.first) + 2 * float((self.second_weight > 0).sum()) + third

    def relative(
        self, first: Tensor, second: Tensor, *_: Tensor, white: bool
    ) -> tuple[float, float]:
        """Relative Frobenius errors of the first two, every radius of equal power or by area."""
        radii = self.grid.radii.to(self.power)
        by = 1 / self.power.sqrt() if white else radii.sqrt()
        pair = (self.second_weight > 0) * (by[:, None] * by) ** 2
        pair = (
            pair * torch.where(torch.arange(len(pair), device=by.device) > 0, 2, 1)[:, None, None]
        )
        one = (by**2 * (first - self.first) ** 2).sum() / (by**2 * self.first**2).sum()
        left = (pair * (second - self.second).abs() ** 2).sum()
        two = left / (pair * self.second.abs() ** 2).sum()
        return float(one) ** 0.5, float(two) ** 0.5
