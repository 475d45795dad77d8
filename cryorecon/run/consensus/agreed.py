"""What jobs agree on: their mean map, and poses in one frame."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryorecon.conventions import matrix_to_euler
from cryorecon.engines.reconstruction import RefineConfig
from cryorecon.io.particles import SAID_OF_ANGLES, SAID_OF_ORIGINS
from cryorecon.io.star import read_star, write_star
from cryorecon.maps.agreement import (
    mean_map,
    mean_rotations,
    moved_poses,
)
from cryorecon.maps.align import Alignment
from cryorecon.physics.fourier import lowpass
from cryorecon.physics.rotations import geodesic_distance_deg
from cryorecon.physics.symmetry import nearest_copies
from cryorecon.run.compare_poses import PoseTable
from cryorecon.run.consensus.inputs import POSES, Candidate
from cryorecon.run.consensus.pairs import Verdict
from cryorecon.run.consensus.results import Frame, reference_of
from cryorecon.run.job import Job
from cryorecon.run.plots import map_figure, save_figure, viewing_direction_figure
from cryorecon.run.results import write_model


def write_agreed_map(
    job: Job, jobs: list[Candidate], frame: Frame, verdict: Verdict, diameter: float
) -> dict[str, int]:
    """The mean of the agreeing maps, low-passed to where they agree, and a mask around it.

    Without agreement the reference's own map, which every label says. The diameter is a fraction
    of the box. Returns the files' names and RELION's types of them.
    """
    pixel = jobs[0].pixel_size_angst
    if verdict.agreed and verdict.limiting is not None:
        volume = mean_map([frame[n][1].joint for n in verdict.cluster])
        if verdict.limiting.shell < len(volume) // 2:
            volume = lowpass(volume, verdict.limiting.shell, 3)
        title = f"agreed map, {verdict.limiting.resolution_angst:.1f} A; hand unknown"
    else:
        reference = reference_of(frame)
        volume = jobs[reference].volumes.joint
        title = f"{verdict.mark}the map of {jobs[reference].name}; hand unknown"
        job.say(title)
    nodes = write_model(job, volume, pixel, RefineConfig(diameter=diameter), ends=True)
    save_figure(map_figure(volume.numpy(), pixel, title), job.path("map.png"))
    return nodes


def write_agreed_poses(
    job: Job,
    jobs: list[Candidate],
    frame: Frame,
    verdict: Verdict,
    within_deg: float,
    group: Tensor,
) -> bool:
    """All rows of the first agreeing job that has poses, in the common frame.

    Without agreement of the job whose map is taken.

    Rows on which all agreeing jobs' poses lie within the limit get the mean of these; the others
    keep the first job's. rlnClassNumber is 1 for the former and 2 for the latter, so that other
    programs can select; `cryoreconPoseSpread` tells by how much.

    Returns
    -------
    bool
        Whether there were any poses.
    """
    members = verdict.cluster if verdict.agreed else [reference_of(frame)]
    chosen = [(jobs[n], table, frame[n][0]) for n in members if (table := jobs[n].poses)]
    if not chosen:
        return False
    base, table = chosen[0][:2]
    pixel = base.pixel_size_angst
    sets = [_placed(poses, moved, table, pixel) for _, poses, moved in chosen]
    rotations, origins, spread = _merged(sets, within_deg, group)
    columns: dict[str, NDArray[np.generic]] = {}
    if len(sets) > 1:
        agree = spread <= within_deg
        columns["rlnClassNumber"] = np.where(agree.numpy(), 1, 2)
        columns["cryoreconPosesAgree"] = agree.numpy().astype(np.int64)
        columns["cryoreconPoseSpread"] = torch.where(spread.isinf(), -1.0, spread).numpy()
        job.say(
            f"{int(agree.sum())} of {len(agree)} images have poses on which all agree to "
            f"{within_deg:g} degrees"
        )
    else:
        alone = "of the agreeing jobs only " if verdict.agreed else ""
        job.say(f"{alone}{base.name} has poses: they are in {POSES}")
    _write_table(job, base, rotations, origins, columns)
    views = viewing_direction_figure(rotations, f"{verdict.mark}{POSES}")
    save_figure(views, job.path("views.png"))
    return True


def _placed(
    found: PoseTable, alignment: Alignment | None, base: PoseTable, pixel_size_angst: float
) -> tuple[Tensor, Tensor]:
    """Poses in the common frame, in the base's order; NaN where an image is missing."""
    rotations, origins = found.rotations.clone(), found.origins_angst
    origins = rotations.new_zeros(len(rotations), 2) if origins is None else origins
    if alignment is not None:
        rotations, origins = moved_poses(rotations, origins, alignment, pixel_size_angst)
    place = torch.from_numpy(found.images.get_indexer(base.images).astype(np.int64))
    rotations, origins = rotations[place], origins[place]
    rotations[place < 0], origins[place < 0] = torch.nan, torch.nan
    return rotations, origins


def _merged(
    sets: list[tuple[Tensor, Tensor]], within_deg: float, group: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Poses, origins, and the largest distance from the first set's pose, infinite if missing."""
    rotations, origins = sets[0]
    spread = rotations.new_zeros(len(rotations))
    copies = [rotations]
    for poses, _ in sets[1:]:
        nearest = nearest_copies(poses, rotations, group)
        angles = geodesic_distance_deg(nearest, rotations)
        angles = torch.where(angles.isnan(), torch.inf, angles)
        copies.append(torch.where(angles.isinf()[:, None, None], rotations, nearest))
        spread = torch.maximum(spread, angles)
    agree = spread <= within_deg
    if len(sets) > 1:
        rotations = torch.where(agree[:, None, None], mean_rotations(copies), rotations)
        mean = torch.stack([found for _, found in sets]).mean(0)
        origins = torch.where(agree[:, None], mean, origins)
    return rotations, origins, spread


def _write_table(
    job: Job,
    base: Candidate,
    rotations: Tensor,
    origins: Tensor,
    columns: dict[str, NDArray[np.generic]],
) -> None:
    """The base job's table, all rows and columns in order, with new poses."""
    tables = read_star(base.path / POSES)
    name = next(n for n, table in tables.items() if "rlnImageName" in table)
    new: dict[str, NDArray[np.generic]] = {}
    angles = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
    new |= zip(angles, matrix_to_euler(rotations).numpy().T, strict=True)
    # RELION 3.0 has origins in pixels.
    in_angst = "optics" in tables or "rlnOriginXAngst" in tables[name]
    unit, scale = ("Angst", 1.0) if in_angst else ("", base.pixel_size_angst)
    for axis, values in zip("XY", origins.numpy().T, strict=True):
        new[f"rlnOrigin{axis}{unit}"] = values / scale
    stale = (SAID_OF_ANGLES | SAID_OF_ORIGINS) - set(new)
    tables[name] = tables[name].drop(columns=stale, errors="ignore").assign(**new, **columns)
    write_star(job.path(POSES), tables)
