"""Images as the engines see them: whitened half-plane coefficients and their CTF."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.physics.fourier import HalfPlane, shift_phases


@dataclass(frozen=True)
class Observations:
    """A set of images in Fourier space.

    Attributes
    ----------
    plane : HalfPlane of m coefficients, sorted by radius
    coefficients : Tensor, shape (n, m), complex
        Centred, unnormalised DFT of each image.
    ctf : Tensor, shape (n, m), real
    noise_power : Tensor, shape (groups, n_shells), real
        Expected ``|noise|^2`` of a coefficient, by optics group and shell.
    group : Tensor, shape (n,), int64
    """

    plane: HalfPlane
    coefficients: Tensor
    ctf: Tensor
    noise_power: Tensor
    group: Tensor

    def __len__(self) -> int:
        return self.coefficients.shape[0]

    def select(self, rows: Tensor, band: float | None = None) -> Observations:
        """The images of some rows, up to a radius in cycles per box."""
        plane = self.plane if band is None else self.plane.within(band)
        m = len(plane)
        return Observations(
            plane,
            self.coefficients[rows, :m],
            self.ctf[rows, :m],
            self.noise_power[:, : plane.n_shells],
            self.group[rows],
        )

    def precision(self) -> Tensor:
        """``multiplicity / (2 noise)``: weight of each squared residual in the log-likelihood.

        Shape (n, m).
        """
        by_group = self.plane.multiplicity.to(self.noise_power) / 2
        return (by_group / self.noise_power[:, self.plane.shell])[self.group]

    def matched(self) -> tuple[Tensor, Tensor]:
        """``precision * CTF * Y`` and ``precision * CTF^2``, shape (n, m) each.

        All that the likelihood knows of an image: ``2 Re <matched, S> - <weight, |S|^2>``.
        """
        precision = self.precision()
        return self.coefficients * (self.ctf * precision), self.ctf**2 * precision


def centred(matched: Tensor, offsets_px: Tensor, plane: HalfPlane) -> Tensor:
    """Undo in-plane offsets: multiply by the conjugate of the image model's shift phases.

    Parameters
    ----------
    matched : Tensor, shape (..., m), complex
    offsets_px : Tensor, shape (..., 2)
    """
    return matched * shift_phases(offsets_px, plane).conj().to(matched.dtype)


def as_real(values: Tensor) -> Tensor:
    """Complex (..., m) as real (..., 2m), so that inner products are real matrix products."""
    return torch.cat([values.real, values.imag], -1)
