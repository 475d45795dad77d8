"""Periodic mixtures of Gaussians on the unit interval, drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixtureConfig:
    """A family of mixtures (Khoo, Paul, Sharon 2024, section 5.1.1, which names no ranges).

    Attributes
    ----------
    components : int
        Gaussians a mixture.
    narrowest, widest : float
        Standard deviations are uniform between them; the period is 1.
    lowest : float
        Heights are uniform between this and 1.
    """

    components: int = 2
    narrowest: float = 0.04
    widest: float = 0.12
    lowest: float = 0.5

    def __post_init__(self) -> None:
        if self.components < 1 or not 0 < self.narrowest <= self.widest <= 0.5:
            raise ValueError("needs a component and widths in (0, 0.5]")
        if not 0 < self.lowest <= 1:
            raise ValueError("needs heights in (0, 1]")


def draw_mixtures(
    config: MixtureConfig,
    count: int,
    n: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mixtures at n equally spaced points of the period, shape (count, n).

    Centres are uniform; each Gaussian is summed over the periods it reaches.
    """
    uniform = torch.rand(3, count, config.components, 1, generator=generator, dtype=dtype)
    centre = uniform[0]
    width = config.narrowest + (config.widest - config.narrowest) * uniform[1]
    height = config.lowest + (1 - config.lowest) * uniform[2]
    x = torch.arange(n, dtype=dtype) / n
    # Centres and points lie in [0, 1): nearest images are at -1, 0 and 1; wide ones reach 2.
    reach = 1 + int(6 * config.widest)
    total = torch.zeros(count, n, dtype=dtype)
    for period in range(-reach, reach + 1):
        away = (x - centre + period) / width
        total += (height * torch.exp(-away.square() / 2)).sum(1)
    return total
