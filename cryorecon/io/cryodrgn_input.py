"""cryoDRGN's ``ctf.pkl`` and ``poses.pkl`` beside a stack, as RELION tables.

The conventions are those of :mod:`cryorecon.io.cryodrgn`: rotations are A, shifts are RELION
origins as fractions of the box side, the CTF in nine columns.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cryorecon.conventions import matrix_to_euler
from cryorecon.errors import CryoreconError, require_file
from cryorecon.io.mrc import read_header
from cryorecon.io.pickled_arrays import read_pickled_arrays
from cryorecon.io.star import can_be_a_file_name
from cryorecon.io.text_table import PIECE_ROWS, TextTable

_STACKS = (".mrcs", ".mrc")
_LIST = ".txt"
_LONGEST_LIST = 2**24
_PHASE_SHIFT = 8
# Columns of ctf.pkl.
_DEFOCUS = {"rlnDefocusU": 2, "rlnDefocusV": 3, "rlnDefocusAngle": 4, "rlnPhaseShift": _PHASE_SHIFT}
_MICROSCOPE = {"rlnVoltage": 5, "rlnSphericalAberration": 6, "rlnAmplitudeContrast": 7}
_SAME_ROTATION = 1e-3


def is_stack(path: str | Path) -> bool:
    """Whether a path names a stack, or a list of stacks, by its ending."""
    return Path(path).suffix.lower() in (*_STACKS, _LIST)


def read_stack_table(path: str | Path, ctf: str | Path) -> tuple[pd.DataFrame, TextTable]:
    """Optics and particle tables, in RELION 3.1's terms, of a stack with its ``ctf.pkl``.

    Where the stack's box is not that of ``ctf.pkl``, its images count as downsampled from there, as
    in cryoDRGN. A column of NaN for the phase shift is what cryoDRGN writes where none was known:
    it is read as 0.

    Parameters
    ----------
    path : path
        ``.mrcs`` or ``.mrc``, or a ``.txt`` file that names one stack a line, from its own folder.
    ctf : path
        ``ctf.pkl``, one row an image, in the stacks' order.

    Raises
    ------
    CryoreconError
        If a file is damaged, or stack and ``ctf.pkl`` do not belong together.
    """
    names, box = _image_names(Path(path))
    values = read_ctf(ctf)
    _same_length(Path(ctf), len(values), Path(path), len(names))
    columns = values[:, list(_MICROSCOPE.values())]
    _, first, which = np.unique(columns, axis=0, return_index=True, return_inverse=True)
    pixel = values[first, 1]
    if (values[first, 0] != box).any():
        pixel = (values[first, 0].astype(np.float64) * pixel / box).astype(values.dtype)
    optics = {
        "rlnOpticsGroup": _text(np.arange(len(first)) + 1),
        "rlnOpticsGroupName": [f"opticsGroup{k + 1}" for k in range(len(first))],
        **{name: _text(values[first, column]) for name, column in _MICROSCOPE.items()},
        "rlnImagePixelSize": _text(pixel),
        "rlnImageSize": [str(box)] * len(first),
        "rlnImageDimensionality": ["2"] * len(first),
    }
    group = which.reshape(-1) + 1

    def piece(rows: slice) -> pd.DataFrame:
        found = {"rlnImageName": names[rows], "rlnOpticsGroup": _text(group[rows])}
        found |= {name: _text(values[rows, column]) for name, column in _DEFOCUS.items()}
        return pd.DataFrame(found, dtype=object)

    pieces = (slice(start, start + PIECE_ROWS) for start in range(0, len(names), PIECE_ROWS))
    return pd.DataFrame(optics, dtype=object), TextTable.gather(map(piece, pieces))


def _text(values: NDArray[np.generic]) -> list[str]:
    """Shortest text that gives back the same number in the array's precision."""
    return [str(value) for value in values]


def _same_length(path: Path, count: int, images: Path, expected: int) -> None:
    if count != expected:
        raise CryoreconError(
            f"{path} has {count} rows, {images} {expected} images",
            "Give the file that belongs to these images, all of them in the same order",
        )


def _image_names(path: Path) -> tuple[list[str], int]:
    """``number@stack`` of each image, and samples a side of the first stack."""
    stacks = _listed(path) if path.suffix.lower() == _LIST else [path]
    names: list[str] = []
    box = 0
    for stack in stacks:
        name = os.fspath(stack)
        if not can_be_a_file_name(name):
            raise CryoreconError(
                f"{name!r} cannot be a file name in a STAR file",
                "Use names without quotes, # and line breaks",
            )
        count, _, side = read_header(stack).shape
        box = box or side
        names += [f"{number + 1:06d}@{name}" for number in range(count)]
    return names, box


def _listed(path: Path) -> list[Path]:
    require_file(path, "list of stacks")
    problem = CryoreconError(
        f"{path} is no list of stacks", "Write one path of an .mrcs file on each line"
    )
    if path.stat().st_size > _LONGEST_LIST:
        raise problem
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise problem from error
    found = [path.parent / line for line in lines if line]
    if not found or not all(stack.suffix.lower() in _STACKS for stack in found):
        raise problem
    return found


