"""A Fourier shell correlation with its conditions, and the files that hold it.

``fsc.star`` is laid out as ``relion_postprocess`` does, ``fsc.xml`` as the EMDB takes it. A curve
never goes without the mask and the alignment it was measured with, a resolution never without
its threshold.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pandas as pd
import torch
from torch import Tensor

from cryorecon.conventions import shell_to_angst
from cryorecon.errors import CryoreconError
from cryorecon.io.files import replacing
from cryorecon.io.star import numbers, read_star
from cryorecon.maps.fsc import MaskedFsc, crossing_shell, resolution_at

# RELION writes the origin of reciprocal space, whose resolution is infinite, as 999 angstrom.
_INFINITE_ANGST = 999.0
THRESHOLDS = (0.5, 0.143)
_TAKEN_OUT = " (its effect taken out)"
_CONDITIONS = re.compile(
    rf"# cryorecon; FSC of (.*); (?:no mask|mask (.*?)(?:{re.escape(_TAKEN_OUT)})?), "
    r"maps (not )?aligned"
)
# RELION's columns of a curve inside a mask: what resolutions are read off first.
_MASKED_LABELS = {
    "corrected": "rlnFourierShellCorrelationCorrected",
    "unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
    "masked": "rlnFourierShellCorrelationMaskedMaps",
    "randomised": "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
}


@dataclass(frozen=True)
class FscCurve:
    """A Fourier shell correlation and the conditions it was measured under.

    Attributes
    ----------
    values : Tensor, shape (N // 2 + 1,), or fewer of images that were cropped
        From :func:`cryorecon.maps.fsc.fsc_curve`.
    box : int
        N.
    pixel_size_angst : float
    maps : str
        What was compared, such as ``half1_unfil.mrc and half2_unfil.mrc`` or
        ``shared-pose half maps``.
    mask : str, optional
        Name of the mask that both maps were multiplied with.
    aligned : bool
        Whether one map was moved onto the other first.
    parts : MaskedFsc, optional
        Where `values` are without what the mask brings: what they were made of.
    """

    values: Tensor
    box: int
    pixel_size_angst: float
    maps: str
    mask: str | None = None
    aligned: bool = False
    parts: MaskedFsc | None = None

    @property
    def conditions(self) -> str:
        """Mask and alignment in words."""
        mask = f"mask {self.mask}" if self.mask else "no mask"
        mask += _TAKEN_OUT if self.parts is not None else ""
        return f"{mask}, maps {'aligned first' if self.aligned else 'not aligned'}"

    def resolution_angst(self, threshold: float) -> float:
        """Resolution of the first crossing; see :func:`cryorecon.maps.fsc.resolution_at`."""
        return resolution_at(self.values, threshold, self.box, self.pixel_size_angst)

    def resolution_text(self, threshold: float) -> str:
        """The first crossing in words, such as ``FSC = 0.143 at 3.12 A``."""
        shell = crossing_shell(self.values, threshold)
        if shell == 0:
            return f"FSC < {threshold:g} from the first shell on"
        angst = f"{self.resolution_angst(threshold):.2f} A"
        if shell >= len(self.values) - 1:
            return f"FSC >= {threshold:g} to the last shell, {angst}"
        return f"FSC = {threshold:g} at {angst}"

    def shells_angst(self) -> list[float]:
        """Resolution of each shell in angstrom; infinite for the first."""
        return [shell_to_angst(s, self.box, self.pixel_size_angst) for s in range(len(self.values))]


def write_fsc_star(path: str | Path, curve: FscCurve, threshold: float = 0.143) -> None:
    """Write ``data_general`` and ``data_fsc`` with RELION's labels.

    A curve inside a mask stands under ``rlnFourierShellCorrelationCorrected`` with its parts, or,
    where these are not known, under ``rlnFourierShellCorrelationMaskedMaps``; an unmasked one under
    ``rlnFourierShellCorrelationUnmaskedMaps``. ``rlnFinalResolution`` is 999 when the curve is
    below the threshold from the first shell on.

    Parameters
    ----------
    threshold : float
        Of ``rlnFinalResolution``.
    """
    final = curve.resolution_angst(threshold)
    general = [f"_rlnFinalResolution {_finite(final):12.6f}"]
    if curve.mask:
        # RELION takes a value up to the next blank, quotes or not.
        general.append(f"_rlnMaskName {curve.mask.replace(' ', '_')}")
    columns = _columns(curve)
    labels = ["rlnSpectralIndex", "rlnResolution", "rlnAngstromResolution", *columns]
    values = zip(curve.shells_angst(), *columns.values(), strict=True)
    rows = [
        f"{shell:12d} {1 / _finite(angst):12.6f} {_finite(angst):12.6f} "
        + " ".join(f"{float(value):12.6f}" for value in at_shell)
        for shell, (angst, *at_shell) in enumerate(values)
    ]
    lines = [
        f"# cryorecon; FSC of {curve.maps}; {curve.conditions}",
        f"# rlnFinalResolution is where the FSC falls below {threshold:g}",
        "\ndata_general\n",
        *general,
        "\n\ndata_fsc\n\nloop_",
        *(f"_{label} #{number}" for number, label in enumerate(labels, 1)),
        *rows,
    ]
    _write_text(path, "\n".join(lines) + "\n\n")


def _columns(curve: FscCurve) -> dict[str, Tensor]:
    """RELION's names of a curve and of what it was made of."""
    if curve.parts is not None:
        return {label: getattr(curve.parts, name) for name, label in _MASKED_LABELS.items()}
    name = "masked" if curve.mask else "unmasked"
    return {_MASKED_LABELS[name]: curve.values}  # noqa: PD011


def read_fsc_star(path: str | Path, box: int, pixel_size_angst: float) -> FscCurve:
    """Read what :func:`write_fsc_star` or ``relion_postprocess`` wrote.

    Of images that were Fourier cropped the curve ends before the maps' Nyquist frequency.

    Parameters
    ----------
    box : int
        Of the maps.
    pixel_size_angst : float

    Raises
    ------
    CryoreconError
        If the file holds no curve, or one of another box.
    """
    table = read_star(path).get("fsc", pd.DataFrame())
    columns = [c for c in map(str, table) if c.startswith("rlnFourierShellCorrelation")]
    if not columns:
        raise CryoreconError(
            f"{path} holds no Fourier shell correlation", "Give a file that cryorecon fsc wrote"
        )
    shells, side_angst = box // 2 + 1, box * pixel_size_angst
    if len(table) > shells or (len(table) < shells and not _as_wide(path, table, side_angst)):
        raise CryoreconError(
            f"{path} has {len(table)} shells that are not those of a map of {box} px at "
            f"{pixel_size_angst:g} A",
            "Keep one job's files in a directory: this one is of another box",
        )
    values = torch.from_numpy(numbers(path, table, columns[0]))
    parts = None
    if set(_MASKED_LABELS.values()) <= set(table):
        found = {k: torch.from_numpy(numbers(path, table, v)) for k, v in _MASKED_LABELS.items()}
        values, parts = found["corrected"], MaskedFsc(**found)
    with Path(path).open(encoding="utf-8") as file:
        told = _CONDITIONS.match(next(file))
    if told is None:
        return FscCurve(values, box, pixel_size_angst, f"maps of {Path(path).name}", parts=parts)
    return FscCurve(values, box, pixel_size_angst, told[1], told[2], told[3] is None, parts)


def _as_wide(path: str | Path, table: pd.DataFrame, side_angst: float) -> bool:
    """Whether a curve is of maps of this width: shell 1 is one cycle of it."""
    if len(table) < 2 or "rlnAngstromResolution" not in table:
        return False
    width = float(numbers(path, table, "rlnAngstromResolution")[1])
    return abs(width / side_angst - 1) < 0.01


def write_fsc_xml(path: str | Path, curve: FscCurve) -> None:
    """Write the curve in the EMDB's format: spatial frequency in 1/angstrom and correlation."""
    title = quoteattr(f"FSC of {curve.maps}; {curve.conditions}")
    width = curve.box * curve.pixel_size_angst
    points = [
        f"  <coordinate>\n    <x>{shell / width:.6f}</x>\n"
        f"    <y>{float(value):.6f}</y>\n  </coordinate>"
        for shell, value in enumerate(curve.values)
    ]
    head = f'<fsc title={title} xaxis="Resolution (A-1)" yaxis="Correlation Coefficient">'
    _write_text(path, "\n".join([head, *points, "</fsc>"]) + "\n")


def fsc_as_dict(curve: FscCurve) -> dict[str, object]:
    """The curve, its conditions and its crossings as plain data; infinity becomes None."""
    return {
        "maps": curve.maps,
        "box": curve.box,
        "pixel_size_angst": curve.pixel_size_angst,
        "mask": curve.mask,
        "aligned": curve.aligned,
        "resolution_angst": {
            f"{threshold:g}": _or_none(curve.resolution_angst(threshold))
            for threshold in THRESHOLDS
        },
        "shells": [
            {"shell": shell, "resolution_angst": _or_none(angst), **_at_shell(curve, shell)}
            for shell, angst in enumerate(curve.shells_angst())
        ],
    }


def _at_shell(curve: FscCurve, shell: int) -> dict[str, float]:
    """The curve at a shell, and what it was made of there."""
    found = {"fsc": float(curve.values[shell])}  # noqa: PD011
    if curve.parts is not None:
        names = ("unmasked", "masked", "randomised")
        found |= {name: float(getattr(curve.parts, name)[shell]) for name in names}
    return found


def write_json(path: str | Path, data: Mapping[str, object]) -> None:
    """Write plain data as JSON, two spaces deep; NaN and infinity are refused."""
    _write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def _write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _finite(angst: float) -> float:
    return angst if math.isfinite(angst) else _INFINITE_ANGST


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def matrix_as_list(matrix: Tensor) -> list[list[float]]:
    """A matrix as nested lists for JSON."""
    return [[float(value) for value in row] for row in matrix.to(torch.float64)]
