"""What a job directory holds, read back for its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from cryorecon.conventions import euler_to_matrix
from cryorecon.errors import CryoreconError
from cryorecon.io.cryosparc import is_cryosparc_file, read_cryosparc
from cryorecon.io.mrc import Map, read_map
from cryorecon.io.particles import Particles, read_particles
from cryorecon.io.star import numbers, read_star, star_blocks
from cryorecon.io.text_table import TextTable
from cryorecon.run.abinitio_input import worked_box
from cryorecon.run.curves import FscCurve, read_fsc_star
from cryorecon.run.image_checks import MOST_LEFT_OUT

MAP = "initial_model.mrc"
POSES = "run_data.star"
_ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
_SEARCHED = "cryoreconOffsetRangeAngst"
_SHARE, _LIKELIHOOD = "rlnMaxValueProbDistribution", "rlnLogLikeliContribution"
_OUTCOMES = {
    "RELION_JOB_EXIT_SUCCESS": "done",
    "RELION_JOB_EXIT_FAILURE": "failed",
    "RELION_JOB_EXIT_ABORTED": "stopped",
}


@dataclass(frozen=True)
class Poses:
    """A table of poses.

    Attributes
    ----------
    path : Path
    rotations : Tensor, shape (n, 3, 3), float64
    origins_angst : Tensor, shape (n, 2), float64
    names : list of str
        Image of each.
    share : Tensor, shape (n,), float64, optional
        How much of an image belongs to its pose, 0 to 1.
    log_likelihood : Tensor, shape (n,), float64, optional
        Of each image; in a job of this program against an empty image.
    """

    path: Path
    rotations: Tensor
    origins_angst: Tensor
    names: list[str]
    share: Tensor | None = None
    log_likelihood: Tensor | None = None


@dataclass(frozen=True)
class ReportInputs:
    """All that a report is made of; None or empty where a job has no such file.

    Attributes
    ----------
    folder : Path
    outcome : str
        done, failed, stopped or unknown.
    map : Map
    map_name : str
    settings : dict
        Of ``job.yaml``.
    settings_text : str
        The file itself.
    fsc : FscCurve
    poses : Poses
    rounds, starts, information, view_density : DataFrame
        Tables of the files of these names.
    log : list of str
        Lines of ``run.log``.
    particles : Particles
        The images.
    no_particles : str
        Why there are none.
    """

    folder: Path
    outcome: str
    map: Map | None
    map_name: str
    settings: dict[str, Any] = field(default_factory=dict)
    settings_text: str = ""
    fsc: FscCurve | None = None
    poses: Poses | None = None
    rounds: pd.DataFrame | None = None
    starts: pd.DataFrame | None = None
    information: pd.DataFrame | None = None
    view_density: pd.DataFrame | None = None
    log: list[str] = field(default_factory=list)
    particles: Particles | None = None
    no_particles: str = ""

    @property
    def side_angst(self) -> float:
        """Width of the map's box."""
        assert self.map is not None
        return len(self.map.data) * self.map.pixel_size_angst

    @property
    def diameter(self) -> float | None:
        """Of the particle, as a fraction of the box side, where the settings tell."""
        config = self.settings.get("config") or {}
        if isinstance(config.get("diameter"), float):
            return float(config["diameter"])
        given = (config.get("moments") or {}).get("diameter_angst")
        if given is not None and self.map is not None:
            return float(given) / self.side_angst
        return 0.8 if "moments" in config else None

    @property
    def log_likelihood(self) -> Tensor | None:
        """Of each image, against an empty one; other programs' column of the name means less."""
        return None if self._own_poses is None else self._own_poses.log_likelihood

    @property
    def share(self) -> Tensor | None:
        """How much of each image belongs to its pose; another program's column means less."""
        return None if self._own_poses is None else self._own_poses.share

    @property
    def _own_poses(self) -> Poses | None:
        return self.poses if "program" in self.settings else None

    @property
    def worked_pixel_angst(self) -> float:
        """Pixel size that the job worked with: it may have cropped its images."""
        assert self.map is not None
        options = self.settings.get("options") or {}
        if "box" not in options:
            return self.map.pixel_size_angst
        return self.side_angst / worked_box(len(self.map.data), options["box"])

    @property
    def offset_limit_angst(self) -> float | None:
        """Largest offset that was searched, where the rounds or the settings tell."""
        if self.rounds is not None and _SEARCHED in self.rounds:
            return float(self.rounds[_SEARCHED].iloc[-1])
        share = (self.settings.get("config") or {}).get("offset_range")
        return None if share is None or self.map is None else float(share) * self.side_angst


def read_job(
    folder: Path,
    particles: Path | None = None,
    project: Path | None = None,
    images: Particles | None = None,
) -> ReportInputs:
    """Read a job directory, of any engine and age; a map and a pose table alone will do.

    Parameters
    ----------
    folder : Path
    particles : Path, optional
        Where the images are, if ``run_data.star`` does not lead to them.
    project : Path, optional
        Folder that image paths are relative to.
    images : Particles, optional
        The job's own, already read.

    Raises
    ------
    CryoreconError
        If it is no such directory, has nothing to show, or holds files of different jobs.
    """
    if not folder.is_dir():
        raise CryoreconError(
            f"{folder} is not a folder",
            "Give the directory of an abinitio job, such as job001, or a map (.mrc, .map)",
        )
    text = _text(folder / "job.yaml")
    settings = _settings(folder / "job.yaml", text)
    found = read_map(folder / MAP) if (folder / MAP).exists() else None
    poses = _poses(folder / POSES) if (folder / POSES).exists() else None
    tables = {
        name: read_star(folder / f"{name}.star").get(name)
        for name in ("rounds", "starts", "information", "view_density")
        if (folder / f"{name}.star").exists()
    }
    log = _text(folder / "run.log").splitlines()
    if found is None and not tables:
        last = f"; its log ends with: {log[-1].strip()}" if log else ""
        raise CryoreconError(
            f"{folder} has no {MAP}{last}", "Give the directory of an abinitio job that has a map"
        )
    _check_one_job(folder, settings, found, poses)
    problem = ""
    if images is None:
        images, problem = _images(poses, settings, particles, project)
    return ReportInputs(
        folder=folder,
        outcome=next((t for name, t in _OUTCOMES.items() if (folder / name).exists()), "unknown"),
        map=found,
        map_name=MAP,
        settings=settings,
        settings_text=text,
        fsc=_fsc(folder / "fsc.star", found),
        poses=poses,
        log=log,
        particles=images,
        no_particles=problem,
        **tables,
    )


