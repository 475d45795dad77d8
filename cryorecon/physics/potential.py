"""Electrostatic potential of an atomic model from electron scattering factors."""

from __future__ import annotations

from dataclasses import dataclass

import gemmi
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryorecon.errors import CryoreconError
from cryorecon.physics.fourier import (
    centred_frequencies,
    crop_or_pad_centred,
    fft_centred,
    ifft_centred,
    radius_grid,
)

_OVERSAMPLING = 2


@dataclass(frozen=True)
class Atoms:
    """An atomic model.

    Attributes
    ----------
    positions_angst : array, shape (n, 3)
        (x, y, z).
    elements : tuple of str
    occupancies : array, shape (n,)
    b_factors_angst2 : array, shape (n,)
        Isotropic.
    """

    positions_angst: NDArray[np.float64]
    elements: tuple[str, ...]
    occupancies: NDArray[np.float64]
    b_factors_angst2: NDArray[np.float64]

    def mass_centre_angst(self) -> NDArray[np.float64]:
        """Centre of mass, shape (3,)."""
        masses = np.array([gemmi.Element(e).weight for e in self.elements]) * self.occupancies
        return (self.positions_angst * masses[:, None]).sum(0) / masses.sum()

    def radius_angst(self) -> float:
        """Largest distance of an atom from the centre of mass."""
        distances = np.linalg.norm(self.positions_angst - self.mass_centre_angst(), axis=1)
        return float(distances.max())


def _fine_density(atoms: Atoms, box: int, pixel_size_angst: float, blur: float) -> Tensor:
    """Density on an oversampled periodic grid, blurred by `blur` A^2, origin at voxel 0."""
    length = box * pixel_size_angst
    model = gemmi.Model(1)
    chain, residue = gemmi.Chain("A"), gemmi.Residue()
    shift = -atoms.mass_centre_angst()
    for element, position, occupancy, b in zip(
        atoms.elements,
        atoms.positions_angst + shift,
        atoms.occupancies,
        atoms.b_factors_angst2,
        strict=True,
    ):
        atom = gemmi.Atom()
        atom.element = gemmi.Element(element)
        atom.pos = gemmi.Position(*position)
        atom.occ, atom.b_iso = float(occupancy), float(b)
        residue.add_atom(atom)
    chain.add_residue(residue)
    model.add_chain(chain)
    calculator = gemmi.DensityCalculatorE()
    calculator.grid.set_unit_cell(gemmi.UnitCell(length, length, length, 90, 90, 90))
    fine = box * _OVERSAMPLING
    calculator.grid.set_size(fine, fine, fine)
    calculator.blur = blur
    calculator.put_model_density_on_grid(model)
    return torch.from_numpy(np.array(calculator.grid, copy=True).transpose(2, 1, 0)).double()


def potential_map(atoms: Atoms, box: int, pixel_size_angst: float) -> Tensor:
    """Potential of a model whose centre of mass lies at the centre of the box.

    A sum of each element's electron scattering factor (International Tables C 4.3.2.2, five
    Gaussians), widened by its B-factor. Computed on a grid of half the pixel size with extra
    blur that is divided out again, then cut in Fourier space, so nothing aliases.

    Parameters
    ----------
    atoms : Atoms
    box : int
        Voxels a side.
    pixel_size_angst : float

    Returns
    -------
    Tensor, shape (N, N, N), float32
        Indexed [z, y, x]; scattering length in angstrom per cubic angstrom.

    Raises
    ------
    CryoreconError
        If the model does not fit into the box.
    """
    need = 2 * atoms.radius_angst()
    if need > box * pixel_size_angst:
        raise CryoreconError(
            f"The model is {need:.0f} A across, the box only {box * pixel_size_angst:.0f} A",
            f"Use a box of {2 * int(np.ceil(need * 0.63 / pixel_size_angst))} px or larger pixels",
        )
    fine_pixel = pixel_size_angst / _OVERSAMPLING
    blur = max(0.0, 8 * np.pi**2 * (0.75 * fine_pixel) ** 2 - float(atoms.b_factors_angst2.min()))
    fine = torch.fft.fftshift(_fine_density(atoms, box, pixel_size_angst, blur))
    transform = crop_or_pad_centred(fft_centred(fine, 3), box, 3)
    if box % 2 == 0:  # the Nyquist planes have no mate: leave them out
        inside = centred_frequencies(box).abs() < box // 2
        transform = transform * (inside[:, None, None] & inside[None, :, None] & inside)
    s2 = (radius_grid(box, 3) / (box * pixel_size_angst)) ** 2
    transform = transform * torch.exp(blur * s2 / 4)
    return (ifft_centred(transform, 3).real / _OVERSAMPLING**3).float()
