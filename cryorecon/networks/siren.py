"""Coordinate networks that hold a map's Fourier transform (cryoAI, Levy et al. 2022, section 3.4).

All are functions from a frequency to a complex number, made Hermitian by folding frequencies into
one half of space, so that the map they stand for is real.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

FourierKind = Literal["fouriernet", "siren", "positional"]

_FIRST_OMEGA_MANTISSA = 40.0
_FIRST_OMEGA_EXPONENT = 30.0
# exp() of more than this much would overflow the squares of float32 in sums over shells.
_LARGEST_EXPONENT = 30.0


class Siren(nn.Module):
    """Sinusoidal representation network (Sitzmann et al. 2020): 3 numbers to 2.

    Parameters
    ----------
    n_hidden : int
        Hidden layers after the first.
    width : int
    omega : float
        Scale of every sine's argument.
    generator : torch.Generator
    """

    def __init__(self, n_hidden: int, width: int, omega: float, generator: torch.Generator) -> None:
        super().__init__()
        self.omega = omega
        sizes = [3] + [width] * (n_hidden + 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.last = nn.Linear(width, 2)
        for number, layer in enumerate([*self.layers, self.last]):
            limit = 1 / 3 if number == 0 else math.sqrt(6 / width) / omega
            nn.init.uniform_(layer.weight, -limit, limit, generator=generator)
            nn.init.uniform_(layer.bias, -limit, limit, generator=generator)

    def forward(self, points: Tensor) -> Tensor:
        """Shape (..., 3) in [-1, 1] to (..., 2)."""
        hidden = points
        for layer in self.layers:
            hidden = torch.sin(self.omega * layer(hidden))
        return self.last(hidden)


class FourierNet(nn.Module):
    """A SIREN's two numbers times the exponentials of another's: many orders of magnitude.

    Section 3.4 and supplement C.3: 3 and 2 hidden layers, 256 units; the frequencies of the sines
    are those of the published code.
    """

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.mantissa = Siren(3, width, _FIRST_OMEGA_MANTISSA, generator)
        self.exponent = Siren(2, width, _FIRST_OMEGA_EXPONENT, generator)

    def forward(self, points: Tensor) -> Tensor:
        """Shape (..., 3) in [-1, 1] to (..., 2); finite whatever the weights."""
        power = self.exponent(points).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
        return torch.exp(power) * self.mantissa(points)


class PositionalMlp(nn.Module):
    """Sines and cosines of octaves of each coordinate into a ReLU network, as in cryoDRGN."""

    def __init__(self, width: int, n_octaves: int, generator: torch.Generator) -> None:
        super().__init__()
        self.octaves: Tensor
        self.register_buffer("octaves", math.pi * 2.0 ** torch.arange(n_octaves))
        sizes = [6 * n_octaves, width, width, width, 2]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(sizes):
            layer = nn.Linear(n_in, n_out)
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, points: Tensor) -> Tensor:
        """Shape (..., 3) in [-1, 1] to (..., 2)."""
        angles = (points[..., None] * self.octaves.to(points.dtype)).flatten(-2)
        return self.layers(torch.cat([torch.sin(angles), torch.cos(angles)], -1))


def fourier_network(
    kind: FourierKind, width: int, reach: int, generator: torch.Generator
) -> nn.Module:
    """A network of one kind.

    Parameters
    ----------
    width : int
        Hidden units a layer; 256 in the paper.
    reach : int
        Largest frequency in cycles per box, which sets how many octaves a positional encoding has.
    """
    if kind == "fouriernet":
        return FourierNet(width, generator)
    if kind == "siren":
        return Siren(3, width, _FIRST_OMEGA_MANTISSA, generator)
    return PositionalMlp(width, max(1, math.ceil(math.log2(max(reach, 2)))), generator)


class HermitianField(nn.Module):
    """The transform of a real map: ``F(-k) = conj F(k)`` (eq. 7 of the paper), F(0) real.

    Parameters
    ----------
    network : nn.Module
        From (..., 3) in [-1, 1] to (..., 2).
    reach : float
        Frequency, in cycles per box, that is 1 to the network.
    """

    def __init__(self, network: nn.Module, reach: float) -> None:
        super().__init__()
        self.network, self.reach = network, reach

    def forward(self, frequencies: Tensor) -> Tensor:
        """Values at frequencies in cycles per box; (..., 3) real to (...) complex."""
        x, y, z = frequencies.unbind(-1)
        lower = (x < 0) | ((x == 0) & ((y < 0) | ((y == 0) & (z < 0))))
        sign = torch.where(lower, -1.0, 1.0).to(frequencies.dtype)
        real, imaginary = self.network(frequencies * (sign[..., None] / self.reach)).unbind(-1)
        origin = (x == 0) & (y == 0) & (z == 0)
        return torch.complex(real, torch.where(origin, 0.0, imaginary * sign))
