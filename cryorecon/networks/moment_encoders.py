"""Networks from moments to a signal or a density of shifts (Khoo, Paul, Sharon 2024, figure A.11).

Two branches of periodic one-dimensional convolutions, one for each moment, are stacked to one
field, which goes through more convolutions and ends in fully connected layers. For moments of
images the fields lie over radii or over Fourier pixels (their appendix A.2), which is not periodic.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Layout = Literal["rows", "diagonals"]
_SLOPE = 0.02


@dataclass(frozen=True)
class MomentEncoderConfig:
    """Shape of an encoder.

    Attributes
    ----------
    n : int
        Points of the signal.
    domain : "fourier" or "samples"
        Moments over frequencies, real and imaginary parts as channels of their own, as in the
        paper; or over samples.
    layout : "rows" or "diagonals"
        Channel c at position k is entry (k, c) of the second moment, as in the paper; or entry
        (k, k + c), with which shifted observations move the field along its positions.
    branch : tuple of int
        Channels of each branch's convolutions.
    merged : tuple of int
        Channels of the convolutions after stacking.
    hidden : tuple of int
        Units of the fully connected layers before the output.
    kernel : int
        Window of the convolutions, odd.
    output : "signal" or "density"
        A density is a softmax: positive, sum 1.
    """

    n: int = 32
    domain: Literal["fourier", "samples"] = "fourier"
    layout: Layout = "rows"
    branch: tuple[int, ...] = (16, 8)
    merged: tuple[int, ...] = (8,)
    hidden: tuple[int, ...] = (256, 256)
    kernel: int = 3
    output: Literal["signal", "density"] = "signal"

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0 or self.kernel > self.n or self.n < 4:
            raise ValueError("needs an odd kernel no wider than n, and n of 4 or more")

    def weight_count(self) -> int:
        """Weights and biases of the network, without making it."""
        parts = 2 if self.domain == "fourier" else 1
        merged = (2 * self.branch[-1], *self.merged)
        dense = (self.n * merged[-1], *self.hidden, self.n)
        convolved = ((parts, *self.branch), (parts * self.n, *self.branch), merged)
        return sum(
            n_out * (n_in * kernel + 1)
            for kernel, chains in ((self.kernel, convolved), (1, (dense,)))
            for widths in chains
            for n_in, n_out in itertools.pairwise(widths)
        )


class PeriodicConvolution(nn.Module):
    """One-dimensional convolution of a periodic field, channels last.

    One matrix product over the windows of all positions: on such short fields several times faster
    than torch's own convolution.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__()
        self.reach = kernel // 2
        self.linear = nn.Linear(n_in * kernel, n_out)

    def forward(self, values: Tensor) -> Tensor:
        """Shape (b, n, n_in) to (b, n, n_out)."""
        offsets = range(self.reach, -self.reach - 1, -1)
        windows = torch.cat([values.roll(offset, 1) for offset in offsets], -1)
        return self.linear(windows)


class MomentEncoder(nn.Module):
    """Moments in, n numbers out.

    Parameters
    ----------
    config : MomentEncoderConfig
    generator : torch.Generator
        Draws the weights.
    """

    def __init__(self, config: MomentEncoderConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        n, parts = config.n, 2 if config.domain == "fourier" else 1
        self.upper = _convolutions((parts, *config.branch), config.kernel)
        self.lower = _convolutions((parts * n, *config.branch), config.kernel)
        stacked = 2 * config.branch[-1]
        self.merged = _convolutions((stacked, *config.merged), config.kernel)
        width = n * (stacked, *config.merged)[-1]
        self.dense = _dense((width, *config.hidden, n))
        index = torch.arange(n)
        self._columns: Tensor
        columns = (
            (index[:, None] + index) % n if config.layout == "diagonals" else index.expand(n, n)
        )
        self.register_buffer("_columns", columns.contiguous(), persistent=False)
        self._draw(generator)

    def _draw(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, _SLOPE, generator=generator)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.dense[-1].weight.mul_(0.3)  # type: ignore[operator]

    def field(self, first: Tensor, second: Tensor) -> Tensor:
        """The field before the fully connected layers, shape (b, n, channels).

        With layout "diagonals" over samples it follows shifts of the observations.

        Parameters
        ----------
        first, second : Tensor, shapes (b, n) and (b, n, n)
            Complex over frequencies, real over samples, as the domain asks.
        """
        columns = self._columns.expand(len(second), -1, -1)
        upper = self.upper(_channels(first[:, :, None]))
        lower = self.lower(_channels(second.gather(2, columns)))
        return self.merged(torch.cat([upper, lower], -1))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Values of the signal or probabilities of the shifts, shape (b, n)."""
        values: Tensor = self.dense(self.field(first, second).flatten(1))
        return values.softmax(-1) if self.config.output == "density" else values


def _channels(values: Tensor) -> Tensor:
    """Shape (b, n, c), real or complex, to real channels, shape (b, n, c or 2 c)."""
    return torch.cat([values.real, values.imag], -1) if values.is_complex() else values


def _convolutions(channels: tuple[int, ...], kernel: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(channels):
        layers += [PeriodicConvolution(n_in, n_out, kernel), nn.LeakyReLU(_SLOPE)]
    return nn.Sequential(*layers)


def _dense(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.LeakyReLU(_SLOPE)]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class FieldEncoderConfig:
    """Shape of a `FieldEncoder`.

    Attributes
    ----------
    branch, merged : tuple of int
        Channels of each branch's convolutions, and of those after stacking.
    hidden : tuple of int
        Units of the fully connected layers before the output.
    kernel : int
        Window of the convolutions, odd.
    """

    branch: tuple[int, ...] = (16, 8, 3)
    merged: tuple[int, ...] = (6, 6)
    hidden: tuple[int, ...] = (128,)
    kernel: int = 5


class FieldEncoder(nn.Module):
    """Two fields over one grid in, a list of numbers out: figure A.11 with any grid.

    Parameters
    ----------
    first, second : int
        Channels of the two fields.
    grid : tuple of int
        Points of their grid along one or two axes.
    outputs : int
    config : FieldEncoderConfig
    generator : torch.Generator
        Draws the weights. The outputs of fresh ones are small.
    """

    def __init__(
        self,
        first: int,
        second: int,
        grid: tuple[int, ...],
        outputs: int,
        config: FieldEncoderConfig,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        axes = len(grid)
        self.upper = _grid_convolutions((first, *config.branch), config.kernel, axes)
        self.lower = _grid_convolutions((second, *config.branch), config.kernel, axes)
        stacked = 2 * config.branch[-1]
        self.merged = _grid_convolutions((stacked, *config.merged), config.kernel, axes)
        width = math.prod(grid) * (stacked, *config.merged)[-1]
        self.dense = _dense((width, *config.hidden, outputs))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                nn.init.kaiming_normal_(module.weight, _SLOPE, generator=generator)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.dense[-1].weight.mul_(0.1)  # type: ignore[operator]

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Shapes (b, channels, *grid) to (b, outputs)."""
        both = torch.cat([self.upper(first), self.lower(second)], 1)
        values: Tensor = self.dense(self.merged(both).flatten(1))
        return values


def _grid_convolutions(channels: tuple[int, ...], kernel: int, axes: int) -> nn.Sequential:
    layer = nn.Conv1d if axes == 1 else nn.Conv2d
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(channels):
        layers += [layer(n_in, n_out, kernel, padding=kernel // 2), nn.LeakyReLU(_SLOPE)]
    return nn.Sequential(*layers)
