"""Images that no engine can work with."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cryorecon.errors import CryoreconError
from cryorecon.io.cryosparc import is_cryosparc_file, unread_fields
from cryorecon.io.files import sha256_of
from cryorecon.io.mrc import StackReader
from cryorecon.io.particles import Particles

# Pixels along an edge of the corners that tell a masked image.
_CORNER = 3
# Images that tell whether stacks are the same.
_COMPARED = 16

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
_NUMBER = re.compile(r"[-+]?[\d.]+(?:[eE][-+]?\d+)?")


def not_modelled_text(particles: Particles) -> list[str]:
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


def checksums(particles: Particles, **files: Path | None) -> dict[str, str]:
    """What tells a continued job that images, or files such as a mask, are no longer the same.

    Of images some that are spread over the stacks: reading all would take as long as a part of the
    job.
    """
    rows = np.unique(np.linspace(0, len(particles) - 1, _COMPARED).round().astype(np.int64))
    some = particles.read(rows, StackReader())
    found = {"images": hashlib.sha256(some.tobytes()).hexdigest()}
    return found | {name: sha256_of(path) for name, path in files.items() if path is not None}


def refuse_unfit(particles: Particles, rows: Tensor, images: Tensor) -> None:
    """Stop at images without contrast, or without noise around the particle.

    Parameters
    ----------
    rows : Tensor, int64, shape (b,)
    images : Tensor, shape (b, N, N)
        As they are on disk.

    Raises
    ------
    CryoreconError
        Naming the first such row, and how many there are.
    """
    ends = slice(None, _CORNER), slice(-_CORNER, None)
    corners = torch.cat([images[:, y, x].flatten(1) for y in ends for x in ends], 1)
    masked = torch.nonzero((corners == corners[:, :1]).all(-1))[:, 0]
    if len(masked) == 0:
        return
    flat = images[masked].flatten(1)
    blank = masked[(flat == flat[:, :1]).all(-1)]
    if len(blank):
        raise CryoreconError(
            f"{_named(particles, rows, blank)} blank", "Remove such rows from the STAR file"
        )
    raise CryoreconError(
        f"{_named(particles, rows, masked)} masked: its corners hold one value, and noise is "
        "measured outside the particle",
        "Extract the particles without a mask",
    )


def _named(particles: Particles, rows: Tensor, bad: Tensor) -> str:
    row = particles.rows[int(rows[bad[0]])] + 1
    others = f" (and {len(bad) - 1} more of {len(rows)} images read)" if len(bad) > 1 else ""
    return f"{particles.path}, row {row}{others}: the image is"
