"""The ab initio job of any engine, from a STAR file to a map, poses, half maps and FSC."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from cryorecon.engines.amortized import AmortizedConfig
from cryorecon.engines.contrast import SURE, contrast_score
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import Reconstruction, RefineConfig
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.errors import CryoreconError
from cryorecon.io.particles import Particles, read_particles
from cryorecon.physics.resampling import resample_volume
from cryorecon.physics.symmetry import symmetry_group
from cryorecon.ranks import ALONE, Ranks
from cryorecon.run.amortized_stages import AmortizedStages
from cryorecon.run.device import device_text, own_device, usable_device
from cryorecon.run.job import Job, Task, open_job
from cryorecon.run.load import Keep, half_sets, load_observations, map_like
from cryorecon.run.report.page import report_at_end
from cryorecon.run.results import (
    joint_map,
    report_offsets,
    size_text,
    write_first_poses,
    write_in_full,
    write_results,
)
from cryorecon.run.rmfn_stages import RmfnStages

Halves = Literal["independent", "shared", "none"]
Contrast = Literal["auto", "white", "black"]
Assign = Literal["none", "read", "refine"]
# Samples a side that a first map has at most, if nobody asks for more: a particle's width in 80 or
# 100 parts. Time and memory grow as the cube.
_LARGEST_BOX = 128


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
    box : int, optional
        Samples a side that larger images are Fourier cropped to; default 128. Maps are written
        in the images' own box.
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
    subset : int, optional
        Particles, drawn at random, that make the map; default all.
    assign : "none", "read" or "refine"
        What becomes of particles outside the subset: left out, given the poses that the engine
        reads off them, or refined locally from these as well.
    first_angst, last_angst : float, optional
        Resolutions that the training of engine amortized begins and ends at, in place of the
        engine's `first_cycles` and `last_cycles`.
    device : str
        Where all but the table of poses is computed.
    engine : RmfnConfig or AmortizedConfig
        Its diameter and offset range are replaced by the two above.
    """

    diameter_angst: float | None = None
    offset_range_angst: float | None = None
    project: Path | None = None
    box: int | None = None
    seed: int = 0
    halves: Halves = "shared"
    contrast: Contrast = "auto"
    symmetry: str = "C1"
    mask: Path | None = None
    init_map: Path | None = None
    keep: Keep = "auto"
    subset: int | None = None
    assign: Assign = "refine"
    first_angst: float | None = None
    last_angst: float | None = None
    device: str = "cpu"
    engine: RmfnConfig | AmortizedConfig = field(default_factory=RmfnConfig)


def _resolved(options: AbinitioOptions, particles: Particles) -> RmfnConfig | AmortizedConfig:
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
    if isinstance(config, AmortizedConfig):
        config = _with_bands(config, options, config.diameter * side_angst)
    return config


def _with_bands(
    config: AmortizedConfig, options: AbinitioOptions, diameter_angst: float
) -> AmortizedConfig:
    """Cycles per particle diameter from resolutions in angstrom."""
    if options.first_angst is not None:
        config = dataclasses.replace(config, first_cycles=diameter_angst / options.first_angst)
    if options.last_angst is not None:
        config = dataclasses.replace(config, last_cycles=diameter_angst / options.last_angst)
    if config.first_cycles > config.last_cycles:
        first, last = (diameter_angst / c for c in (config.first_cycles, config.last_cycles))
        raise CryoreconError(
            f"The training would begin at {first:.1f} A and end coarser, at {last:.1f} A",
            "Give --first-resolution larger than --last-resolution",
        )
    return config


def assignment(*, everyone: bool, refine: bool) -> Assign:
    """What becomes of particles outside a subset."""
    if not everyone:
        return "none"
    return "refine" if refine else "read"


