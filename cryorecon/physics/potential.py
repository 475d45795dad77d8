"""Electrostatic potential of an atomic model from electron scattering factors."""

from __future__ import annotations

from dataclasses import dataclass

import gemmi
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryorecon.errors import CryoreconError

_OVERSAMPLING = 2
# Width (standard deviation, in fine voxels) that every atom is blurred to at least, and the
# density at which its tail is cut: together they hold the error below 2e-4 of an atom's f(0).
_LEAST_WIDTH_VOXELS = 1.0
_TAIL_CUTOFF = 1e-6


@dataclass(frozen=True)
class Atoms:
    """An atomic model.

    Attributes
    ----------
    positions_angst : array, shape (n, 3), float64
        (x, y, z).
    elements : tuple of n str
    occupancies : array, shape (n,), float64
    b_factors_angst2 : array, shape (n,), float64
        Isotropic.
    """

    positions_angst: NDArray[np.float64]
    elements: tuple[str, ...]
    occupancies: NDArray[np.float64]
    b_factors_angst2: NDArray[np.float64]

    def mass_centre_angst(self) -> NDArray[np.float64]:
        """Centre of mass, shape (3,)."""
        weights = {name: gemmi.Element(name).weight for name in set(self.elements)}
        masses = np.array([weights[name] for name in self.elements]) * self.occupancies
        return (self.positions_angst * masses[:, None]).sum(0) / masses.sum()

    def radius_angst(self) -> float:
        """Largest distance of an atom from the centre of mass."""
        distances = np.linalg.norm(self.positions_angst - self.mass_centre_angst(), axis=1)
        return float(distances.max())


def _extra_blur_angst2(atoms: Atoms, fine_pixel_angst: float) -> float:
    """B-factor to add to all atoms so that none is narrower than the fine grid can hold."""
    needed = 8 * np.pi**2 * (_LEAST_WIDTH_VOXELS * fine_pixel_angst) ** 2
    return max(0.0, float(needed - atoms.b_factors_angst2.min()))


def _fine_density(atoms: Atoms, fine_box: int, length_angst: float, blur_angst2: float) -> Tensor:
    """Blurred density on a periodic grid, shape (F, F, F), [z, y, x]; mass centre at voxel 0."""
    calculator = gemmi.DensityCalculatorE()
    calculator.grid.set_unit_cell(
        gemmi.UnitCell(length_angst, length_angst, length_angst, 90, 90, 90)
    )
    calculator.grid.set_size(fine_box, fine_box, fine_box)
    calculator.blur = blur_angst2
    calculator.cutoff = _TAIL_CUTOFF
    calculator.initialize_grid()
    kinds = {name: gemmi.Element(name) for name in set(atoms.elements)}
    atom = gemmi.Atom()
    for name, position, occupancy, b in zip(
        atoms.elements,
        (atoms.positions_angst - atoms.mass_centre_angst()).tolist(),
        atoms.occupancies.tolist(),
        atoms.b_factors_angst2.tolist(),
        strict=True,
    ):
        atom.element, atom.pos = kinds[name], gemmi.Position(*position)
        atom.occ, atom.b_iso = occupancy, b
        calculator.add_atom_density_to_grid(atom)
    # gemmi's grid is [x, y, z]; the copy outlives the calculator.
    return torch.from_numpy(np.array(calculator.grid).transpose(2, 1, 0).copy())


def _cut_and_sharpen(fine: Tensor, box: int, length_angst: float, blur_angst2: float) -> Tensor:
    """The same periodic density on `box` voxels a side without the blur; origin at voxel 0.

    Keeps whole Friedel pairs only: the Nyquist planes of an even box are left out.
    """
    fine_box, reach = len(fine), (box - 1) // 2
    k = torch.cat([torch.arange(reach + 1), torch.arange(-reach, 0)])
    half = k[: reach + 1]
    low = torch.fft.rfftn(fine)[k % fine_box][:, k % fine_box][:, :, : reach + 1]
    s2 = (k[:, None, None] ** 2 + k[:, None] ** 2 + half**2) / length_angst**2
    transform = torch.zeros(box, box, box // 2 + 1, dtype=low.dtype)
    transform[(k % box)[:, None, None], (k % box)[:, None], half] = low * torch.exp(
        blur_angst2 * s2 / 4
    )
    return torch.fft.irfftn(transform, s=(box, box, box)) * (box / fine_box) ** 3


def potential_map(atoms: Atoms, box: int, pixel_size_angst: float) -> Tensor:
    """Potential of a model whose centre of mass lies at the centre of the box.

    Each atom is its element's electron scattering factor (International Tables C, table 4.3.2.2:
    five Gaussians, neutral atoms) times ``occupancy * exp(-B s^2 / 4)``. The sum is computed on a
    grid of half the pixel size with extra blur, cut in Fourier space, and the blur is divided
    out: nothing aliases.

    Parameters
    ----------
    atoms : Atoms
    box : int
        Voxels a side, N.
    pixel_size_angst : float

    Returns
    -------
    Tensor, shape (N, N, N), float32
        Indexed [z, y, x], centre at voxel ``N // 2``. Scattering length in angstrom per cubic
        angstrom; times 47.878 V A^2 it is the potential in volts.

    Raises
    ------
    CryoreconError
        If a sphere around the centre of mass that holds all atoms is wider than the box.
    """
    length, width = box * pixel_size_angst, 2 * atoms.radius_angst()
    if width > length:
        roomy = 1.25 * width
        raise CryoreconError(
            f"The model needs {width:.0f} A around its centre of mass, the box of {box} px at "
            f"{pixel_size_angst:g} A/px has {length:.0f} A",
            f"Use a box of {2 * int(np.ceil(roomy / pixel_size_angst / 2))} px, or "
            f"{roomy / box:.2f} A/px",
        )
    fine_box = _OVERSAMPLING * box
    blur = _extra_blur_angst2(atoms, length / fine_box)
    fine = _fine_density(atoms, fine_box, length, blur)
    return torch.fft.fftshift(_cut_and_sharpen(fine, box, length, blur))
