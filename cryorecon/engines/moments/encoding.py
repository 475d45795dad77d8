"""Densities of views that a network reads off the moments (Khoo, Paul, Sharon 2024, section 4.2).

The given moments are the input, the weights of all quadrature nodes the output; what is optimised
are the weights of the network, with the moments' misfit. A softmax makes the output a density.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cryorecon.engines.moments.models import Density, Views
from cryorecon.networks.moment_encoders import FieldEncoder, FieldEncoderConfig

# Step of the network relative to the fit's rate.
_SLOW = 0.02


class EncodedDensity(Density):
    """Probabilities of the nodes of one quadrature, read off moments by convolutions.

    Parameters
    ----------
    first, second : Tensor, shape (channels, *grid), real
        The moments as fields over radii or Fourier pixels, of about unit size.
    views : Views
        Any stage's: all must have the same nodes.
    config : FieldEncoderConfig
    generator : torch.Generator
        On the CPU.
    """

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        views: Views,
        config: FieldEncoderConfig,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        outputs = len(views.log_weights)
        grid = tuple(first.shape[1:])
        self.network = FieldEncoder(len(first), len(second), grid, outputs, config, generator)
        self._first: Tensor
        self._second: Tensor
        self.register_buffer("_first", first[None].cpu().float(), persistent=False)
        self.register_buffer("_second", second[None].cpu().float(), persistent=False)
        self._views = views

    def rates(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimiser: networks take smaller steps."""
        return [{"params": list(self.parameters()), "lr": _SLOW * rate}]

    def probabilities(self, views: Views) -> tuple[Tensor, Tensor]:
        """Of the directions and of their antipodes, shape (q,) each; they sum to 1."""
        logits = views.log_weights + self.network(self._first, self._second)[0]
        one, other = torch.softmax(logits, 0).chunk(2)
        return one, other

    def over_uniform(self, directions: Tensor) -> Tensor:
        """The density smoothed over neighbouring nodes; 1 is uniform; shape (q,)."""
        with torch.no_grad():
            found = torch.cat(self.probabilities(self._views)).cpu()
        return smoothed(found, self._views, directions)


def smoothed(probabilities: Tensor, views: Views, directions: Tensor) -> Tensor:
    """Density of viewing directions from weights of nodes, as wide as the nodes are apart."""
    nodes, index = views.directions.cpu().double().unique(dim=0, return_inverse=True)
    nothing = torch.zeros(len(nodes), dtype=torch.float64)
    found = nothing.index_add(0, index, probabilities.cpu().double())
    uniform = nothing.index_add(0, index, views.log_weights.cpu().double().exp())
    # A bump of standard deviation s falls as exp((cos - 1) / s^2); a node has 4 pi / q.
    sharpness = len(nodes) / (4 * math.pi)
    bumps = torch.exp(sharpness * (directions.double() @ nodes.T - 1))
    return (bumps @ found) / (bumps @ uniform)
