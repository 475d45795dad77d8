"""One-dimensional observations in NumPy files, read block by block; signals and tables out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryorecon.errors import CryoreconError, require_file
from cryorecon.io.files import replacing

_BLOCK_NUMBERS = 2**21
# Beyond this the n^3 numbers of the solver's derivatives no longer fit.
_MOST_POINTS = 256


class ObservationFile:
    """An ``.npy`` file of shape (N, n), real numbers, one observation a row; memory-mapped.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    CryoreconError
        If the file is missing, is no NumPy file, is truncated, holds objects, or has another shape
        or kind of numbers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = require_file(path, "NumPy file")
        try:
            # Never unpacks Python objects: those are refused.
            self.values = np.lib.format.open_memmap(self.path, mode="r")
        except Exception as error:
            # NumPy reports damage by exceptions of many kinds.
            reason = (str(error).strip().splitlines() or ["damaged"])[0]
            raise CryoreconError(
                f"{self.path} cannot be read as a NumPy array: {reason}",
                "Write it anew with numpy.save, as numbers of shape (observations, points)",
            ) from error
        shape, kind = self.values.shape, self.values.dtype
        if kind.kind not in "fiu":
            raise CryoreconError(
                f"{self.path} holds {kind} values", "Save real numbers, such as float32"
            )
        if len(shape) != 2 or shape[0] < 2 or not 4 <= shape[1] <= _MOST_POINTS:
            raise CryoreconError(
                f"{self.path} has shape {shape}",
                f"Save two or more observations of 4 to {_MOST_POINTS} points, one a row",
            )

    @property
    def count(self) -> int:
        """Observations in the file."""
        return int(self.values.shape[0])

    @property
    def points(self) -> int:
        """Points of an observation."""
        return int(self.values.shape[1])

    def blocks(self) -> Iterator[NDArray[np.float64]]:
        """All observations in order, in blocks of at most 16 MB.

        Raises
        ------
        CryoreconError
            At the first row with a value that is not finite, naming it.
        """
        size = max(1, _BLOCK_NUMBERS // self.points)
        for begin in range(0, self.count, size):
            with np.errstate(invalid="ignore"):
                block = np.array(self.values[begin : begin + size], dtype=np.float64)
            bad = ~np.isfinite(block).all(1)
            if bad.any():
                raise CryoreconError(
                    f"{self.path}: observation {begin + int(bad.argmax())} (counted from 0) holds "
                    "NaN or infinity",
                    "Remove or mend such observations",
                )
            yield block


def write_array(path: Path, values: NDArray[np.floating]) -> None:
    """Write an array as ``.npy``."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)


def write_columns(path: Path, columns: dict[str, NDArray[np.floating]]) -> None:
    """Write named columns of one length as CSV, the row's number first."""
    names = ["index", *columns]
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(",".join(names) + "\n")
        for row, values in enumerate(zip(*columns.values(), strict=True)):
            file.write(",".join([str(row), *(repr(float(value)) for value in values)]) + "\n")
