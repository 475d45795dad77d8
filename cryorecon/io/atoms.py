"""Atomic models from PDB and mmCIF files, plain or gzipped."""

from __future__ import annotations

from pathlib import Path

import gemmi
import numpy as np

from cryorecon.errors import CryoreconError, require_file
from cryorecon.physics.potential import Atoms

DEFAULT_B_FACTOR_ANGST2 = 20.0


def read_atoms(
    path: str | Path,
    *,
    keep_hydrogens: bool = False,
    keep_waters: bool = False,
    b_factor_angst2: float | None = None,
) -> Atoms:
    """Read an atomic model by fixed rules.

    The first model only. Of alternative locations the most occupied counts (the first of
    equals), with full occupancy; atoms without alternatives keep their occupancy. Hydrogens and
    waters are left out unless asked for. B-factors are the file's, 20 A^2 where it has none or
    a negative one, unless one value for all is given.

    Parameters
    ----------
    path : path
        ``.pdb``, ``.ent``, ``.cif``, ``.mmcif``, each also ``.gz``.
    b_factor_angst2 : float, optional
        One isotropic B-factor for all atoms.

    Raises
    ------
    CryoreconError
        If the file is missing, cannot be parsed, holds no atoms, or an element is unknown.
    """
    path = require_file(path, "PDB or mmCIF file")
    try:
        structure = gemmi.read_structure(str(path))
        structure.setup_entities()
    except (RuntimeError, ValueError) as error:
        raise CryoreconError(
            f"{path} cannot be read as an atomic model: {str(error).splitlines()[0]}",
            "Give a PDB or mmCIF file, plain or gzipped",
        ) from error
    if len(structure) == 0:
        raise CryoreconError(f"{path} holds no atoms", "Give a PDB or mmCIF file with coordinates")
    if not keep_hydrogens:
        structure.remove_hydrogens()
    if not keep_waters:
        structure.remove_waters()
    rows = [row for chain in structure[0] for residue in chain for row in _residue(path, residue)]
    if not rows:
        raise CryoreconError(
            f"{path} holds no atoms besides waters and hydrogens",
            "Keep them with --keep-waters and --keep-hydrogens, or give another model",
        )
    elements, positions, occupancies, b_factors = zip(*rows, strict=True)
    b_values = np.asarray(b_factors, dtype=np.float64)
    b_values = np.where(b_values > 0, b_values, DEFAULT_B_FACTOR_ANGST2)
    if b_factor_angst2 is not None:
        b_values = np.full_like(b_values, b_factor_angst2)
    return Atoms(
        np.asarray(positions, dtype=np.float64),
        tuple(elements),
        np.asarray(occupancies, dtype=np.float64),
        b_values,
    )


def _residue(
    path: Path, residue: gemmi.Residue
) -> list[tuple[str, tuple[float, float, float], float, float]]:
    chosen: dict[str, gemmi.Atom] = {}
    for atom in residue:
        rival = chosen.get(atom.name)
        if rival is None or atom.occ > rival.occ:
            chosen[atom.name] = atom
    rows = []
    for atom in chosen.values():
        if atom.element.atomic_number == 0:
            raise CryoreconError(
                f"{path}: atom {atom.name} of residue {residue} has no known element",
                "Fill in its element column",
            )
        occupancy = 1.0 if atom.altloc != "\0" else atom.occ
        position = (atom.pos.x, atom.pos.y, atom.pos.z)
        rows.append((atom.element.name, position, occupancy, atom.b_iso))
    return rows
