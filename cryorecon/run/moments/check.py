"""Whether a moments file holds what it says, before anything is made from it."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryorecon.engines.moments.forms import FullMoments, MomentsGeometry, SteerableMoments
from cryorecon.engines.moments.third import n_pairs
from cryorecon.errors import CryoreconError
from cryorecon.io.moments_file import Attribute, MomentsData

_LARGEST_BOX = 4096
_MOST_IMAGES = 2**53
_WORDS = {"form": ("steerable", "full"), "contrast": ("auto", "white", "black")}
_REMEDY = "Estimate the moments again"


def geometry_of(path: Path, data: MomentsData) -> MomentsGeometry:
    """The geometry in a file's attributes.

    Raises
    ------
    CryoreconError
        If an attribute is missing, of another kind, or does not fit the others or the sums.
    """
    attributes = {"third_radius": 0} | dict(data.attributes)
    for field in fields(MomentsGeometry):
        if field.name not in attributes:
            raise CryoreconError(
                f"{path} lacks the attribute {field.name} of a moments file", _REMEDY
            )
        value = attributes[field.name]
        if not _is_kind(value, str(field.type), field.name):
            raise CryoreconError(f"{path}: its attribute {field.name} cannot be {value!r}", _REMEDY)
    geometry = MomentsGeometry.from_attributes(attributes)
    for name in ("noise_power", "aa" if geometry.form == "full" else "second"):
        stored = data.arrays.get(f"sums/{name}")
        if stored is None or stored.ndim == 0:
            raise CryoreconError(f"{path} lacks sums/{name}", _REMEDY)
    if not _fits(geometry) or not _is_of(geometry, data):
        raise CryoreconError(f"{path}: its attributes contradict each other or its arrays", _REMEDY)
    return geometry


def _is_kind(value: Attribute, kind: str, name: str) -> bool:
    if name in _WORDS:
        return value in _WORDS[name]
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and 0 <= value <= _LARGEST_BOX
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0


def _fits(geometry: MomentsGeometry) -> bool:
    sizes = (geometry.box, geometry.max_radius, geometry.pixel_size_angst, geometry.side_angst)
    if min(sizes) <= 0 or not 0 < geometry.diameter_angst <= geometry.image_side_angst:
        return False
    if geometry.third_radius > (geometry.max_radius if geometry.form == "steerable" else 0):
        return False
    # Radii within the images' band.
    return 2 * geometry.max_radius * geometry.pixel_size_angst <= geometry.side_angst * (1 + 1e-6)


def _is_of(geometry: MomentsGeometry, data: MomentsData) -> bool:
    """Whether the sums are as large as the geometry says: it must not ask for more memory."""
    sums, radii = data.group("sums"), geometry.max_radius
    if abs(len(sums["noise_power"]) - geometry.box / 2) > 1:
        return False
    if geometry.form == "full":
        return sums["aa"].ndim == 2 and len(sums["aa"]) > radii**2
    if geometry.third_radius:
        R = geometry.third_radius
        third = sums.get("third")
        if third is None or third.shape != (n_pairs(geometry.third_order), R, R, R):
            return False
    return sums["second"].shape == (geometry.max_order + 1, radii, radii)


def count_of(path: Path, data: MomentsData, name: str) -> int:
    """A number of images among the attributes.

    Raises
    ------
    CryoreconError
        If it is none.
    """
    value = data.attributes.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MOST_IMAGES:
        raise CryoreconError(f"{path}: its attribute {name} is no number of images", _REMEDY)
    return value


def array_of(path: Path, data: MomentsData, name: str, like: Tensor) -> Tensor:
    """An array of the file, of the shape and kind of `like`.

    Raises
    ------
    CryoreconError
        If it is missing, is of another shape or kind, or holds NaN, or infinity where it is no
        error.
    """
    stored = data.arrays.get(name)
    if stored is None or stored.shape != tuple(like.shape):
        raise CryoreconError(
            f"{path} lacks {name}, or it has another shape than the file's attributes say", _REMEDY
        )
    if not np.can_cast(stored.dtype, like.numpy(force=True).dtype, "same_kind"):
        raise CryoreconError(f"{path}: {name} holds {stored.dtype} values", _REMEDY)
    bad = np.isnan(stored) if name.endswith("_error") else ~np.isfinite(stored)
    if bad.any():
        raise CryoreconError(
            f"{path}: {name} holds {int(bad.sum())} values that are not finite", _REMEDY
        )
    return torch.from_numpy(stored).to(like)


def moments_like(geometry: MomentsGeometry) -> dict[str, Tensor]:
    """Empty tensors of the shape and type of each array of the moments.

    They share one number each: nothing large is made.
    """
    real, compl = torch.float64, torch.complex128
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    if geometry.form == "steerable":
        radii, orders = geometry.max_radius, geometry.max_order + 1
        pairs = (orders, radii, radii)
        shapes = {"first": (real, (radii,)), "second": (compl, pairs), "noise": (compl, pairs)}
        shapes |= {"first_error": (real, (radii,)), "second_error": (real, pairs)}
        shapes |= {"measured": (torch.bool, (radii, radii)), "conditioning": (real, (radii,))}
        if geometry.third_radius:
            entries = (n_pairs(geometry.third_order), *(geometry.third_radius,) * 3)
            shapes |= {"third": (compl, entries), "third_error": (real, entries)}
    else:
        plane = geometry.plane()
        n = len(plane)
        shapes = {"frequencies": (torch.int64, (n, 2)), "first": (compl, (n,))}
        shapes |= {"second": (compl, (n, n)), "pseudo": (compl, (n, n)), "noise": (real, (n,))}
        shapes |= {"first_error": (real, (n,)), "second_error": (real, (n, n))}
        shapes |= {"measured": (torch.bool, (n, n)), "conditioning": (real, (plane.n_shells,))}
    return {name: torch.zeros((), dtype=kind).expand(s) for name, (kind, s) in shapes.items()}


def moments_of_file(path: Path, data: MomentsData) -> SteerableMoments | FullMoments:
    """Finished moments of a file.

    Raises
    ------
    CryoreconError
        If it does not hold them.
    """
    geometry = geometry_of(path, data)
    values: dict[str, Any] = {
        name: array_of(path, data, f"moments/{name}", like)
        for name, like in moments_like(geometry).items()
    }
    kind = SteerableMoments if geometry.form == "steerable" else FullMoments
    return kind(geometry, count_of(path, data, "n_images"), **values)
