"""Particles as a cryoSPARC file: the fields, types and signs of its own particle tables."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from cryorecon.errors import CryoreconError
from cryorecon.io.cryosparc import GROUP_NAME, SIGN_COLUMN, UID_COLUMN
from cryorecon.io.files import replacing
from cryorecon.io.particles import Particles
from cryorecon.io.stacks import bare_names, parse_image_names
from cryorecon.io.star import numbers

_CTF_NUMBERS = {
    "accel_kv": "voltage_kv",
    "cs_mm": "spherical_aberration_mm",
    "amp_contrast": "amplitude_contrast",
    "df1_A": "defocus_u_angst",
    "df2_A": "defocus_v_angst",
}
_CTF_ANGLES = {"df_angle_rad": "defocus_angle_deg", "phase_shift_rad": "phase_shift_deg"}
# Aberrations and an anisotropic magnification that are not there, as cryoSPARC writes them.
_CTF_ABSENT = {"shift_A": 2, "tilt_A": 2, "trefoil_A": 2, "tetra_A": 4, "anisomag": 4}
# Scores of an alignment that cryoSPARC did not make; scales of 1, one class.
_SCORES = {
    "error": 0.0,
    "error_min": 0.0,
    "resid_pow": 0.0,
    "slice_pow": 0.0,
    "image_pow": 0.0,
    "cross_cor": 0.0,
    "alpha": 1.0,
    "alpha_min": 1.0,
    "weight": 0.0,
    "pose_ess": 0.0,
    "shift_ess": 0.0,
    "class_posterior": 1.0,
    "class_ess": 1.0,
}


def write_cryosparc(path: str | Path, particles: Particles, rotations: Tensor | None) -> None:
    """Write a ``.cs`` file: one row a particle, in order.

    Parameters
    ----------
    rotations : Tensor, shape (n, 3, 3), optional
        Matrices A; without them there are no ``alignments3D`` fields.

    Raises
    ------
    CryoreconError
        If a CTF column is missing or no number.
    """
    fields = {**_blob(particles), **_ctf(particles)}
    if rotations is not None:
        fields |= _alignments(particles, rotations)
    kinds = [(name, values.dtype, values.shape[1:]) for name, values in fields.items()]
    table = np.zeros(len(particles), dtype=np.dtype(kinds))
    for name, values in fields.items():
        table[name] = values
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, table)


def _repeated(values: NDArray[np.generic], count: int) -> NDArray[np.generic]:
    return np.repeat(values[None], count, axis=0)


def _blob(particles: Particles) -> dict[str, NDArray[np.generic]]:
    count = len(particles)
    stack_of, sections, names, _ = parse_image_names(particles.path, particles.table)
    paths = np.array([name.encode() for name in names])
    sign = np.ones(count)
    if SIGN_COLUMN in particles.table:
        sign = numbers(particles.path, particles.table, SIGN_COLUMN)
    return {
        "uid": unique_numbers(particles),
        "blob/path": paths[stack_of],
        "blob/idx": sections.astype(np.uint32),
        "blob/shape": np.full((count, 2), particles.box, dtype=np.uint32),
        "blob/psize_A": np.full(count, particles.pixel_size_angst, dtype=np.float32),
        "blob/sign": sign.astype(np.float32),
        "blob/import_sig": np.zeros(count, dtype=np.uint64),
    }


def unique_numbers(particles: Particles) -> NDArray[np.uint64]:
    """CryoSPARC's ``uid``: kept where the table has it, else made from the image's name.

    The same image gets the same number in every export; an image listed twice gets two.

    Raises
    ------
    CryoreconError
        If the table's column holds something else than numbers of 64 bits.
    """
    if UID_COLUMN in particles.table:
        try:
            kept = np.array([int(value) for value in particles.table[UID_COLUMN]], dtype=np.uint64)
        except (ValueError, OverflowError) as error:
            raise CryoreconError(
                f"{particles.path}, column {UID_COLUMN}: {error}",
                "Remove the column; new numbers will be made",
            ) from error
        if len(np.unique(kept)) == len(kept):
            return kept
    seen: dict[str, int] = {}
    found = np.empty(len(particles), dtype=np.uint64)
    for row, name in enumerate(bare_names(particles.table["rlnImageName"])):
        copy = seen[name] = seen.get(name, -1) + 1
        digest = hashlib.sha256(f"{name} {copy}".encode()).digest()
        found[row] = int.from_bytes(digest[:8], "little")
    return found


def _groups(particles: Particles) -> NDArray[np.uint32]:
    """Experiment groups: those that the particles came with, else the optics groups from 1."""
    if not particles.has_optics_table:
        return np.zeros(len(particles), dtype=np.uint32)
    optics, index = particles.blocks["optics"], particles.optics_index()
    if "rlnOpticsGroupName" in optics:
        told = optics["rlnOpticsGroupName"].str.extract(rf"^{GROUP_NAME}(\d{{1,10}})$")[0]
        if told.notna().all() and (told.astype(np.int64) < 2**32).all():
            return told.to_numpy(np.uint32)[index]
    return (index + 1).astype(np.uint32)


def _ctf(particles: Particles) -> dict[str, NDArray[np.generic]]:
    count, optics = len(particles), particles.ctf_parameters()
    fields: dict[str, NDArray[np.generic]] = {
        "ctf/type": _repeated(np.array(b"imported"), count),
        "ctf/exp_group_id": _groups(particles),
    }
    for name, attribute in _CTF_NUMBERS.items():
        fields[f"ctf/{name}"] = getattr(optics, attribute).numpy().astype(np.float32)
    for name, attribute in _CTF_ANGLES.items():
        fields[f"ctf/{name}"] = np.deg2rad(getattr(optics, attribute).numpy()).astype(np.float32)
    fields["ctf/scale"] = np.ones(count, dtype=np.float32)
    fields["ctf/scale_const"] = np.zeros(count, dtype=np.float32)
    for name, width in _CTF_ABSENT.items():
        fields[f"ctf/{name}"] = np.zeros((count, width), dtype=np.float32)
    fields["ctf/bfactor"] = np.zeros(count, dtype=np.float32)
    return fields


def _alignments(particles: Particles, rotations: Tensor) -> dict[str, NDArray[np.generic]]:
    count, pixel = len(particles), particles.pixel_size_angst
    subsets = particles.random_subsets()
    split = np.zeros(count) if subsets is None else subsets - 1
    vectors = Rotation.from_matrix(rotations.mT.to(torch.float64).numpy()).as_rotvec()
    fields: dict[str, NDArray[np.generic]] = {
        "split": split.astype(np.uint32),
        "shift": (particles.origins_angst() / pixel).astype(np.float32),
        "pose": vectors.astype(np.float32),
        "psize_A": np.full(count, pixel, dtype=np.float32),
        "class": np.zeros(count, dtype=np.uint32),
    }
    fields |= {name: np.full(count, value, dtype=np.float32) for name, value in _SCORES.items()}
    return {f"alignments3D/{name}": values for name, values in fields.items()}
