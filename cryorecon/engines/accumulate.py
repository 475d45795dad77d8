"""Normal equations of a map: what images with known poses say of its transform.

Every image adds its CTF-weighted coefficients to ``signal`` and its CTF^2 over noise to
``weight`` on an oversampled grid; ``signal / (weight + prior)`` is the Wiener estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.physics import points
from cryorecon.physics.fourier import HalfPlane, centred_frequencies, radius_grid, shell_sums
from cryorecon.physics.projection import Transform, reach

# Planes of a grid that are looked at together.
_PLANES = 16


def shells_of_squares(largest: int, padding: int, device: torch.device) -> Tensor:
    """Shell, in cycles per box, of grid points by their squared distance from the origin.

    Parameters
    ----------
    largest : int
        Of the squares, in squared steps of the grid.
    padding : int
        Steps a cycle per box.

    Returns
    -------
    Tensor, shape (largest + 1,), int64
    """
    squares = torch.arange(largest + 1, dtype=torch.float64, device=device)
    return squares.sqrt_().div_(padding).add_(0.5).long()


@dataclass
class NormalEquations:
    """Sums over images on a centred grid of P points a side, P even.

    Attributes
    ----------
    signal : Tensor, shape (P, P, P), complex
    weight : Tensor, shape (P, P, P), real
        Inverse of the noise variance of each coefficient.
    padding : int
        Oversampling factor: steps of ``1 / padding`` cycles per box.
    """

    signal: Tensor
    weight: Tensor
    padding: int

    @staticmethod
    def empty(
        band: float, padding: int, dtype: torch.dtype, device: torch.device | str
    ) -> NormalEquations:
        """Nothing seen yet; reaches as far as `band` cycles per box."""
        size = reach(band, padding)
        signal = torch.zeros(size, size, size, dtype=dtype.to_complex(), device=device)
        return NormalEquations(signal, torch.zeros_like(signal.real), padding)

    def add(self, signal: Tensor, weight: Tensor, rotations: Tensor, plane: HalfPlane) -> None:
        """Insert slices.

        Parameters
        ----------
        signal : Tensor, shape (b, m), complex
            ``precision * CTF * Y``, offsets undone.
        weight : Tensor, shape (b, m), real
            ``precision * CTF^2``.
        rotations : Tensor, shape (b, 3, 3)
        """
        points.add([(signal, self.signal), (weight, self.weight)], rotations, plane, self.padding)

    def scaled(self, factor: float) -> NormalEquations:
        """The same sums times a factor."""
        return NormalEquations(self.signal * factor, self.weight * factor, self.padding)

    def plus(self, other: NormalEquations) -> NormalEquations:
        """Sums over both sets of images."""
        return NormalEquations(self.signal + other.signal, self.weight + other.weight, self.padding)

    def symmetrised(self) -> NormalEquations:
        """Both members of each Friedel pair filled: the transform of a real map."""
        dims = (-3, -2, -1)

        def mate(grid: Tensor) -> Tensor:
            return grid.flip(dims).roll((1, 1, 1), dims)

        return NormalEquations(
            (self.signal + mate(self.signal).conj()) / 2,
            (self.weight + mate(self.weight)) / 2,
            self.padding,
        )

    def shells(self) -> Tensor:
        """Shell, in cycles per box, of each grid point; shape (P, P, P), int64."""
        radius = radius_grid(self.weight.shape[-1], 3, self.weight.device)
        return radius.div_(self.padding).add_(0.5).long()

    def shell_mean_weight(self) -> Tensor:
        """Mean weight by shell, shape (n_shells,)."""
        # Not bincount, which waits for a device to tell how many shells there are.
        size, device = len(self.weight), self.weight.device
        n_shells = int(3**0.5 * (size // 2) / self.padding + 0.5) + 1
        axis = centred_frequencies(size, device).square()
        shell_of = shells_of_squares(3 * (size // 2) ** 2, self.padding, device)
        sums, counts = self.weight.new_zeros(n_shells), self.weight.new_zeros(n_shells)
        # Some planes at a time: their shells take twice the memory of their weights.
        for start in range(0, size, _PLANES):
            planes = slice(start, start + _PLANES)
            shells = shell_of[(axis[planes, None, None] + axis[:, None] + axis).flatten()]
            weight = self.weight[planes].flatten()
            sums += shell_sums(weight, shells, n_shells)
            counts += shell_sums(torch.ones_like(weight), shells, n_shells)
        return sums / counts.clamp(min=1)

    def solve(self, prior: Tensor) -> Transform:
        """Wiener estimate of the oversampled transform.

        Parameters
        ----------
        prior : Tensor, shape (n_shells,), real
            Added to the weight: inverse of the signal's power by shell; shells beyond its
            end are set to zero.

        Returns
        -------
        Transform
            Before gridding correction.
        """
        sums, shells = self.symmetrised(), self.shells()
        inside = shells < len(prior)
        weight = sums.weight + prior.to(self.weight)[shells.clamp(max=len(prior) - 1)]
        # A point that no image came near holds nothing; any positive weight keeps it 0.
        floor = weight.max().double() * 1e-6 + torch.finfo(weight.dtype).tiny
        weight = weight.clamp(min=floor.to(weight.dtype))
        return Transform(
            torch.where(inside, sums.signal / weight, torch.zeros_like(sums.signal)), self.padding
        )