def read_single_map(
    path: Path, particles: Path | None = None, project: Path | None = None
) -> ReportInputs:
    """A map of any program, with the poses of a particle file where one is given.

    Raises
    ------
    CryoreconError
        If a file cannot be read or the particles have no poses.
    """
    found = read_map(path)
    poses = None if particles is None else _poses(particles)
    images, problem = None, "give --particles"
    if particles is not None:
        try:
            images, problem = read_particles(particles, project), ""
        except CryoreconError as error:
            problem = str(error)
    return ReportInputs(
        folder=path.parent,
        outcome="unknown",
        map=found,
        map_name=path.name,
        poses=poses,
        particles=images,
        no_particles=problem,
    )


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.exists() else ""


def _settings(path: Path, text: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise CryoreconError(
            f"{path} is not YAML: {str(error).splitlines()[0]}", "Mend it or remove it"
        ) from error
    if not isinstance(settings, dict):
        raise CryoreconError(f"{path} holds no settings", "Mend it or remove it")
    return settings


def _poses(path: Path) -> Poses:
    # Millions of rows are kept as compressed text: a report needs few of the columns.
    tables = (TextTable.gather(pieces) for _, pieces in star_blocks(path))
    if is_cryosparc_file(path):
        tables = (table for table in [read_cryosparc(path)[1]])
    table = next((found for found in tables if set(_ANGLES) <= set(found)), None)
    if table is None or len(table) == 0:
        raise CryoreconError(
            f"{path} has no poses ({', '.join(_ANGLES)})", "Give the directory of an abinitio job"
        )
    angles = np.stack([numbers(path, table, name) for name in _ANGLES], -1)
    origins = np.zeros((len(table), 2))
    if "rlnOriginXAngst" in table:
        origins = np.stack([numbers(path, table, f"rlnOrigin{a}Angst") for a in "XY"], -1)
    elif "rlnOriginX" in table:
        pixel = _old_pixel_size(path, table)
        origins = pixel * np.stack([numbers(path, table, f"rlnOrigin{a}") for a in "XY"], -1)
    names = list(table["rlnImageName"]) if "rlnImageName" in table else []
    rotations = euler_to_matrix(torch.from_numpy(angles))
    told = (
        torch.from_numpy(numbers(path, table, name)) if name in table else None
        for name in (_SHARE, _LIKELIHOOD)
    )
    return Poses(path, rotations, torch.from_numpy(origins), names, *told)


def _old_pixel_size(path: Path, table: TextTable) -> float:
    if {"rlnDetectorPixelSize", "rlnMagnification"} <= set(table):
        sizes = [numbers(path, table, f"rln{n}") for n in ("DetectorPixelSize", "Magnification")]
        return float(sizes[0][0] * 1e4 / sizes[1][0])
    return float(numbers(path, table, "rlnPixelSize")[0]) if "rlnPixelSize" in table else 1.0


def _check_one_job(
    folder: Path, settings: dict[str, Any], found: Map | None, poses: Poses | None
) -> None:
    """Refuse files that contradict each other."""
    remedy = "Keep one job's files in a directory; run the job again with --overwrite"
    # Agreed poses are of the first job that agrees, whichever that is.
    rows = None if settings.get("kind") == "consensus" else settings.get("input_rows")
    n = rows if poses is None else len(poses.rotations)
    # A few images may have been left out.
    if rows is not None and not (1 - MOST_LEFT_OUT) * rows <= n <= rows:
        raise CryoreconError(
            f"{folder / POSES} has {n} particles, the job of {folder / 'job.yaml'} has {rows}",
            remedy,
        )
    for path in sorted(folder.glob("run_half?_class001_unfil.mrc")) if found else []:
        half = read_map(path)
        if found is not None and half.data.shape != found.data.shape:
            raise CryoreconError(
                f"{path} has {len(half.data)} px, {folder / MAP} has {len(found.data)} px", remedy
            )


def _fsc(path: Path, found: Map | None) -> FscCurve | None:
    if found is None or not path.exists():
        return None
    return read_fsc_star(path, len(found.data), found.pixel_size_angst)


def _images(
    poses: Poses | None, settings: dict[str, Any], given: Path | None, project: Path | None
) -> tuple[Particles | None, str]:
    """The images, from what is given, else from the pose table, else from the job's input."""
    if given is not None:
        return read_particles(given, project), ""
    if poses is None:
        return None, "this job has no table of poses"
    problem = ""
    source = settings.get("input")
    for path in (poses.path, Path(str(source)) if source else None):
        if path is None or not path.is_file():
            continue
        try:
            return read_particles(path, project), ""
        except CryoreconError as error:
            problem = problem or str(error)
    return None, f"{problem} Give the file that leads to them with --particles."
