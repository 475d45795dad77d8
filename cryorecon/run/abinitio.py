"""The ab initio job with engine rmfn, from a STAR file to a map, poses, half maps and FSC."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from cryorecon.conventions import matrix_to_euler
from cryorecon.engines.contrast import contrast_score
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.rmfn import RmfnConfig, RmfnState
from cryorecon.engines.rmfn_refine import fit_scales, half_maps
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.particles import Particles, read_particles
from cryorecon.physics.symmetry import symmetry_group
from cryorecon.run.curves import FscCurve, write_fsc_star, write_fsc_xml
from cryorecon.run.job import Job, open_job, write_output_nodes
from cryorecon.run.load import Keep, half_sets, load_observations
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
# Share of particles at the offset limit that is worth a warning.
_MANY_HITS = 0.02


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
    symmetry : str
        Point group; its axes are looked for in the map without symmetry, which is kept.
    mask : Path, optional
        Map from 0 to 1 that multiplies the soft sphere; must hold in any orientation.
    init_map : Path, optional
        Map to start from instead of a search; only its coarse shape is used.
    keep : "auto", "memory" or "disk"
        As in :func:`cryorecon.run.load.load_observations`.
    engine : RmfnConfig
        Its diameter and offset range are replaced by the two above.
    """

    diameter_angst: float | None = None
    offset_range_angst: float | None = None
    project: Path | None = None
    seed: int = 0
    halves: Halves = "shared"
    contrast: Contrast = "auto"
    symmetry: str = "C1"
    mask: Path | None = None
    init_map: Path | None = None
    keep: Keep = "auto"
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
    _group(options.symmetry)
    _mask(options.mask, particles)
    if options.init_map is not None:
        _map_like(options.init_map, particles, "map")
        if options.halves == "independent":
            raise CryoreconError(
                "Half maps that both start from --init-map are not independent",
                "Leave out --init-map or --halves independent",
            )
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
        images = load_observations(
            particles, config.diameter, lambda done, _: bar(done), options.keep
        )
    _set_contrast(job, images, config, options.contrast)
    half = half_sets(particles, generator)
    stages = Stages(job, config, generator, pixel, _mask(options.mask, particles))
    if options.halves == "independent":
        state = stages.independent_halves(images, half)
    elif options.init_map is not None:
        job.say(f"starting from {options.init_map}, low-passed; its poses are not used")
        state = stages.from_map(images, half, _map_like(options.init_map, particles, "map"))
    else:
        state = stages.from_scratch(images, half)
    _report_offsets(job, state, config, particles)
    if len(_group(options.symmetry)) > 1:
        write_map(job.path("initial_model_C1.mrc"), _joint(state), pixel)
        stages.symmetrise(state, images, options.symmetry.upper())
    job.say("fitting the network's scales to the map")
    scales = fit_scales(state, config, generator)
    _write(job, particles, state, scales, options.halves)


def _group(symmetry: str) -> Tensor:
    try:
        return symmetry_group(symmetry)
    except ValueError as error:
        raise CryoreconError(
            f"--symmetry {symmetry} is unknown", "Give C1, Cn, Dn, T, O or I, such as C4 or D2"
        ) from error


def _map_like(path: Path, particles: Particles, what: str) -> Tensor:
    """A map that must have the particles' box and pixel size."""
    found = read_map(path)
    box, pixel = particles.box, particles.pixel_size_angst
    if len(found.data) != box or abs(found.pixel_size_angst / pixel - 1) > 0.01:
        raise CryoreconError(
            f"The {what} {path} has {len(found.data)} px at {found.pixel_size_angst:g} A, the "
            f"particles {box} px at {pixel:g} A",
            f"Resample the {what} to the particles' box and pixel size",
        )
    return torch.from_numpy(found.data).float()


def _mask(path: Path | None, particles: Particles) -> Tensor | None:
    if path is None:
        return None
    mask = _map_like(path, particles, "mask")
    if not (float(mask.min()) >= -1e-3 and 0 < float(mask.max()) <= 1.001):
        raise CryoreconError(
            f"The mask {path} has values from {float(mask.min()):g} to {float(mask.max()):g}",
            "A mask goes from 0 to 1",
        )
    return mask.clamp(0, 1)


def _joint(state: RmfnState) -> np.ndarray:
    return ((state.maps[0] + state.maps[1]) / 2).numpy()


def _report_offsets(job: Job, state: RmfnState, config: RmfnConfig, particles: Particles) -> None:
    """How far off centre the particles were found, and how many as far as was searched."""
    pixel = particles.pixel_size_angst
    length = state.offsets_px.norm(dim=-1) * pixel
    limit = config.offset_range * particles.box * pixel
    hits = int((length > limit - pixel / 2).sum())
    job.say(
        f"particles lie {float(length.median()):.1f} A off centre (median); {hits} of "
        f"{len(length)} at the limit of {limit:.1f} A"
    )
    if hits > _MANY_HITS * len(length):
        job.say("WARNING: many particles lie at the limit; give a larger --offset-range")


def _set_contrast(job: Job, images: ImageSet, config: RmfnConfig, contrast: Contrast) -> None:
    """Make particles white, and say what was found."""
    score = contrast_score(images, config.diameter)
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
        job.say("the CTF is inverted for the reconstruction; the map will be white on black")
        images.gain.neg_()


def _write(
    job: Job, particles: Particles, state: RmfnState, scales: list[Tensor], halves: Halves
) -> None:
    pixel = particles.pixel_size_angst
    joint = _joint(state)
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
    mask = "soft sphere of the diameter"
    if state.network.support.mask is not None:
        mask += " times --mask"
    curve = FscCurve(state.fsc, box, pixel, label, mask, aligned)
    write_fsc_star(job.path("fsc.star"), curve)
    write_fsc_xml(job.path("fsc.xml"), curve)
    save_figure(fsc_figure({label: curve}), job.path("fsc.png"))
    job.say(f"{label}: {curve.resolution_text(0.143)} ({curve.conditions})")
