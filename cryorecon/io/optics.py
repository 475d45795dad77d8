"""What a particle table and its optics table say together: groups, pixel size, sane numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cryorecon.errors import CryoreconError
from cryorecon.io.star import correct_rows, integers, numbers, such_rows
from cryorecon.io.text_table import TextTable

# Unit and limits, far wider than any microscope's: beyond them, formulas overflow.
_LIMITS = {
    "rlnVoltage": (" kV", 1.0, 2e3),
    "rlnSphericalAberration": (" mm", -1e3, 1e3),
    "rlnAmplitudeContrast": ("", -1.0, 1.0),
    "rlnDefocusU": (" A", -1e7, 1e7),
    "rlnDefocusV": (" A", -1e7, 1e7),
    "rlnDefocusAngle": (" degrees", -1e6, 1e6),
    "rlnPhaseShift": (" degrees", -1e6, 1e6),
    "rlnCtfBfactor": (" A^2", -1e6, 1e6),
    "rlnCtfDataArePhaseFlipped": ("", 0, 1),
    "rlnOriginX": (" A", -1e7, 1e7),
    "rlnOriginY": (" A", -1e7, 1e7),
    "rlnOriginXAngst": (" A", -1e7, 1e7),
    "rlnOriginYAngst": (" A", -1e7, 1e7),
}
# From here on a voltage is one in volts.
_VOLTS = 1e4
_PIXEL_ANGST = (1e-3, 1e5)
# Sizes that differ by a smaller share are one: of images of 1,000 px the rim moves by 0.05 px.
SAME_SIZE = 1e-4
# Those of several microscopes that may be worked with as one: of particles of 100 px the rim moves
# by half a pixel.
_NEARLY_ONE_SIZE = 0.01


def require_within(
    path: Path, rows: NDArray[np.int32], column: str, values: NDArray[np.floating]
) -> None:
    """Refuse values of a column that overflow formulas, naming the first.

    Raises
    ------
    CryoreconError
        Naming file, row and column.
    """
    unit, low, high = _LIMITS[column]
    bad = np.flatnonzero(~((values >= low) & (values <= high)))
    if len(bad):
        value = float(values[bad[0]])
        raise CryoreconError(
            f"{path}, row {rows[bad[0]] + 1}, column {column}: {value:g} is not between "
            f"{low:g} and {high:g}{unit} ({such_rows(len(bad), len(values))})",
            _meant(column, value) or correct_rows(len(bad), len(values)),
        )


def _meant(column: str, value: float) -> str:
    """What to write instead, where the unit tells."""
    if column == "rlnVoltage" and _VOLTS <= value < np.inf:
        return f"It is in kV, where volts seem to be meant: write {value / 1e3:g} for {value:g} V"
    if column == "rlnAmplitudeContrast":
        return "It is a fraction: write 0.1 for 10 percent"
    return ""


def optics_index(
    path: Path, table: TextTable | pd.DataFrame, optics: pd.DataFrame, rows: NDArray[np.int32]
) -> NDArray[np.int64]:
    """Row of the optics table for each particle.

    Parameters
    ----------
    rows : array of int
        Row of each particle in the file, 0-based.

    Raises
    ------
    CryoreconError
        If a group is no whole number, is in no row of the optics table, or in several.
    """
    if len(optics) == 1 and "rlnOpticsGroup" not in table:
        return np.zeros(len(table), dtype=np.int64)
    if "rlnOpticsGroup" not in table or "rlnOpticsGroup" not in optics:
        raise CryoreconError(
            f"{path} has an optics table but no rlnOpticsGroup to join it by",
            "Add the column rlnOpticsGroup to both tables",
        )
    groups = integers(path, optics, "rlnOpticsGroup")
    wanted = integers(path, table, "rlnOpticsGroup", rows=rows)
    if len(np.unique(groups)) < len(groups):
        twice = next(g for k, g in enumerate(groups) if g in groups[:k])
        raise CryoreconError(
            f"{path}: optics group {twice} occurs twice in the optics table", "Remove one of them"
        )
    position = pd.Index(groups).get_indexer(pd.Index(wanted))
    if (position < 0).any():
        row = int(np.flatnonzero(position < 0)[0])
        raise CryoreconError(
            f"{path}, row {rows[row] + 1}: optics group {wanted[row]} is not in the optics table",
            f"Its groups are {', '.join(map(str, groups))}; correct the row or add the group",
        )
    return position.astype(np.int64)


def of_groups(
    path: Path, optics: pd.DataFrame, column: str, index: NDArray[np.int64]
) -> NDArray[np.float64]:
    """A number of each particle's optics group; groups that have no particle may hold anything.

    Parameters
    ----------
    index : array of int
        From :func:`optics_index`.
    """
    used, which = np.unique(index, return_inverse=True)
    return numbers(path, optics.iloc[used], column, rows=used)[which]


def _refuse_volumes(path: Path, optics: pd.DataFrame) -> None:
    """Subtomograms, whose first section is no image."""
    if "rlnImageDimensionality" in optics and (optics["rlnImageDimensionality"] == "3").any():
        raise CryoreconError(
            f"{path} names volumes, not images: its rlnImageDimensionality is 3",
            "Give images of single particles",
        )


def pixel_size_of(
    path: Path,
    table: TextTable,
    optics: pd.DataFrame | None,
    stack: Path,
    box: int,
) -> float:
    """Pixel size in angstrom, of most particles; optics groups that have none do not count.

    Parameters
    ----------
    stack : Path
        One of the stacks, of `box` samples a side, for messages.

    Raises
    ------
    CryoreconError
        If none is stated, they differ by more than 1 %, or the optics table names another box.
    """
    if optics is not None and len(optics) == 0:
        raise CryoreconError(f"{path}: its optics table is empty", "Add a row for each group")
    named, whole = None, optics
    if optics is not None and len(optics) > 1:
        # Selections keep the groups of all particles they were taken from.
        named = np.unique(optics_index(path, table, optics, np.arange(len(table), dtype=np.int32)))
        optics = optics.iloc[named]
    if optics is not None:
        _refuse_volumes(path, optics)
    if optics is not None and "rlnImageSize" in optics:
        sizes = integers(path, optics, "rlnImageSize", rows=named)
        if (sizes != box).any():
            raise CryoreconError(
                f"{path}: the optics table says {sizes[sizes != box][0]} px boxes, "
                f"{stack} has {box} px",
                "Correct rlnImageSize or give the stack it was written for",
            )
    found = _pixel_sizes(path, table, optics, named)
    if found.max() <= found.min() * (1 + SAME_SIZE):
        return float(found[0])
    if found.max() > found.min() * (1 + _NEARLY_ONE_SIZE):
        listed = ", ".join(f"{s:.8g}" for s in np.unique(found)[:4])
        raise CryoreconError(
            f"{path} mixes pixel sizes ({listed} A)",
            f"Rescale all particles to one pixel size, to {100 * _NEARLY_ONE_SIZE:g} %",
        )
    sizes, counts = np.unique(pixel_sizes_angst(path, table, whole), return_counts=True)
    return float(sizes[counts.argmax()])


def pixel_sizes_angst(
    path: Path, table: TextTable | pd.DataFrame, optics: pd.DataFrame | None
) -> NDArray[np.float64]:
    """Pixel size of each particle, which may differ; shape (n,).

    Raises
    ------
    CryoreconError
        If none is stated, one is no pixel size, or a particle's group is not in the optics table.
    """
    if optics is None or "rlnImagePixelSize" not in optics:
        return _pixel_sizes(path, table, None, None)
    index = optics_index(path, table, optics, np.arange(len(table), dtype=np.int32))
    named, which = np.unique(index, return_inverse=True)
    return _pixel_sizes(path, table, optics.iloc[named], named)[which]


def _pixel_sizes(
    path: Path,
    table: TextTable | pd.DataFrame,
    optics: pd.DataFrame | None,
    rows: NDArray[np.int64] | None,
) -> NDArray[np.float64]:
    """Of optics groups, which are `rows` of their table, or of particles."""
    found = _stated_pixel_sizes(path, table, optics, rows)
    bad = found[~((found >= _PIXEL_ANGST[0]) & (found <= _PIXEL_ANGST[1]))]
    if len(bad):
        raise CryoreconError(f"{path} states a pixel size of {bad[0]:g} A", "Correct it")
    return found


def _stated_pixel_sizes(
    path: Path,
    table: TextTable | pd.DataFrame,
    optics: pd.DataFrame | None,
    rows: NDArray[np.int64] | None,
) -> NDArray[np.float64]:
    if optics is not None and "rlnImagePixelSize" in optics:
        return numbers(path, optics, "rlnImagePixelSize", rows=rows)
    if "rlnImagePixelSize" in table:
        return numbers(path, table, "rlnImagePixelSize")
    if {"rlnDetectorPixelSize", "rlnMagnification"} <= set(table):
        detector_um = numbers(path, table, "rlnDetectorPixelSize")
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return detector_um * 1e4 / numbers(path, table, "rlnMagnification")
    if "rlnPixelSize" in table:
        return numbers(path, table, "rlnPixelSize")
    raise CryoreconError(
        f"{path} does not state the pixel size",
        "Add rlnImagePixelSize to the optics table (3.1) or rlnDetectorPixelSize and "
        "rlnMagnification to the particles (3.0)",
    )
