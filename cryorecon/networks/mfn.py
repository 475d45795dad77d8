"""Residual multiplicative filter networks whose every output is a trigonometric polynomial.

A multiplicative filter network (Fathony et al. 2021) multiplies sines of the coordinates layer by
layer, so its output is a sum of sines whose frequencies are sums of the layers' frequencies
(BACON, Lindell et al. 2022). The residual network (Shekarforoush et al. 2022, section 4) adds
skip connections between the outputs of successive scales and draws each layer's frequencies so
that they extend the band of the layer before it instead of covering it again (their eq. 7).

Here the frequencies are whole cycles per box. Each output then is a real trigonometric
polynomial of the box with a known band, and its values on any grid of ``2 band + 1`` or more
points a side hold it exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MfnConfig:
    """Shape of a residual multiplicative filter network.

    Attributes
    ----------
    bands : tuple of int
        Largest frequency along each axis, in cycles per box, of each scale's output; ascending.
    width : int
        Hidden units a layer.
    overlap : float
        lambda_1 of the paper: random spread of a layer's frequencies over the band before it.
    expansion : float
        lambda_2 of the paper: how far a layer's frequencies reach beyond the band before it.
    ndim : int
        2 for images, 3 for maps.
    n_outputs : int
        Values a point: 3 for colours.
    residual : bool
        Whether each scale's output is added to the one before it. False makes a BACON.
    initialisation : "proposed" or "bacon"
        Frequencies of the layers after the first: the paper's eq. 7, or uniform over what each
        layer adds to the band; the bands are the same.
    bias : bool
        Constant terms of the linear maps, as BACON has them.
    """

    bands: tuple[int, ...] = (3, 10, 31)
    width: int = 128
    overlap: float = 0.3
    expansion: float = 2.0
    ndim: int = 3
    n_outputs: int = 1
    residual: bool = True
    initialisation: Literal["proposed", "bacon"] = "proposed"
    bias: bool = False

    def __post_init__(self) -> None:
        if not self.bands or any(b < 1 for b in self.bands):
            raise ValueError(f"bands must be positive, got {self.bands}")
        if list(self.bands) != sorted(set(self.bands)):
            raise ValueError(f"bands must ascend, got {self.bands}")


def paper_bands(
    max_band: int, n_scales: int = 3, overlap: float = 0.3, expansion: float = 2.0
) -> tuple[int, ...]:
    """Bands that grow by ``1 + lambda_1 + lambda_2`` a scale and end at `max_band`."""
    growth = 1 + overlap + expansion
    bands = [max(1, round(max_band / growth ** (n_scales - 1 - i))) for i in range(n_scales)]
    return tuple(sorted(set(bands)))


def _half_directions(ndim: int) -> Tensor:
    """One of each pair of opposite neighbours on the lattice: 4 in two dimensions, 13 in three."""
    neighbours = [d for d in itertools.product((-1, 0, 1), repeat=ndim) if any(d)]
    return torch.tensor([d for d in neighbours if d > tuple(-c for c in d)])


def _first_frequencies(config: MfnConfig, generator: torch.Generator) -> Tensor:
    """Distinct frequencies of the ball, one of each opposite pair, lowest first.

    Whole cycles leave few frequencies at the coarsest scale; drawn independently, as the paper
    draws continuous ones, they would repeat some and miss others for good.
    """
    band = config.bands[0]
    axis = range(-band, band + 1)
    zero = (0,) * config.ndim
    ball = [f for f in itertools.product(axis, repeat=config.ndim) if f >= zero]
    ball = [f for f in ball if sum(c * c for c in f) <= band**2]
    order = torch.randperm(len(ball), generator=generator).tolist()
    ball = sorted((ball[i] for i in order), key=lambda f: sum(c * c for c in f))
    repeats = -(-config.width // len(ball))
    return torch.tensor((ball * repeats)[: config.width])


def _next_frequencies(
    config: MfnConfig, previous: int, band: int, generator: torch.Generator
) -> Tensor:
    """Frequencies of eq. 7, rounded to whole cycles and kept within ``band - previous``."""
    shape = (config.width, config.ndim)
    if config.initialisation == "bacon":
        return torch.randint(previous - band, band - previous + 1, shape, generator=generator)
    directions = _half_directions(config.ndim)
    chosen = directions[torch.randint(len(directions), (config.width,), generator=generator)]
    spread = (2 * torch.rand(shape, generator=generator) - 1) * config.overlap * previous
    reach = band - previous
    # The paper's lambda_2 assumes that bands grow by 1 + lambda_1 + lambda_2; scale it to the
    # growth asked for.
    expansion = config.expansion * reach / ((config.expansion + config.overlap) * previous)
    frequencies = expansion * previous * chosen + spread
    return frequencies.round().clamp(-reach, reach).to(torch.int64)


class ResidualMfn(nn.Module):
    """Residual multiplicative filter network with an output per scale.

    ``z_1 = g_1(x)``, ``z_i = g_i(x) * (W_i z_{i-1})``, ``y_i = y_{i-1} + w_i . z_i`` with filters
    ``g_i(x) = sin(2 pi f_i x + phi_i)``; frequencies f are fixed whole cycles per box, phases and
    linear maps are trained (Shekarforoush et al. 2022, eqs. 1-3, 7, 8). Without the sum over
    scales and with biases it is BACON (Lindell et al. 2022).

    Parameters
    ----------
    config : MfnConfig
    generator : torch.Generator
        Draws frequencies, phases and weights.
    """

    def __init__(self, config: MfnConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        frequencies = [_first_frequencies(config, generator)]
        for previous, band in itertools.pairwise(config.bands):
            frequencies.append(_next_frequencies(config, previous, band, generator))
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.stack(frequencies))
        n_scales, width = len(config.bands), config.width

        def uniform(*shape: int, limit: float) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(*shape, generator=generator) - 1) * limit)

        self.phases = uniform(n_scales, width, limit=math.pi)
        limit = math.sqrt(6 / width)
        self.hidden = uniform(n_scales - 1, width, width, limit=limit)
        self.readout = uniform(n_scales, config.n_outputs, width, limit=limit)
        self.hidden_bias = self.readout_bias = None
        if config.bias:
            self.hidden_bias = nn.Parameter(torch.zeros(n_scales - 1, width))
            self.readout_bias = nn.Parameter(torch.zeros(n_scales, config.n_outputs))

    def forward(
        self, points: Tensor, n_scales: int | None = None, trained: int | None = None
    ) -> list[Tensor]:
        """Outputs of the first `n_scales` scales at given points.

        Parameters
        ----------
        points : Tensor, shape (p, ndim)
            Coordinates (x, y, z) in boxes: the origin of the box at 0, its edges at +-1/2.
        trained : int, optional
            The only scale, 0-based, through whose output gradients reach the hidden layers; the
            others train their own linear output alone.

        Returns
        -------
        list of Tensor, shape (p, n_outputs)
            The output of each scale; cumulative in a residual network.
        """
        count = n_scales or len(self.config.bands)
        frequencies = self.frequencies.to(points.dtype)
        hidden = points.new_zeros(())
        outputs: list[Tensor] = []
        for scale in range(count):
            angle = torch.addmm(self.phases[scale], points, frequencies[scale].T, alpha=2 * math.pi)
            filters = torch.sin(angle)
            hidden = filters if scale == 0 else filters * self._mixed(hidden, scale - 1)
            shown = hidden if trained in (None, scale) else hidden.detach()
            output = shown @ self.readout[scale].T
            if self.readout_bias is not None:
                output = output + self.readout_bias[scale]
            if self.config.residual and outputs:
                output = outputs[-1] + output
            outputs.append(output)
        return outputs

    def _mixed(self, hidden: Tensor, layer: int) -> Tensor:
        mixed = hidden @ self.hidden[layer].T
        return mixed if self.hidden_bias is None else mixed + self.hidden_bias[layer]


def grid_points(size: int, ndim: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Coordinates, in boxes, of a centred grid of `size` points a side; shape (size^ndim, ndim).

    Rows run like a flattened [z, y, x] array; columns are (x, y, z).
    """
    axis = (torch.arange(size, dtype=dtype, device=device) - size // 2) / size
    grids = torch.meshgrid(*([axis] * ndim), indexing="ij")
    return torch.stack([g.flatten() for g in reversed(grids)], -1)


def smallest_grid(band: int) -> int:
    """Points a side that hold a polynomial of this band exactly, with a fast FFT length."""
    size = 2 * band + 1
    while max(_prime_factors(size)) > 5:
        size += 1
    return size


def _prime_factors(number: int) -> Sequence[int]:
    factors, p = [1], 2
    while number > 1:
        while number % p == 0:
            factors.append(p)
            number //= p
        p += 1
    return factors
