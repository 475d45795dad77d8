"""The ab initio job with engine rmfn, from a STAR file to a map, poses, half maps and FSC."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from cryorecon.conventions import matrix_to_euler
from cryorecon.engines.contrast import contrast_score
from cryorecon.engines.observations import Observations
from cryorecon.engines.rmfn import RmfnConfig, RmfnState
from cryorecon.engines.rmfn_refine import fit_scales, half_maps
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import write_map
from cryorecon.io.particles import Particles, read_particles
from cryorecon.run.curves import FscCurve, write_fsc_star, write_fsc_xml
from cryorecon.run.job import Job, open_job, write_output_nodes
from cryorecon.run.load import half_sets, load_observations
from cryorecon.run.plots import (
    fsc_figure,
    map_figure,
    save_figure,
    viewing_direction_figure,
)
from cryorecon.run.progress import stage_bar
from cryorecon.run.rmfn_stages import Stages

Halves = Literal["independent", "shared", "none"]
Contrast = Literal["auto", "white", "black"]

_HALVES_LABEL = {
    "independent": "independent half maps (gold standard)",
    "shared": "half maps split after a shared search",
}
# The contrast counts as told from this many standard errors on.
_SURE = 4.0


@dataclass(frozen=True)
class AbinitioOptions:
    """What a user chooses.

    Attributes
    ----------
    diameter_angst : float, optional
        Of the particle; default 0.8 of the box.
    offset_range_angst : float, optional
        Largest in-plane offset; default a tenth of the box.
    project : Path, optional
        Folder that image paths are relative to.
    halves : "independent", "shared" or "none"
        Both half sets from scratch, half sets of one search, or no half maps on disk.
    contrast : "auto", "white" or "black"
        Particles white on black, black on white, or as the images tell.
    engine : RmfnConfig
        Its diameter and offset range are replaced by the two above.
    """

    diameter_angst: float | None = None
    offset_range_angst: float | None = None
    project: Path | None = None
    seed: int = 0
    halves: Halves = "shared"
    contrast: Contrast = "auto"
    engine: RmfnConfig = field(default_factory=RmfnConfig)


def _resolved(options: AbinitioOptions, particles: Particles) -> RmfnConfig:
    side_angst = particles.box * particles.pixel_size_angst
    config = options.engine
    if options.diameter_angst is not None:
        if not 0 < options.diameter_angst <= 0.95 * side_angst:
            raise CryoreconError(
                f"A particle of {options.diameter_angst:g} A does not fit the images of "
                f"{options.project or particles.path}, {side_angst:.0f} A wide",
                "Give --diameter in angstrom, at most 0.95 of the box",
            )
        config = dataclasses.replace(config, diameter=options.diameter_angst / side_angst)
    if options.offset_range_angst is not None:
        config = dataclasses.replace(config, offset_range=options.offset_range_angst / side_angst)
    return config


def abinitio_rmfn(
    star: str | Path, output: str | Path, options: AbinitioOptions, console: Console
) -> None:
    """Run the job: poses and map from scratch; pose columns of the STAR file are not read.

    Parameters
    ----------
    star : path
        Particle STAR file.
    output : path
        Job directory.

    Raises
    ------
    CryoreconError
        For input that cannot be used, or with fewer than 20 particles.
    """
    particles = read_particles(star, options.project)
    if len(particles) < 20:
        raise CryoreconError(
            f"{star} holds {len(particles)} particles, too few for a map", "Give at least 20"
        )
    config = _resolved(options, particles)
    particles.ctf_parameters()
    inputs, folder = Path(star), Path(output)
    with open_job(folder, console, inputs, len(particles), config, options.seed) as job:
        _run(job, particles, config, options)


def _run(job: Job, particles: Particles, config: RmfnConfig, options: AbinitioOptions) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    pixel, box = particles.pixel_size_angst, particles.box
    job.say(
        f"{len(particles)} particles, {box} px at {pixel:g} A, particle diameter "
        f"{config.diameter * box * pixel:.0f} A"
    )
    with stage_bar(job.console, "Reading", len(particles)) as bar:
        observations = load_observations(particles, config.diameter, lambda done, _: bar(done))
    _set_contrast(job, observations, config, options.contrast)
    half = half_sets(particles, generator)
    stages = Stages(job, config, generator, pixel)
    if options.halves == "independent":
        state = stages.independent_halves(observations, half)
    else:
        state = stages.from_scratch(observations, half)
    job.say("fitting the network's scales to the map")
    scales = fit_scales(state, config, generator)
    _write(job, particles, state, scales, options.halves)


def _set_contrast(
    job: Job, observations: Observations, config: RmfnConfig, contrast: Contrast
) -> None:
    """Make particles white, and say what was found."""
    score = contrast_score(observations, config.diameter)
    seen = "white on black" if score > 0 else "BLACK ON WHITE"
    if abs(score) < _SURE:
        job.say(f"contrast cannot be told from the images ({score:.1f} standard errors)")
        seen = "white on black"
    else:
        job.say(f"particles look {seen} ({abs(score):.0f} standard errors)")
    if contrast != "auto":
        given = "white on black" if contrast == "white" else "BLACK ON WHITE"
        if given != seen:
            job.say(f"WARNING: they are taken as {given}, as --contrast says")
        seen = given
    if seen != "white on black":
        job.say("images are inverted for the reconstruction; the map will be white on black")
        observations.coefficients.neg_()


def _write(
    job: Job, particles: Particles, state: RmfnState, scales: list[Tensor], halves: Halves
) -> None:
    pixel = particles.pixel_size_angst
    joint = ((state.maps[0] + state.maps[1]) / 2).numpy()
    write_map(job.path("initial_model.mrc"), joint, pixel)
    for number, volume in enumerate(scales, 1):
        write_map(job.path(f"scale{number}.mrc"), volume.numpy(), pixel)
    particles.write(
        job.path("run_data.star"),
        euler_deg=matrix_to_euler(state.rotations.double()).numpy(),
        origins_angst=(state.offsets_px.double() * pixel).numpy(),
        random_subsets=(state.half + 1).numpy(),
        class_number=1,
    )
    written = ["initial_model.mrc", "run_data.star", "map.png", "views.png"]
    if halves != "none":
        _write_halves(job, state, particles, _HALVES_LABEL[halves])
        written[2:2] = ["fsc.star", "fsc.png"]
    save_figure(map_figure(joint, pixel, "initial_model.mrc"), job.path("map.png"))
    views = viewing_direction_figure(state.rotations, "run_data.star")
    save_figure(views, job.path("views.png"))
    write_output_nodes(job.folder, {"initial_model.mrc": 6, "run_data.star": 3})
    job.say("projections do not tell the hand: the mirror image of the map is as good")
    for name in written:
        job.say(f"{job.path(name)}")


def _write_halves(job: Job, state: RmfnState, particles: Particles, label: str) -> None:
    box, pixel = particles.box, particles.pixel_size_angst
    for number, volume in enumerate(half_maps(state, box), 1):
        write_map(job.path(f"run_half{number}_class001_unfil.mrc"), volume.numpy(), pixel)
    aligned = label == _HALVES_LABEL["independent"]
    curve = FscCurve(state.fsc, box, pixel, label, "soft sphere of the diameter", aligned)
    write_fsc_star(job.path("fsc.star"), curve)
    write_fsc_xml(job.path("fsc.xml"), curve)
    save_figure(fsc_figure({label: curve}), job.path("fsc.png"))
    job.say(f"{label}: {curve.resolution_text(0.143)} ({curve.conditions})")
