"""Atomic models from PDB and mmCIF files, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import gemmi
import numpy as np

from cryorecon.errors import CryoreconError, require_file
from cryorecon.physics.potential import Atoms

DEFAULT_B_FACTOR_ANGST2 = 20.0
_NO_LETTER = "\0"
# Residues that mark where a membrane is.
_MARK = "DUM"
# Waters of molecular dynamics, which gemmi does not count as such.
_MORE_WATERS = ("TIP3", "TIP", "TP3", "SOL", "SPC")
_LARGEST_BYTES = 2**30
_LARGEST_NUMBER = 1e6


def read_atoms(
    path: str | Path,
    *,
    keep_hydrogens: bool = False,
    keep_waters: bool = False,
    b_factor_angst2: float | None = None,
) -> Atoms:
    """Read an atomic model by fixed rules.

    * The first model only.
    * Of a residue's alternative locations, the letter of the highest mean occupancy counts (the
      first letter of equals); its atoms take the summed occupancy of all their alternatives, at
      most 1. An atom that lacks this letter is represented by its own most occupied alternative.
      Atoms without alternatives keep their occupancy.
    * Hydrogens (and deuterium) and waters are left out unless asked for; dummy atoms that mark a
      membrane (residue ``DUM`` of OPM's files) always.
    * B-factors are the file's; an atom whose B-factor is not positive gets 20 A^2. One value for
      all replaces them when given. Anisotropic B-factors are not used.
    * Atoms count as neutral.

    Parameters
    ----------
    path : path
        ``.pdb``, ``.ent``, ``.cif``, ``.mmcif``, each also ``.gz``.
    keep_hydrogens, keep_waters : bool
    b_factor_angst2 : float, optional
        One isotropic B-factor for all atoms.

    Raises
    ------
    CryoreconError
        If the file is missing, cannot be parsed, holds no atoms, an atom's element is unknown or
        has no electron scattering factor, or a coordinate, occupancy or B-factor is no number
        or far too large.
    """
    model = _first_model(path := require_file(path, "PDB or mmCIF file"))
    if not keep_hydrogens:
        model.remove_hydrogens()
    if not keep_waters:
        model.remove_waters()
    left_out = (_MARK,) if keep_waters else (_MARK, *_MORE_WATERS)
    try:
        picked = [
            pick
            for chain in model
            for _, residues in groupby(chain, key=lambda residue: str(residue.seqid))
            for pick in _pick_atoms([r for r in residues if r.name not in left_out])
        ]
        for residue, atom, occupancy in picked:
            _check_atom(path, residue, atom, occupancy)
    except UnicodeDecodeError as error:
        raise CryoreconError(
            f"{path} is damaged: the name of an atom or a residue is no text",
            "Give an undamaged PDB or mmCIF file",
        ) from error
    if not picked:
        raise CryoreconError(
            f"{path} holds no atoms besides waters and hydrogens",
            "Keep them with --keep-waters and --keep-hydrogens, or give another model",
        )
    occupancies = np.array([occupancy for _, _, occupancy in picked])
    if not occupancies.sum() > 0:
        raise CryoreconError(
            f"{path}: the occupancies of all {len(picked)} atoms are 0", "Set its occupancies"
        )
    b_factors = np.array([atom.b_iso for _, atom, _ in picked], np.float64)
    b_factors = np.where(b_factors > 0, b_factors, DEFAULT_B_FACTOR_ANGST2)
    if b_factor_angst2 is not None:
        b_factors[:] = b_factor_angst2
    return Atoms(
        np.array([atom.pos.tolist() for _, atom, _ in picked], dtype=np.float64),
        tuple(atom.element.name for _, atom, _ in picked),
        occupancies,
        b_factors,
    )


def _require_unpacked_size(path: Path) -> None:
    """Refuse a small file that unpacks to something far larger than any model."""
    size = 0
    try:
        with gzip.open(path) as file:
            while block := file.read(2**20):
                size += len(block)
                if size > _LARGEST_BYTES:
                    raise CryoreconError(
                        f"{path} is more than {_LARGEST_BYTES:,} bytes unpacked",
                        "Give a file of an atomic model",
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise CryoreconError(
            f"{path} cannot be unpacked: {error}", "Give an undamaged gzip file"
        ) from error


def _first_model(path: Path) -> gemmi.Model:
    if path.suffix == ".gz":
        _require_unpacked_size(path)
    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        reason = (str(error).splitlines() or ["damaged file"])[0].rstrip(" :.")
        raise CryoreconError(
            f"{path} cannot be read as an atomic model: {reason}",
            "Give a file named .pdb, .ent, .cif or .mmcif, plain or gzipped",
        ) from error
    if len(structure) == 0 or structure[0].count_atom_sites() == 0:
        raise CryoreconError(f"{path} holds no atoms", "Give a PDB or mmCIF file with coordinates")
    return structure[0]


_Pick = tuple[gemmi.Residue, gemmi.Atom, float]


def _pick_atoms(residues: list[gemmi.Residue]) -> Iterator[_Pick]:
    """Each atom once, with its occupancy, of the residues that share one place in the chain."""
    sums: dict[str, list[float]] = {}
    for residue in residues:
        for atom in residue:
            if atom.altloc != _NO_LETTER:
                sums.setdefault(atom.altloc, []).append(atom.occ)
    best = max(sorted(sums), key=lambda letter: float(np.mean(sums[letter])), default=_NO_LETTER)
    # Two residue types at one place are alternatives of each other: keep the best letter's.
    rivals = [r for r in residues if len(r) and all(a.altloc != _NO_LETTER for a in r)]
    winners = [r for r in rivals if any(a.altloc == best for a in r)]
    lost = [r for r in rivals if r not in winners] if winners else []
    for residue in residues:
        if residue not in lost:
            yield from _pick_residue(residue, best, [atom for r in lost for atom in r])


def _pick_residue(residue: gemmi.Residue, best: str, lost: list[gemmi.Atom]) -> Iterator[_Pick]:
    by_name: dict[str, list[gemmi.Atom]] = {}
    for atom in residue:
        if atom.altloc == _NO_LETTER:
            yield residue, atom, atom.occ
        else:
            by_name.setdefault(atom.name, []).append(atom)
    for name, atoms in by_name.items():
        ranked = sorted(atoms, key=lambda atom: (atom.altloc != best, -atom.occ, atom.altloc))
        total = sum(atom.occ for atom in [*atoms, *(a for a in lost if a.name == name)])
        yield residue, ranked[0], min(1.0, total)


def _check_atom(path: Path, residue: gemmi.Residue, atom: gemmi.Atom, occupancy: float) -> None:
    where = f"{path}: atom {atom.name} of residue {residue}"
    element = atom.element
    if element.atomic_number == 0:
        raise CryoreconError(f"{where} has no known element", "Fill in its element column")
    if element.c4322 is None:
        raise CryoreconError(
            f"{where}: no electron scattering factor is tabulated for {element.name}",
            "Remove the atom",
        )
    values = np.abs([*atom.pos.tolist(), occupancy, atom.b_iso])
    if not (values < _LARGEST_NUMBER).all():
        what = "not a finite number" if not np.isfinite(values).all() else "far too large"
        raise CryoreconError(
            f"{where} has a coordinate, occupancy or B-factor that is {what}", "Correct the file"
        )
