"""The jobs that a consensus takes: their maps, half maps, poses, and what they claim."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import Map, read_map
from cryorecon.io.star import numbers, read_star
from cryorecon.maps.agreement import Volumes
from cryorecon.run.compare_poses import PoseTable, match_tables, read_pose_table

MAP, POSES = "initial_model.mrc", "run_data.star"
_HALVES = ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc")
# Headers store the cell in float32, and programs round the pixel size differently.
_PIXEL_SIZE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Candidate:
    """One job's answer.

    Attributes
    ----------
    name : str
        As shown: the folder's name, or more of its path where two jobs have the same.
    path : Path
        Job directory, or a map file.
    volumes : Volumes
    pixel_size_angst : float
    poses : PoseTable or None
    claim_angst : float or None
        Resolution that the job's own fsc.star states; None where there is none.
    claim : str
        What that resolution is of.
    diameter : float or None
        Of the particle, as a fraction of the box, from job.yaml.
    shells : int or None
        How many the job's fsc.star has: of cropped images fewer than the box.
    """

    name: str
    path: Path
    volumes: Volumes
    pixel_size_angst: float
    poses: PoseTable | None
    claim_angst: float | None
    claim: str
    diameter: float | None
    shells: int | None = None

    @property
    def last_shell(self) -> int:
        """The last one in which the job's maps hold something."""
        return self.box // 2 if self.shells is None else self.shells - 1

    @property
    def box(self) -> int:
        """Samples a side."""
        return len(self.volumes.joint)


def read_candidates(paths: list[Path]) -> tuple[list[Candidate], dict[str, str]]:
    """Read job directories or maps; those that failed without a map are told apart.

    Returns
    -------
    list of Candidate
    dict of str
        Why a job has no map, by its name.

    Raises
    ------
    CryoreconError
        If a path is no job and no map, occurs twice, or boxes, pixel sizes or images differ.
    """
    names = _names(paths)
    found: list[Candidate] = []
    failed: dict[str, str] = {}
    for name, path in zip(names, paths, strict=True):
        reason = _why_no_map(path)
        if reason is None:
            found.append(_candidate(name, path))
        else:
            failed[name] = reason
    for other in found[1:]:
        _require_alike(found[0], other)
    return found, failed


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    whole = [path.resolve() for path in paths]
    twice = next((p for n, p in enumerate(whole) if p in whole[:n]), None)
    if twice is not None:
        raise CryoreconError(f"{twice} is given twice", "A job agrees with itself: name others")
    for depth in range(1, max(len(p.parts) for p in whole) + 1):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            break
    return [name.replace(" ", "_") for name in names]


def _why_no_map(path: Path) -> str | None:
    if path.is_file() or (path / MAP).is_file():
        return None
    if not path.is_dir():
        raise CryoreconError(f"{path} does not exist", "Give job directories or MRC maps")
    if (path / "starts.star").is_file():
        return "ambiguous: its starts disagree, and it gave no map"
    for marker in ("FAILURE", "ABORTED"):
        if (path / f"RELION_JOB_EXIT_{marker}").exists():
            return "it failed" if marker == "FAILURE" else "it was interrupted"
    raise CryoreconError(f"{path} has no {MAP}", "Give finished ab initio jobs or MRC maps")


def _candidate(name: str, path: Path) -> Candidate:
    source = read_map(path / MAP if path.is_dir() else path)
    joint = torch.from_numpy(source.data)
    if float(joint.std()) == 0:
        raise CryoreconError(f"The map of {path} is empty", "Leave it out or give another")
    if path.is_file():
        return Candidate(
            name, path, Volumes(joint), source.pixel_size_angst, None, None, "none: a map", None
        )
    poses = read_pose_table(path / POSES) if (path / POSES).is_file() else None
    volumes = Volumes(joint, _half_maps(path, source))
    claim_angst, claim = _claim(path, volumes)
    own = claim_angst, claim, _diameter(path), _shells(path)
    return Candidate(name, path, volumes, source.pixel_size_angst, poses, *own)


def _half_maps(path: Path, joint: Map) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not all((path / name).is_file() for name in _HALVES):
        return None
    first, second = (read_map(path / name) for name in _HALVES)
    for name, half in zip(_HALVES, (first, second), strict=True):
        if half.data.shape != joint.data.shape:
            raise CryoreconError(
                f"{path / name} has another box than {path / MAP}", "Run the job again"
            )
    return torch.from_numpy(first.data), torch.from_numpy(second.data)


def _claim(path: Path, volumes: Volumes) -> tuple[float | None, str]:
    """The job's own resolution, and what it is of."""
    star = path / "fsc.star"
    if not star.is_file():
        return None, "none"
    general = read_star(star).get("general")
    if general is None or "rlnFinalResolution" not in general:
        return None, "none"
    angst = float(numbers(star, general, "rlnFinalResolution")[0])
    what = "half maps, FSC 0.143" if volumes.halves else "two starts, FSC 0.5"
    return (math.inf if angst >= 999 else angst), what


def _shells(path: Path) -> int | None:
    star = path / "fsc.star"
    table = read_star(star).get("fsc") if star.is_file() else None
    return None if table is None else len(table)


def _diameter(path: Path) -> float | None:
    """Particle diameter over box side, where the job's settings name it."""
    try:
        loaded: Any = yaml.safe_load((path / "job.yaml").read_text("utf-8"))
        found = loaded["config"]["diameter"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return None
    return float(found) if isinstance(found, (int, float)) and 0 < found <= 1 else None


def _require_alike(first: Candidate, other: Candidate) -> None:
    """Same grid, and images in common where both jobs name theirs."""
    remedy = "Run both jobs on the same particles, or leave one out"
    if first.box != other.box:
        raise CryoreconError(
            f"The boxes differ: {first.path} has {first.box} px, {other.path} {other.box} px",
            f"{remedy}; `cryorecon export --resample` brings maps to one grid",
        )
    sizes = first.pixel_size_angst, other.pixel_size_angst
    if abs(sizes[0] - sizes[1]) > _PIXEL_SIZE_TOLERANCE * sizes[0]:
        raise CryoreconError(
            f"The pixel sizes differ: {first.path} has {sizes[0]:.5g} A, "
            f"{other.path} {sizes[1]:.5g} A",
            f"{remedy}; `cryorecon export --resample` brings maps to one grid",
        )
    if first.poses is not None and other.poses is not None:
        match_tables(first.poses, other.poses, common_only=True)


def common_rows(first: Candidate, other: Candidate) -> tuple[PoseTable, PoseTable] | None:
    """Poses of the images that two jobs share, in the first one's order; None without poses."""
    if first.poses is None or other.poses is None:
        return None
    return match_tables(first.poses, other.poses, common_only=True)


def half_sets_match(first: Candidate, other: Candidate) -> bool:
    """Whether half set 1 of one job has no image in common with half set 2 of the other."""
    both = common_rows(first, other)
    if both is None or first.volumes.halves is None or other.volumes.halves is None:
        return False
    one, two = both[0].half_sets, both[1].half_sets
    return one is not None and two is not None and bool((one == two).all())
