"""cryoSPARC particle files (``.cs``): NumPy structured arrays, read as RELION tables.

Fields and their meaning, in RELION's terms:

* ``blob/path``, ``blob/idx`` (from 0): the image; paths are relative to the project folder and may
  begin with ``>``, which is no part of them.
* ``alignments3D/pose`` (from ab initio jobs ``alignments_class_K/pose``): rotation vector, in
  radians, of the transpose of A. ``.../shift``: the RELION origin in pixels of ``.../psize_A``.
* ``ctf/*``: defocus in angstrom, angles in radians, otherwise RELION's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryorecon.conventions import matrix_to_euler
from cryorecon.errors import CryoreconError, require_file
from cryorecon.io.star import can_be_a_file_name
from cryorecon.io.text_table import PIECE_ROWS, TextTable

Fields = dict[str, NDArray[np.generic]]
# Text of some rows of a column: a million rows as Python strings would take a gigabyte.
Text = Callable[[slice], list[str]]

# Columns that no RELION program uses, kept so that the way back finds the same particles.
UID_COLUMN = "cryosparcUid"
SIGN_COLUMN = "cryosparcBlobSign"
# Of optics groups; cryoSPARC's number of the group follows.
GROUP_NAME = "expGroup"

# After a first byte that tells the version.
_STREAMED = b"CSDAT"
_NUMPY = b"\x93NUMPY"
_CTF = {
    "ctf/df1_A": "rlnDefocusU",
    "ctf/df2_A": "rlnDefocusV",
    "ctf/df_angle_rad": "rlnDefocusAngle",
}
_MICROSCOPE = {
    "ctf/accel_kv": "rlnVoltage",
    "ctf/cs_mm": "rlnSphericalAberration",
    "ctf/amp_contrast": "rlnAmplitudeContrast",
    "blob/psize_A": "rlnImagePixelSize",
}
# What changes an image and is not read, with the value that changes nothing.
_UNREAD = {
    "ctf/tilt_A": 0.0,
    "ctf/trefoil_A": 0.0,
    "ctf/tetra_A": 0.0,
    "ctf/anisomag": 0.0,
    "ctf/shift_A": 0.0,
    "ctf/bfactor": 0.0,
    "ctf/scale": 1.0,
    "ctf/scale_const": 0.0,
}
_NEEDED = ("blob/path", "blob/idx", *_CTF, *_MICROSCOPE)
_PASSTHROUGH = (
    "It may be in the job's passthrough file: join both with cryorecon export FILE.cs "
    "--passthrough PASSTHROUGH.cs --to relion"
)


def is_cryosparc_file(path: str | Path) -> bool:
    """Whether a file is a cryoSPARC table, by its name or its first bytes."""
    path = Path(path)
    if path.suffix == ".cs" or not path.is_file():
        return path.suffix == ".cs"
    try:
        with path.open("rb") as file:
            magic = file.read(6)
    except OSError:
        return False
    return magic == _NUMPY or magic[1:] == _STREAMED


def read_fields(path: str | Path, passthrough: str | Path | None = None) -> Fields:
    """Fields of a cryoSPARC file by name, each with one entry (or row) a particle.

    Parameters
    ----------
    passthrough : path, optional
        Another cryoSPARC file that has further fields of the same particles, joined by ``uid``.

    Raises
    ------
    CryoreconError
        If a file is damaged, holds Python objects or no table, or particles are missing.
    """
    fields = _fields_of(_load(path))
    if passthrough is None:
        return fields
    more = _fields_of(_load(passthrough))
    for name, source in ((path, fields), (passthrough, more)):
        if "uid" not in source or source["uid"].dtype.kind not in "iu":
            raise _missing(Path(name), "uid", "Give the passthrough file of the same job")
    rows = pd.Index(more["uid"]).drop_duplicates().get_indexer(pd.Index(fields["uid"]))
    if (rows < 0).any() or len(np.unique(more["uid"])) < len(more["uid"]):
        raise CryoreconError(
            f"{passthrough} lacks {int((rows < 0).sum())} of the {len(rows)} particles of {path}, "
            "or names some twice",
            "Give the passthrough file of the same job",
        )
    return {**{name: values[rows] for name, values in more.items()}, **fields}


def unread_fields(path: str | Path) -> list[str]:
    """Fields of a file that change images and are not read.

    Raises
    ------
    CryoreconError
        As :func:`read_fields`.
    """
    fields = _fields_of(_load(path))
    return [
        name
        for name, neutral in _UNREAD.items()
        if name in fields
        and fields[name].dtype.kind in "fiu"
        and bool((np.abs(fields[name].astype(np.float64) - neutral) > 1e-6).any())
    ]


def _load(path: str | Path) -> NDArray[np.void]:
    path = require_file(path, "cryoSPARC file")
    try:
        with path.open("rb") as file:
            magic = file.read(6)
        if magic[1:] == _STREAMED:
            raise CryoreconError(
                f"{path} is in cryoSPARC's streamed format, not a NumPy array",
                "Write it with cryosparc-tools: Dataset.load(FILE).save(FILE, format=NUMPY_FORMAT)",
            )
        # Mapped, so that a damaged header cannot ask for more memory than the file has; objects,
        # which would run code, are refused.
        table = np.lib.format.open_memmap(path, mode="r")
        if table.dtype.names is None or table.ndim != 1:
            raise ValueError(f"it holds no table but {table.dtype} of shape {table.shape}")
        return np.array(table)
    except CryoreconError:
        raise
    except Exception as error:
        # NumPy reports damage by exceptions of many kinds.
        reason = (str(error).strip().splitlines() or ["damaged"])[0]
        raise CryoreconError(
            f"{path} cannot be read as a cryoSPARC particle file: {reason}",
            "Give an undamaged .cs file of particles; objects inside it are not read",
        ) from error


def _fields_of(table: NDArray[np.void]) -> Fields:
    return {str(name): table[name] for name in table.dtype.names or ()}


def _missing(path: Path, name: str, remedy: str) -> CryoreconError:
    return CryoreconError(f"{path} has no usable field {name}", remedy)


def _numbers(path: Path, fields: Fields, name: str, *width: int) -> NDArray[Any]:
    """A field of real, finite numbers, in the file's own precision."""
    if name not in fields:
        raise _missing(path, name, _PASSTHROUGH)
    values = fields[name]
    if values.dtype.kind not in "fiu" or values.shape[1:] != width:
        raise CryoreconError(
            f"{path}, field {name}: {values.dtype} of shape {values.shape[1:]} a particle where "
            f"numbers of shape {width} are expected",
            "Write the file again; its fields are not those of cryoSPARC",
        )
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        raise CryoreconError(
            f"{path}, row {int(finite.argmin()) + 1}, field {name}: not a finite number "
            f"({int((~finite).sum())} such rows)",
            "Correct or remove these particles",
        )
    return values