def read_ctf(path: str | Path) -> NDArray[np.floating]:
    """``ctf.pkl``: shape (n, 9), in the file's own precision, phase shifts never NaN.

    Raises
    ------
    CryoreconError
        If it has another shape, a number is not finite, or box and pixel size are not positive or
        differ from row to row.
    """
    path = Path(path)
    arrays = read_pickled_arrays(path, "ctf.pkl of cryoDRGN")
    if len(arrays) != 1 or arrays[0].ndim != 2 or arrays[0].shape[1] != 9 or not len(arrays[0]):
        raise CryoreconError(
            f"{path} is no CTF table: it holds {_shapes(arrays)}, not one array of (images, 9)",
            "Give the ctf.pkl that cryodrgn parse_ctf_star or parse_ctf_csparc wrote",
        )
    values = arrays[0] if arrays[0].dtype.kind == "f" else arrays[0].astype(np.float64)
    if np.isnan(values[:, _PHASE_SHIFT]).all():
        values[:, _PHASE_SHIFT] = 0
    _require_finite(path, values)
    if not (values[:, [0, 1, 5]] > 0).all():
        row = int(np.argmin((values[:, [0, 1, 5]] > 0).all(1)))
        raise CryoreconError(
            f"{path}, row {row + 1}: box, pixel size and voltage must be positive",
            "Write it again with cryodrgn parse_ctf_star, -D and --Apix",
        )
    if len(np.unique(values[:, :2], axis=0)) > 1:
        raise CryoreconError(
            f"{path} mixes box or pixel sizes", "Rescale all particles to one box and pixel size"
        )
    return values


def read_poses(path: str | Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``poses.pkl``: rotations A and shifts as fractions of the box; 0 where it has none.

    Returns
    -------
    rotations : array, shape (n, 3, 3)
    shifts : array, shape (n, 2)

    Raises
    ------
    CryoreconError
        If the shapes are others, a number is not finite, a matrix is no rotation, or a shift is
        larger than the box, as in files of old versions, whose unit is the pixel.
    """
    path = Path(path)
    arrays = read_pickled_arrays(path, "poses.pkl of cryoDRGN")
    count = len(arrays[0]) if arrays and arrays[0].ndim else 0
    if not count or [a.shape for a in arrays] != [(count, 3, 3), (count, 2)][: len(arrays)]:
        raise CryoreconError(
            f"{path} holds no poses but {_shapes(arrays)}, not rotations (images, 3, 3) and shifts "
            "(images, 2)",
            "Give the poses.pkl that cryodrgn parse_pose_star or a cryodrgn run wrote",
        )
    # In their own precision: NumPy warns of some NaNs when they are cast.
    for values in arrays:
        _require_finite(path, values)
    rotations = arrays[0].astype(np.float64)
    shifts = arrays[1].astype(np.float64) if len(arrays) > 1 else np.zeros((count, 2))
    with np.errstate(over="ignore", invalid="ignore"):
        off = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
        turned = (off < _SAME_ROTATION) & (np.linalg.det(rotations) > 0)
    if not turned.all():
        raise CryoreconError(
            f"{path}, row {int(turned.argmin()) + 1}: the matrix is no rotation "
            f"({int((~turned).sum())} such rows)",
            "Give rotation matrices; write the file again",
        )
    far = (np.abs(shifts) > 1).any(1)
    if far.any():
        raise CryoreconError(
            f"{path}, row {int(far.argmax()) + 1}: the shift is larger than the box "
            f"({int(far.sum())} such rows)",
            "Shifts must be fractions of the box, not pixels; write the file again",
        )
    return rotations, shifts


def pose_columns(
    path: str | Path, images: Path, count: int, side_angst: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Euler angles in degrees (n, 3) and origins in angstrom (n, 2) from a ``poses.pkl``.

    Parameters
    ----------
    images : Path
        What the poses belong to, for messages.
    count : int
        Its particles.
    side_angst : float
        Of the box.

    Raises
    ------
    CryoreconError
        As :func:`read_poses`, or if there are more or fewer poses than particles.
    """
    rotations, shifts = read_poses(path)
    _same_length(Path(path), len(rotations), images, count)
    return matrix_to_euler(torch.from_numpy(rotations)).numpy(), shifts * side_angst


def _shapes(arrays: tuple[NDArray[np.generic], ...]) -> str:
    shown = " and ".join(str(a.shape) for a in arrays[:3])
    return f"arrays of shape {shown}" if shown else "nothing"


def _require_finite(path: Path, values: NDArray[Any]) -> None:
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        raise CryoreconError(
            f"{path}, row {int(finite.argmin()) + 1}: not a finite number "
            f"({int((~finite).sum())} such rows)",
            "Correct or remove these images",
        )
