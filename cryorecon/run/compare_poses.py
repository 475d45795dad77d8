"""Poses of two particle STAR files compared image by image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryorecon.conventions import euler_to_matrix
from cryorecon.errors import CryoreconError
from cryorecon.io.cryosparc import is_cryosparc_file, read_cryosparc
from cryorecon.io.optics import pixel_sizes_angst, require_within
from cryorecon.io.stacks import bare_names
from cryorecon.io.star import Tables, numbers, read_star
from cryorecon.maps.poses import FRACTION_LIMITS_DEG, PoseComparison, compare_pose_sets
from cryorecon.physics.symmetry import fold_of
from cryorecon.run.curves import matrix_as_list
from cryorecon.run.settings import point_group

# Share of all poses that one turn must explain to be told of; of unlike poses some percent.
_MANY_TURNED = 0.2
_ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]


@dataclass(frozen=True)
class PoseTable:
    """Poses of a particle STAR file, with the names of the images they belong to.

    Attributes
    ----------
    path : Path
    images : Index
        ``number@stack`` with the number's leading zeros removed; no two are alike.
    rotations : Tensor, shape (n, 3, 3), float64
    origins_angst : Tensor, shape (n, 2), float64, or None
        None when the file has no origin columns.
    half_sets : array of float, shape (n,), or None
        rlnRandomSubset of each image; None when the file has no such column.
    """

    path: Path
    images: pd.Index[str]
    rotations: Tensor
    origins_angst: Tensor | None
    half_sets: NDArray[np.float64] | None = None

    def rows(self, index: NDArray[np.int64]) -> PoseTable:
        """Some rows, in the given order."""
        origins = None if self.origins_angst is None else self.origins_angst[index]
        halves = None if self.half_sets is None else self.half_sets[index]
        return PoseTable(self.path, self.images[index], self.rotations[index], origins, halves)


def read_pose_table(path: Path) -> PoseTable:
    """Read image names, angles and origins of a RELION 3.0, 3.1, 5 or cryoSPARC particle file.

    The images themselves need not exist.

    Raises
    ------
    CryoreconError
        If there is no particle table, or a pose column is missing.
    """
    blocks = _tables(path)
    table = next((t for t in blocks.values() if "rlnImageName" in t), None)
    if table is None:
        raise CryoreconError(
            f"{path} has no table with a column rlnImageName", "Give a particle STAR file"
        )
    if len(table) == 0:
        raise CryoreconError(f"{path} holds no particles: its table is empty", "Select some first")
    missing = [column for column in _ANGLES if column not in table]
    if missing:
        raise CryoreconError(
            f"{path} has no column {', '.join(missing)}", "Give a STAR file that holds poses"
        )
    images = _images(table)
    angles = np.stack([numbers(path, table, column) for column in _ANGLES], -1)
    origins = _origins_angst(path, table, blocks)
    halves = numbers(path, table, "rlnRandomSubset") if "rlnRandomSubset" in table else None
    return PoseTable(path, images, euler_to_matrix(torch.from_numpy(angles)), origins, halves)


def _images(table: pd.DataFrame) -> pd.Index[str]:
    """Names of images; where one occurs again, with how often it came before."""
    names = bare_names(table["rlnImageName"].astype(str))
    names = names.str.replace(r"^0+(?=\d+@)", "", regex=True)
    before = names.groupby(names).cumcount()
    # No name has a line break: none becomes that of another image.
    return pd.Index(names.where(before == 0, names + "\n" + before.astype(str)))


def _tables(path: Path) -> Tables:
    if not is_cryosparc_file(path):
        return read_star(path)
    optics, particles = read_cryosparc(path)
    return {"optics": optics, "particles": pd.concat(list(particles.frames()), ignore_index=True)}


def _origins_angst(path: Path, table: pd.DataFrame, blocks: Tables) -> Tensor | None:
    for names, in_px in (
        (("rlnOriginXAngst", "rlnOriginYAngst"), False),
        (("rlnOriginX", "rlnOriginY"), True),
    ):
        if set(names) <= set(table):
            origins = np.stack([numbers(path, table, name) for name in names], -1)
            optics = blocks.get("optics")
            scale = pixel_sizes_angst(path, table, optics)[:, None] if in_px else 1.0
            rows = np.arange(len(table), dtype=np.int32)
            for name, values in zip(names, (origins * scale).T, strict=True):
                require_within(path, rows, name, values)
            return torch.from_numpy(origins * scale)
    return None


def match_tables(a: PoseTable, b: PoseTable, *, common_only: bool) -> tuple[PoseTable, PoseTable]:
    """The two tables with the same images in the order of the first.

    Raises
    ------
    CryoreconError
        If an image is in one table only and `common_only` is off, or if none is in both.
    """
    place = b.images.get_indexer(a.images)
    shared = np.flatnonzero(place >= 0)
    if len(shared) == 0:
        raise CryoreconError(
            f"{a.path} and {b.path} have no image in common: the first names {a.images[0]}, "
            f"the second {b.images[0]}",
            "Give two STAR files of the same images, with the same paths in rlnImageName",
        )
    alone = len(a.images) - len(shared), len(b.images) - len(shared)
    if any(alone) and not common_only:
        raise CryoreconError(
            f"{alone[0]} of {len(a.images)} images of {a.path} are missing in {b.path}, "
            f"and {alone[1]} of {len(b.images)} the other way round",
            "Add --common to compare the images that are in both",
        )
    return a.rows(shared), b.rows(place[shared].astype(np.int64))


def compare_pose_files(
    first_path: Path, second_path: Path, *, common_only: bool = False, symmetry: str = "C1"
) -> PoseComparison:
    """Compare the poses of two STAR files; origins too when both have them.

    Parameters
    ----------
    symmetry : str
        Point group, on whose axes the first file's map lies.
    """
    group = point_group(symmetry)
    a, b = match_tables(
        read_pose_table(first_path), read_pose_table(second_path), common_only=common_only
    )
    both = a.origins_angst is not None and b.origins_angst is not None
    return compare_pose_sets(
        a.rotations,
        b.rotations,
        a.origins_angst if both else None,
        b.origins_angst if both else None,
        group,
    )


def turned_text(comparison: PoseComparison) -> str | None:
    """What to try where many poses differ by one turn, as copies in a symmetric particle do."""
    share, angle_deg = comparison.turned
    if share < _MANY_TURNED:
        return None
    fold = fold_of(angle_deg)
    group = "of the particle"
    if fold is not None:
        angle_deg, group = 360 / fold, f"such as C{fold}"
    return (
        f"{100 * share:.0f} % of the poses differ by one turn of {angle_deg:.0f} degrees, as those "
        f"of a symmetric particle may: give its --symmetry, {group}"
    )


def poses_as_dict(comparison: PoseComparison) -> dict[str, object]:
    """The comparison's summary as plain data."""
    data: dict[str, object] = {
        "images": len(comparison.angles_deg),
        "mirrored": comparison.flipped,
        "rotation": matrix_as_list(comparison.rotation),
        "median_deg": comparison.median_deg,
        "mean_deg": comparison.mean_deg,
        "fraction_within_deg": {
            f"{limit:g}": comparison.fraction_within(limit) for limit in FRACTION_LIMITS_DEG
        },
        "map_shift_angst": None,
        "offset_error_angst": None,
    }
    if comparison.shift_angst is not None and comparison.offsets_angst is not None:
        lengths = comparison.offsets_angst.norm(dim=-1)
        data["map_shift_angst"] = [float(value) for value in comparison.shift_angst]
        data["offset_error_angst"] = {
            "median": float(lengths.median()),
            "mean": float(lengths.mean()),
        }
    return data
