"""Spatially adaptive progressive encoding (SAPE, Hertz et al. 2021): a rival for image fitting."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn


class Sape(nn.Module):
    """A ReLU network on Fourier features that are let in from coarse to fine, point by point.

    Feature i of n, sorted by frequency, enters with weight ``clamp(progress * n - i, 0, 1)``,
    where the progress of each point lies in [0, 1] and is the caller's business.

    Parameters
    ----------
    band : int
        Nyquist frequency of the training grid, in cycles per box; frequencies are normal with an
        eighth of it as standard deviation.
    n_frequencies, width, n_layers : int
        Size of the encoding and of the network.
    ndim, n_outputs : int
    generator : torch.Generator
    """

    def __init__(
        self,
        band: int,
        n_frequencies: int,
        width: int,
        n_layers: int,
        ndim: int,
        n_outputs: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        frequencies = torch.randn(n_frequencies, ndim, generator=generator) * (band / 8)
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies[frequencies.norm(dim=-1).argsort()])
        sizes = [ndim + 2 * n_frequencies, *[width] * n_layers, n_outputs]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            limit = math.sqrt(6 / fan_in)
            draw = 2 * torch.rand(fan_out, fan_in, generator=generator) - 1
            self.weights.append(nn.Parameter(draw * limit))
            self.biases.append(nn.Parameter(torch.zeros(fan_out)))

    def forward(self, points: Tensor, progress: Tensor) -> Tensor:
        """Values at points.

        Parameters
        ----------
        points : Tensor, shape (p, ndim)
            In boxes, as in :class:`cryorecon.networks.mfn.ResidualMfn`.
        progress : Tensor, shape (p,)

        Returns
        -------
        Tensor, shape (p, n_outputs)
        """
        count = len(self.frequencies)
        gate = progress[:, None] * count - torch.arange(count).to(progress)
        gate = gate.clamp(0, 1)
        angle = 2 * math.pi * points @ self.frequencies.to(points.dtype).T
        hidden = torch.cat([points, torch.sin(angle) * gate, torch.cos(angle) * gate], -1)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.addmm(bias, hidden, weight.T)
            hidden = hidden if layer == last else torch.relu(hidden)
        return hidden