def _paths(path: Path, fields: Fields, name: str) -> NDArray[np.object_]:
    """File names of a field as text, without the mark of a project-relative path."""
    values = fields[name]
    if values.dtype.kind not in "SU" or values.ndim != 1:
        raise CryoreconError(
            f"{path}, field {name}: {values.dtype} where file names are expected",
            "Write the file again; its fields are not those of cryoSPARC",
        )
    distinct, which = np.unique(values, return_inverse=True)
    names: list[str] = []
    for value in distinct.tolist():
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        text = text.removeprefix(">")
        if not can_be_a_file_name(text):
            raise CryoreconError(
                f"{path}, row {int(np.argmax(which == len(names))) + 1}, field {name}: {text!r} "
                "cannot be a file name in a STAR file",
                "Use names without quotes, # and line breaks",
            )
        names.append(text)
    return np.array(names, dtype=object)[which]


def _shortest(values: NDArray[np.generic]) -> list[str]:
    """Shortest text that gives back the same number in the array's precision."""
    return [str(value) for value in values]


def _text(values: NDArray[np.generic]) -> Text:
    return lambda rows: _shortest(values[rows])


def _decimals(values: NDArray[np.floating]) -> Text:
    return lambda rows: [f"{value:.6f}" for value in values[rows].tolist()]


def _poses(path: Path, fields: Fields, pixel: NDArray[Any]) -> dict[str, Text]:
    """Angles, origins and class of RELION; nothing where the file has no 3-D poses."""
    prefixes = [n[:-5] for n in fields if re.fullmatch(r"alignments(3D|_class_\d+)/pose", n)]
    if not prefixes:
        return {}
    columns: dict[str, Text] = {}
    if "alignments3D" in prefixes:
        prefixes, chosen = ["alignments3D"], np.zeros(len(pixel), dtype=np.int64)
    else:
        prefixes.sort(key=lambda prefix: int(prefix.rsplit("_", 1)[1]))
        chosen = np.zeros(len(pixel), dtype=np.int64)
        if len(prefixes) > 1:
            posterior = [_numbers(path, fields, f"{p}/class_posterior") for p in prefixes]
            chosen = np.argmax(posterior, 0)
            columns["rlnClassNumber"] = _text(chosen + 1)
    pose, shift = np.zeros((len(pixel), 3)), np.zeros((len(pixel), 2))
    for number, prefix in enumerate(prefixes):
        mine = chosen == number
        scale = pixel
        if f"{prefix}/psize_A" in fields:
            told = _numbers(path, fields, f"{prefix}/psize_A")
            scale = np.where(told > 0, told, pixel)
        pose[mine] = _numbers(path, fields, f"{prefix}/pose", 3)[mine]
        shift_px = _numbers(path, fields, f"{prefix}/shift", 2).astype(np.float64)
        shift[mine] = (shift_px * scale[:, None])[mine]
    rotations = torch.from_numpy(Rotation.from_rotvec(pose).as_matrix()).mT
    angles = matrix_to_euler(rotations).T.numpy()
    for name, values in zip(("Rot", "Tilt", "Psi"), angles, strict=True):
        columns[f"rlnAngle{name}"] = _decimals(values)
    for axis, values in zip("XY", shift.T, strict=True):
        columns[f"rlnOrigin{axis}Angst"] = _decimals(values)
    return columns


