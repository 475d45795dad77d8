"""What is odd about a particle table, though it can be worked with."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from torch import Tensor

from cryorecon.io.cryosparc import is_cryosparc_file, unread_fields
from cryorecon.io.optics import SAME_SIZE, pixel_sizes_angst
from cryorecon.io.particles import Particles

# Hardly anybody records at a smaller or larger defocus, or with other pixels.
_DEFOCUS_ANGST, _PIXEL_ANGST = (3000.0, 80000.0), (0.2, 20.0)
# Estimates that failed, in a table of others; micrographs that hardly ever have one defocus.
_FAILED_ANGST, _MANY = 1000.0, 3
# Below this a defocus is in micrometres, above it in nanometres, where it is too small.
_MICROMETRES = 100.0
# What many programs write that know no pixel size; share by which calibrated ones may differ.
_UNSET_ANGST, _SAME_PIXEL = 1.0, 0.03

# What changes an image and is not modelled, with the value that changes nothing.
_NOT_MODELLED = {
    "rlnMagMat00": 1.0,
    "rlnMagMat01": 0.0,
    "rlnMagMat10": 0.0,
    "rlnMagMat11": 1.0,
    "rlnCtfScalefactor": 1.0,
    "rlnBeamTiltX": 0.0,
    "rlnBeamTiltY": 0.0,
}
# The same, as lists of numbers such as [0.1,-0.2].
_LISTS_NOT_MODELLED = ("rlnOddZernike", "rlnEvenZernike")
_MICROGRAPH = "rlnMicrographName"
_NUMBER = re.compile(r"[-+]?[\d.]+(?:[eE][-+]?\d+)?")


def table_doubts(particles: Particles, *, ctf: bool = True) -> list[str]:
    """Lines on defocus, pixel size and what is not modelled; those that are needed.

    Parameters
    ----------
    ctf : bool
        Whether images are corrected for it.

    Raises
    ------
    CryoreconError
        If the table has no CTF that can be used.
    """
    return [
        *(_defocus_text(particles) if ctf else []),
        *_pixel_size_text(particles),
        *_header_text(particles),
        *_not_modelled_text(particles),
    ]


def _defocus_text(particles: Particles) -> list[str]:
    """By the median, of images that have a CTF."""
    optics = particles.ctf_parameters()
    defocus_angst = optics.defocus_u_angst
    flat = (optics.spherical_aberration_mm == 0) | (optics.amplitude_contrast.abs() == 1)
    if bool(((defocus_angst == 0) & (optics.defocus_v_angst == 0) & flat).all()):
        return []
    signed, median = float(defocus_angst.median()), float(defocus_angst.abs().median())
    doubts = []
    if median < _DEFOCUS_ANGST[0]:
        unit = "micrometres" if median < _MICROMETRES else "nanometres"
        doubts.append(f"if it is in {unit}, write it in angstrom")
    if median > _DEFOCUS_ANGST[1]:
        doubts.append("hardly any image is recorded so far from focus; check its unit")
    if signed < 0:
        doubts.append("underfocus is positive, as in RELION; check its sign")
    told = f"{signed:.4g}" if abs(signed) < 1000 else f"{signed:,.0f}"
    if doubts:
        return [f"the median defocus is {told} A: {'; '.join(doubts)}"]
    return _failed_text(particles, (optics.defocus_u_angst + optics.defocus_v_angst) / 2)


def _failed_text(particles: Particles, defocus_angst: Tensor) -> list[str]:
    """Estimates of some images that failed, or of all, which then have what was written instead."""
    n, size = len(particles), defocus_angst.abs()
    failed = int(((size < _FAILED_ANGST) | (size > _DEFOCUS_ANGST[1])).sum())
    if failed:
        return [
            f"the defocus of {failed} of {n} images is below {_FAILED_ANGST:,.0f} or above "
            f"{_DEFOCUS_ANGST[1]:,.0f} A, as where its estimate failed: take them out"
        ]
    one = bool((defocus_angst == defocus_angst[0]).all())
    if one and _MICROGRAPH in particles.table:
        micrographs = len(np.unique(np.asarray(particles.table[_MICROGRAPH], dtype=str)))
        if micrographs >= _MANY:
            return [
                f"all images of {micrographs} micrographs have one defocus, "
                f"{float(defocus_angst[0]):,.0f} A: was it estimated?"
            ]
    return []


def _pixel_size_text(particles: Particles) -> list[str]:
    pixel = particles.stored_pixel_size_angst
    if _PIXEL_ANGST[0] <= pixel <= _PIXEL_ANGST[1]:
        return _pixel_sizes_text(particles)
    why = "if it is in nanometres, write it" if pixel < _PIXEL_ANGST[0] else "check that it is"
    return [f"the pixel size of {particles.path} is {pixel:.4g} A: {why} in angstrom"]


def _pixel_sizes_text(particles: Particles) -> list[str]:
    """Whether they differ, by less than what is refused."""
    pixel, optics = particles.stored_pixel_size_angst, particles.blocks.get("optics")
    sizes = pixel_sizes_angst(particles.path, particles.table, optics)
    others = np.abs(sizes / pixel - 1) > SAME_SIZE
    if not others.any():
        return []
    n, low, high = int(others.sum()), sizes.min(), sizes.max()
    return [
        f"pixel sizes are {low:.6g} to {high:.6g} A: {n} of {len(sizes)} images are taken as if "
        f"theirs were {pixel:.6g} A, too"
    ]


def _header_text(particles: Particles) -> list[str]:
    """Whether headers of stacks, which are not used, contradict the table's pixel size."""
    pixel, headers = particles.stored_pixel_size_angst, particles.headers
    stated = np.array([header.pixel_size_angst for header in headers])
    known = (stated >= _PIXEL_ANGST[0]) & (stated <= _PIXEL_ANGST[1])
    known &= np.abs(stated - _UNSET_ANGST) > 1e-5
    other = np.flatnonzero(known & (np.abs(stated / pixel - 1) > _SAME_PIXEL))
    if len(other) == 0:
        return []
    first = other[0]
    several = f", as of {len(other)} of {len(stated)} stacks" if len(stated) > 1 else ""
    return [
        f"pixels are {pixel:.4g} A by {particles.path}, which is used, and {stated[first]:.4g} A "
        f"by the header of {particles.stacks[first]}{several}: check the pixel size"
    ]


def _not_modelled_text(particles: Particles) -> list[str]:
    """A line that names columns which say something that nobody listens to, or none."""
    names = _not_modelled(particles)
    if is_cryosparc_file(particles.path):
        names += unread_fields(particles.path)
    return [f"{', '.join(names)} of {particles.path} are not modelled"] if names else []


def _not_modelled(particles: Particles) -> list[str]:
    optics = particles.blocks.get("optics")
    found = []
    for name, neutral in _NOT_MODELLED.items():
        values = [
            pd.to_numeric(table[name], errors="coerce").to_numpy()
            for table in (particles.table, optics)
            if table is not None and name in table
        ]
        if any(bool((np.abs(of_table - neutral) > 1e-6).any()) for of_table in values):
            found.append(name)
    lists = optics if optics is not None else particles.table
    for name in (name for name in _LISTS_NOT_MODELLED if name in lists):
        said = _NUMBER.findall(" ".join(map(str, lists[name])))
        if any(float(number) != 0 for number in said):
            found.append(name)
    return found
