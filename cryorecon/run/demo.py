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
from cryorecon.run.summary import job_summary


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
    bare, masked = _against_truth(simulated / "map.mrc", job)
    both = {"against the truth, molecule's mask": masked, "against the truth, no mask": bare}
    save_figure(fsc_figure(both), folder / "fsc_truth.png")
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
        f"FSC         {job / 'fsc.star'}, against the truth: {masked.resolution_text(0.5)} in the "
        f"molecule's mask, {bare.resolution_angst(0.5):.2f} A without",
        f"report      {job / 'report.html'}",
        f"pose error  {poses.median_deg:.2f} deg (median)",
        f"plots       {folder / 'fsc_truth.png'}, {folder / 'pose_errors.png'}, "
        f"{job / 'map.png'}, {job / 'views.png'}, {job / 'fsc.png'}",
    ]
    without, within = (
        {f"{t:g}": curve.resolution_angst(t) for t in THRESHOLDS} for curve in (bare, masked)
    )
    figures = job_summary(job) | {
        "against_truth": {
            "resolution_angst": without,
            "masked_resolution_angst": within,
            "pose_error_median_deg": poses.median_deg,
        }
    }
    return Demo(lines, figures)


def _against_truth(true_map: Path, job: Path) -> tuple[FscCurve, FscCurve]:
    """FSC of a job's map against the true one, as they are and in the molecule's mask."""
    truth, found = read_map(true_map), read_map(job / "initial_model.mrc")
    reference, volume = torch.from_numpy(truth.data), torch.from_numpy(found.data)
    # The truth is moved, so that the job's mask fits both.
    moved = apply_alignment(reference, align_maps(reference, volume, truth.pixel_size_angst))

    def curve(name: str | None) -> FscCurve:
        mask = None if name is None else torch.from_numpy(read_map(job / name).data)
        values, maps = fsc_curve(volume, moved, mask), "initial_model.mrc and map.mrc"
        return FscCurve(values, len(volume), truth.pixel_size_angst, maps, name, aligned=True)

    return curve(None), curve("initial_model_mask.mrc")