def abinitio(
    star: str | Path,
    output: str | Path,
    options: AbinitioOptions,
    console: Console,
    *,
    resume: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Run the job: poses and map from scratch; pose columns of the STAR file are not read.

    Parameters
    ----------
    star : path
        Particle STAR file.
    output : path
        Job directory.
    resume : bool
        Go on with what an interrupted job left there.
    ranks : Ranks
        Processes that share the job, each of which calls this; the first one writes.

    Raises
    ------
    CryoreconError
        For input or options that cannot be used, or with fewer than 20 particles.
    """
    particles, rows, config = prepared(star, options)
    task = Task("abinitio", Path(star), len(particles), config, options, options.seed)
    with open_job(Path(output), console, task, resume=resume, ranks=ranks) as job:
        _run(job, particles, rows, config, options)


def prepared(
    star: str | Path, options: AbinitioOptions
) -> tuple[Particles, Tensor, RmfnConfig | AmortizedConfig]:
    """Everything that is looked at before anything is written.

    Returns
    -------
    particles : Particles
        All that get poses.
    rows : Tensor, int64
        Which of them make the map.
    config : RmfnConfig or AmortizedConfig
        The resolved settings.

    Raises
    ------
    CryoreconError
        For input or options that cannot be used, or with fewer than 20 particles.
    """
    particles = read_particles(star, options.project).cropped(options.box or _LARGEST_BOX)
    rows = _subset(particles, options)
    if options.assign == "none":
        particles, rows = particles.subset(rows.numpy()), torch.arange(len(rows))
    if len(rows) < 20:
        raise CryoreconError(
            f"{star} gives {len(rows)} particles, too few for a map", "Give at least 20"
        )
    config = _resolved(options, particles)
    _refuse_contradictions(options, particles)
    particles.ctf_parameters()
    usable_device(options.device)
    return particles, rows, config


def _subset(particles: Particles, options: AbinitioOptions) -> Tensor:
    """Rows that make the map, ascending."""
    n = len(particles)
    if options.subset is None or options.subset >= n:
        return torch.arange(n)
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randperm(n, generator=generator)[: options.subset].sort().values


def _refuse_contradictions(options: AbinitioOptions, particles: Particles) -> None:
    """Options that cannot be used, before anything is written."""
    _group(options.symmetry)
    _mask(options.mask, particles)
    independent = options.halves == "independent"
    if options.init_map is not None:
        _given_map(options.init_map, particles, "map")
        if independent:
            raise CryoreconError(
                "Half maps that both start from --init-map are not independent",
                "Leave out --init-map or --halves independent",
            )
    if independent and options.subset is not None and options.assign != "none":
        raise CryoreconError(
            "Particles outside a subset cannot join independent half sets",
            "Leave out --subset or --halves independent, or give --assign none",
        )


def _run(
    job: Job,
    particles: Particles,
    rows: Tensor,
    config: RmfnConfig | AmortizedConfig,
    options: AbinitioOptions,
) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    pixel, box = particles.pixel_size_angst, particles.box
    width = f"particle diameter {config.diameter * box * pixel:.0f} A"
    job.say(f"{len(particles)} particles, {size_text(particles)}, {width}")
    device = own_device(options.device, job.ranks)
    if device != "cpu":
        job.say(f"computing on {device_text(device)}")
    with job.bar("Reading", len(particles)) as bar:
        where = options.keep, job.ranks, device
        images = load_observations(particles, config.diameter, lambda done, _: bar(done), *where)
    _set_contrast(job, images, config, options.contrast)
    half = half_sets(particles, generator)
    stages = _stages(job, config, generator, pixel, options, particles)

    def without_symmetry() -> Reconstruction:
        state = _reconstruct(stages, images, half, rows, options, particles)
        if job.writes and isinstance(stages, AmortizedStages) and stages.read is not None:
            write_first_poses(job, particles, *stages.read)
        report_offsets(job, state, config, particles)
        return state

    def in_c1() -> Reconstruction:
        state = without_symmetry()
        if job.writes:
            write_in_full(job, "initial_model_C1.mrc", joint_map(state), particles)
        return state

    if len(_group(options.symmetry)) > 1:
        state = stages.symmetrise(in_c1, images, options.symmetry.upper())
    else:
        state = without_symmetry()
    if job.writes:
        scales = stages.scale_maps(joint_map(state))
        write_results(job, particles, state, scales, options.halves, config)
        report_at_end(job, particles.as_stored())


def _stages(
    job: Job,
    config: RmfnConfig | AmortizedConfig,
    generator: torch.Generator,
    pixel_size_angst: float,
    options: AbinitioOptions,
    particles: Particles,
) -> RmfnStages | AmortizedStages:
    mask = _mask(options.mask, particles)
    mask = None if mask is None else mask.to(job.ranks.device(options.device))
    if isinstance(config, RmfnConfig):
        return RmfnStages(job, config, generator, pixel_size_angst, mask)
    return AmortizedStages(job, config, generator, pixel_size_angst, mask)


def _reconstruct(
    stages: RmfnStages | AmortizedStages,
    images: ImageSet,
    half: Tensor,
    rows: Tensor,
    options: AbinitioOptions,
    particles: Particles,
) -> Reconstruction:
    if options.halves == "independent":
        return stages.independent_halves(images, half)
    if len(rows) == len(images):
        return _first_map(stages, images, half, options, particles)
    stages.job.say(f"{len(rows)} of {len(images)} particles make the map")

    def first() -> Reconstruction:
        return _first_map(stages, images.apart(rows), half[rows], options, particles)

    return stages.extend(first, images, half, rows, refine=options.assign == "refine")


def _first_map(
    stages: RmfnStages | AmortizedStages,
    images: ImageSet,
    half: Tensor,
    options: AbinitioOptions,
    particles: Particles,
) -> Reconstruction:
    if options.init_map is not None and isinstance(stages, RmfnStages):
        stages.job.say(f"starting from {options.init_map}, low-passed; its poses are not used")
        return stages.from_map(images, half, _given_map(options.init_map, particles, "map"))
    return stages.from_scratch(images, half)


def _group(symmetry: str) -> Tensor:
    try:
        return symmetry_group(symmetry)
    except ValueError as error:
        raise CryoreconError(
            f"--symmetry {symmetry} is unknown", "Give C1, Cn, Dn, T, O or I, such as C4 or D2"
        ) from error


def _given_map(path: Path, particles: Particles, what: str) -> Tensor:
    """A map of the images' own box and pixel size, in the box that is worked in."""
    return resample_volume(map_like(path, particles.as_stored(), what), particles.box)


def _mask(path: Path | None, particles: Particles) -> Tensor | None:
    if path is None:
        return None
    mask = map_like(path, particles.as_stored(), "mask")
    if not (float(mask.min()) >= -1e-3 and 0 < float(mask.max()) <= 1.001):
        raise CryoreconError(
            f"The mask {path} has values from {float(mask.min()):g} to {float(mask.max()):g}",
            "A mask goes from 0 to 1",
        )
    return resample_volume(mask, particles.box).clamp(0, 1)


def _set_contrast(job: Job, images: ImageSet, config: RefineConfig, contrast: Contrast) -> None:
    """Make particles white, and say what was found."""
    score = contrast_score(images, config.diameter)
    seen = "white on black" if score > 0 else "BLACK ON WHITE"
    if abs(score) < SURE:
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
