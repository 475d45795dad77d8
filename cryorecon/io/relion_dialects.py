"""A particle table in the dialect of RELION 3.1 (optics table) or 3.0 (one table)."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cryorecon.io.particles import Particles
from cryorecon.io.stacks import names_for_relion
from cryorecon.io.star import numbers

# What an optics table says of its groups and images, which 3.0 says otherwise or not at all.
_ONLY_31 = {
    "rlnOpticsGroup",
    "rlnOpticsGroupName",
    "rlnImagePixelSize",
    "rlnImageSize",
    "rlnImageDimensionality",
}
# Columns of 3.0 particle tables that belong into the optics table of 3.1.
_OPTICS = (
    "rlnVoltage",
    "rlnSphericalAberration",
    "rlnAmplitudeContrast",
    "rlnBeamTiltX",
    "rlnBeamTiltY",
    "rlnBeamTiltClass",
    "rlnMtfFileName",
)
# Lengths in pixels in 3.0; in 3.1 in angstrom, and named so.
_LENGTHS = (
    *(f"rlnOrigin{axis}{kind}" for kind in ("", "Prior") for axis in "XYZ"),
    "rlnHelicalTrackLength",
)
_SCALE_30 = ("rlnDetectorPixelSize", "rlnMagnification", "rlnPixelSize")
# With it, rlnDetectorPixelSize in micrometres is the pixel size in angstrom.
_MAGNIFICATION = 10_000.0

Columns = dict[str, NDArray[np.generic]]


def relion31(
    particles: Particles, new: Columns, stale: Collection[str] = ()
) -> dict[str, pd.DataFrame | Iterator[pd.DataFrame]]:
    """Tables of a RELION 3.1 file: as they are, or with an optics table made from 3.0 columns.

    Parameters
    ----------
    new : dict of arrays, shape (n,)
        Columns to replace or to add.
    stale : collection of str
        Columns to leave out.
    """
    if particles.has_optics_table:
        return {**particles.blocks, particles.block_name: _without(particles, new, stale)}
    table = particles.table
    moved = [name for name in _OPTICS if name in table]
    keys = pd.DataFrame({name: table[name] for name in moved}, index=range(len(table)))
    group: NDArray[np.integer] = np.zeros(len(table), dtype=np.int64)
    distinct = keys[:1]
    if moved:
        group = keys.groupby(moved, sort=False).ngroup().to_numpy()
        distinct = keys.drop_duplicates(ignore_index=True)
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": np.arange(len(distinct)) + 1,
            "rlnOpticsGroupName": [f"opticsGroup{k + 1}" for k in range(len(distinct))],
            **distinct.to_dict("list"),
            "rlnImagePixelSize": particles.pixel_size_angst,
            "rlnImageSize": particles.box,
            "rlnImageDimensionality": 2,
        }
    )
    new = {**new, "rlnOpticsGroup": group + 1}
    pixel = particles.stored_pixel_size_angst
    # Where a table has both, those in angstrom count.
    given = [n for n in _LENGTHS if n in table and n not in stale and f"{n}Angst" not in table]
    for name in given:
        new[f"{name}Angst"] = numbers(particles.path, table, name) * pixel
    dropped = [*stale, *moved, *_SCALE_30, *_LENGTHS]
    blocks = {n: t for n, t in particles.blocks.items() if n not in ("optics", "particles")}
    return {"optics": optics, **blocks, "particles": _without(particles, new, dropped)}


def relion30(
    particles: Particles, new: Columns, stale: Collection[str] = ()
) -> dict[str, pd.DataFrame | Iterator[pd.DataFrame]]:
    """Tables of a RELION 3.0 file: no optics table, its values in each row, origins in pixels.

    The pixel size is ``rlnDetectorPixelSize`` (micrometres) at a magnification of 10,000. Other
    tables than the optics and the particles are left out: 3.0 reads the first of a file.

    Parameters
    ----------
    new : dict of arrays, shape (n,)
        Columns to replace or to add.
    stale : collection of str
        Columns to leave out.
    """
    new = dict(new)
    optics: pd.DataFrame | None = particles.blocks.get("optics")
    if optics is not None:
        index = particles.optics_index()
        for name in optics:
            if name not in _ONLY_31 and name not in particles.table:
                new[str(name)] = optics[name].to_numpy(object)[index]
        new["rlnDetectorPixelSize"] = np.full(len(particles), particles.pixel_size_angst)
        new["rlnMagnification"] = np.full(len(particles), _MAGNIFICATION)
    pixel, dropped = particles.stored_pixel_size_angst, [f"{name}Angst" for name in _LENGTHS]
    for name, angst in zip(_LENGTHS, dropped, strict=True):
        if angst in particles.table and angst not in stale:
            new[name] = numbers(particles.path, particles.table, angst) / pixel
    return {"": _without(particles, new, [*stale, *dropped])}


def _without(particles: Particles, new: Columns, names: Collection[str]) -> Iterator[pd.DataFrame]:
    for frame in particles.table.frames(new):
        frame["rlnImageName"] = names_for_relion(frame["rlnImageName"])
        yield frame.drop(columns=[name for name in names if name in frame])
