"""The demonstration: ab initio on a simulated stack, then judged against its truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cryorecon.conventions import euler_to_matrix
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve
from cryorecon.maps.poses import compare_pose_sets
from cryorecon.run.abinitio import abinitio
from cryorecon.run.abinitio_input import AbinitioOptions
from cryorecon.run.curves import THRESHOLDS, FscCurve
from cryorecon.run.plots import fsc_figure, pose_error_figure, save_figure
from cryorecon.run.results import MASK
from cryorecon.run.summary import job_summary

_MASKED, _BARE = "against the truth, molecule's mask", "against the truth, no mask"


@dataclass(frozen=True)
class Demo:
    """What the demonstration found.

    Attributes
    ----------
    lines : list of str
        What was found and where it lies, in words.
    figures : dict
        The same as plain data.
    """

    lines: list[str]
    figures: dict[str, Any]


def run_demo(folder: Path, seed: int, console: Console) -> Demo:
    """Reconstruct ``folder/simulated`` into ``folder/abinitio`` and compare with the truth."""
    simulated, job = folder / "simulated", folder / "abinitio"
    abinitio(simulated / "particles.star", job, AbinitioOptions(seed=seed), console)
    curves = _against_truth(simulated / "map.mrc", job)
    save_figure(fsc_figure(curves), folder / "fsc_truth.png")
    true = read_particles(simulated / "particles.star")
    mine = read_particles(job / "run_data.star")
    poses = compare_pose_sets(
        euler_to_matrix(torch.from_numpy(mine.euler_deg())),
        euler_to_matrix(torch.from_numpy(true.euler_deg())),
        torch.from_numpy(mine.origins_angst()),
        torch.from_numpy(true.origins_angst()),
    )
    save_figure(pose_error_figure(poses), folder / "pose_errors.png")
    lines = [
        "",
        f"map         {job / 'initial_model.mrc'}",
        f"poses       {job / 'run_data.star'}",
        f"FSC         {job / 'fsc.star'}",
        *(f"FSC         {name}: {c.resolution_text(0.5)}" for name, c in curves.items()),
        f"report      {job / 'report.html'}",
        f"pose error  {poses.median_deg:.2f} deg (median)",
        f"plots       {folder / 'fsc_truth.png'}, {folder / 'pose_errors.png'}, "
        f"{job / 'map.png'}, {job / 'views.png'}, {job / 'fsc.png'}",
    ]
    figures = job_summary(job) | {
        "against_truth": {
            "resolution_angst": _resolutions(curves.get(_BARE)),
            "masked_resolution_angst": _resolutions(curves.get(_MASKED)),
            "pose_error_median_deg": poses.median_deg,
        }
    }
    return Demo(lines, figures)


def _resolutions(curve: FscCurve | None) -> dict[str, float] | None:
    return None if curve is None else {f"{t:g}": curve.resolution_angst(t) for t in THRESHOLDS}


def _against_truth(true_map: Path, job: Path) -> dict[str, FscCurve]:
    """FSC of a job's map against the true one, in the molecule's mask, if it has one, and bare."""
    truth, found = read_map(true_map), read_map(job / "initial_model.mrc")
    reference, volume = torch.from_numpy(truth.data), torch.from_numpy(found.data)
    # The truth is moved, so that the job's mask fits both.
    moved = apply_alignment(reference, align_maps(reference, volume, truth.pixel_size_angst))

    def curve(name: str | None) -> FscCurve:
        mask = None if name is None else torch.from_numpy(read_map(job / name).data)
        values, maps = fsc_curve(volume, moved, mask), "initial_model.mrc and map.mrc"
        return FscCurve(values, len(volume), truth.pixel_size_angst, maps, name, aligned=True)

    masked = {_MASKED: curve(MASK)} if (job / MASK).exists() else {}
    return masked | {_BARE: curve(None)}