def _optics(path: Path, fields: Fields) -> tuple[pd.DataFrame, Text]:
    """Optics table, a group for each distinct set of its values, and each particle's group."""
    columns = {label: _numbers(path, fields, name) for name, label in _MICROSCOPE.items()}
    if "blob/shape" in fields:
        columns["rlnImageSize"] = _numbers(path, fields, "blob/shape", 2)[:, 0]
    group = np.zeros(len(fields["blob/idx"]), dtype=np.int64)
    if "ctf/exp_group_id" in fields:
        group = _numbers(path, fields, "ctf/exp_group_id").astype(np.int64)
    keys = np.stack([group, *columns.values()], 1)
    _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    table = {
        "rlnOpticsGroup": _shortest(np.arange(len(first)) + 1),
        "rlnOpticsGroupName": [f"{GROUP_NAME}{number}" for number in group[first]],
        **{label: _shortest(values[first]) for label, values in columns.items()},
        "rlnImageDimensionality": ["2"] * len(first),
    }
    return pd.DataFrame(table, dtype=object), _text(which.reshape(-1) + 1)


def read_cryosparc(
    path: str | Path, passthrough: str | Path | None = None
) -> tuple[pd.DataFrame, TextTable]:
    """Optics and particle tables, in RELION 3.1's terms, of a cryoSPARC particle file.

    Poses come from ``alignments3D``, else from the likeliest ``alignments_class_K``; half sets
    from ``alignments3D/split`` where it has two. ``uid`` and ``blob/sign`` are kept in columns of
    their own. Higher aberrations, B-factors and scales are not read.

    Parameters
    ----------
    passthrough : path, optional
        As in :func:`read_fields`.

    Raises
    ------
    CryoreconError
        Naming the file and the field that is missing, of another kind, or not finite.
    """
    path = Path(path)
    fields = read_fields(path, passthrough)
    for name in _NEEDED:
        if name not in fields:
            raise _missing(path, name, _PASSTHROUGH)
    if not len(fields["blob/idx"]):
        raise CryoreconError(f"{path} holds no particles: its table is empty", "Select some first")
    stacks, sections = _paths(path, fields, "blob/path"), _numbers(path, fields, "blob/idx")
    optics, group = _optics(path, fields)

    def image_names(rows: slice) -> list[str]:
        numbers = (sections[rows].astype(np.int64) + 1).tolist()
        return [f"{n:06d}@{stack}" for n, stack in zip(numbers, stacks[rows], strict=True)]

    columns: dict[str, Text] = {"rlnImageName": image_names}
    if "location/micrograph_path" in fields:
        columns["rlnMicrographName"] = _text(_paths(path, fields, "location/micrograph_path"))
    columns["rlnOpticsGroup"] = group
    columns |= _ctf_columns(path, fields)
    columns |= _poses(path, fields, _numbers(path, fields, "blob/psize_A"))
    if "alignments3D/split" in fields:
        split = _numbers(path, fields, "alignments3D/split")
        if set(np.unique(split).tolist()) == {0, 1}:
            columns["rlnRandomSubset"] = _text(split.astype(np.int64) + 1)
    if "uid" in fields and fields["uid"].dtype.kind == "u":
        columns[UID_COLUMN] = _text(_numbers(path, fields, "uid"))
    if "blob/sign" in fields:
        columns[SIGN_COLUMN] = _text(_numbers(path, fields, "blob/sign").astype(np.int64))
    pieces = (slice(start, start + PIECE_ROWS) for start in range(0, len(stacks), PIECE_ROWS))
    return optics, TextTable.gather(
        pd.DataFrame({name: text(rows) for name, text in columns.items()}, dtype=object)
        for rows in pieces
    )


def _ctf_columns(path: Path, fields: Fields) -> dict[str, Text]:
    columns = {}
    for name, label in _CTF.items():
        values = _numbers(path, fields, name)
        columns[label] = _text(
            np.rad2deg(values.astype(np.float64)) if name.endswith("_rad") else values
        )
    if "ctf/phase_shift_rad" in fields:
        phase = _numbers(path, fields, "ctf/phase_shift_rad").astype(np.float64)
        columns["rlnPhaseShift"] = _text(np.rad2deg(phase))
    return columns
