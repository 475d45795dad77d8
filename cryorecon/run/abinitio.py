"""The ab initio job of any engine, from a STAR file to a map, poses, half maps and FSC."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from cryorecon.engines.amortized import AmortizedConfig
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import Reconstruction, RefineConfig
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.io.particles import Particles
from cryorecon.ranks import ALONE, Ranks
from cryorecon.run.abinitio_input import (
    AbinitioOptions,
    Prepared,
    given_mask,
    prepared,
    starting_map,
)
from cryorecon.run.amortized_stages import AmortizedStages
from cryorecon.run.contrast import first_look
from cryorecon.run.device import device_text, own_device
from cryorecon.run.empty_shells import empty_text
from cryorecon.run.flip_check import look_flipped
from cryorecon.run.half_sets import half_sets
from cryorecon.run.image_checks import checksums, left_out_text
from cryorecon.run.job import Job, Task, open_job
from cryorecon.run.load import load_observations
from cryorecon.run.repeats import repeats
from cryorecon.run.report.written import report_at_end
from cryorecon.run.results import (
    joint_map,
    recorded_scale,
    report_poses,
    scaled,
    size_text,
    write_first_poses,
    write_in_full,
    write_results,
)
from cryorecon.run.rmfn_stages import RmfnStages
from cryorecon.run.settings import point_group


def abinitio(
    star: str | Path,
    output: str | Path,
    options: AbinitioOptions,
    console: Console,
    *,
    resume: bool = False,
    ranks: Ranks = ALONE,
    begun_with: float | None = None,
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
    begun_with : float, optional
        Diameter of an interrupted job, as a share of the box: images are not asked for it anew.

    Raises
    ------
    CryoreconError
        For input or options that cannot be used, or with fewer than 20 particles.
    """
    ready = prepared(star, options, ranks, begun_with)
    # Processes that must share a GPU are refused before anything is touched.
    own_device(options.device, ranks)
    also = checksums(ready.particles, mask=options.mask, init_map=options.init_map)
    known = ready.config, options, options.seed, also
    task = Task("abinitio", Path(star), len(ready.particles), *known)
    with open_job(Path(output), console, task, resume=resume, ranks=ranks) as job:
        _run(job, ready, options)


def _run(job: Job, ready: Prepared, options: AbinitioOptions) -> None:
    particles, rows, config = ready[:3]
    generator = torch.Generator().manual_seed(options.seed)
    job.say(f"{len(particles)} particles, {size_text(particles)}, {ready.width_text}")
    for doubt in ready.doubts:
        job.say(f"WARNING: {doubt}")
    images = _read_images(job, particles, config, options)
    particles, rows = _those_read(images, particles, rows)
    same = repeats(particles, config.diameter)
    half = half_sets(particles, generator, same, job.say)
    stages = _stages(job, config, generator, options, particles)
    stages.first_alike = same.first
    factor = recorded_scale(images, particles)

    def without_symmetry() -> Reconstruction:
        state = _reconstruct(stages, images, half, rows, options, particles)
        if job.writes and isinstance(stages, AmortizedStages) and stages.read is not None:
            write_first_poses(job, particles, *stages.read)
        return state

    def in_c1() -> Reconstruction:
        state = without_symmetry()
        if job.writes:
            write_in_full(job, "initial_model_C1.mrc", joint_map(state) * factor, particles)
        return state

    if len(point_group(options.symmetry)) > 1:
        apart = options.halves == "independent"
        state = stages.symmetrise(in_c1, images, options.symmetry.upper(), independent=apart)
    else:
        state = without_symmetry()
    report_poses(job, state, config, particles)
    _doubt_phases(job, particles, images, state, config)
    if job.writes:
        scales = [volume * factor for volume in stages.scale_maps(joint_map(state))]
        merit = images.dimming
        write_results(job, particles, scaled(state, factor), scales, options.halves, config, merit)
        report_at_end(job, particles.as_stored())


def _doubt_phases(
    job: Job, particles: Particles, images: ImageSet, state: Reconstruction, config: RefineConfig
) -> None:
    flipped = bool((particles.ctf_parameters().phase_flipped != 0).any())
    if not flipped and look_flipped(images, state, config):
        job.say(
            "WARNING: half maps agree further by the magnitude of the CTF: the images look phase "
            "flipped. Write rlnCtfDataArePhaseFlipped 1 into the optics table and run again"
        )


def _read_images(
    job: Job, particles: Particles, config: RefineConfig, options: AbinitioOptions
) -> ImageSet:
    """All images on the job's device, their particles white."""
    device = own_device(options.device, job.ranks)
    if device != "cpu":
        job.say(f"computing on {device_text(device)}")
    with job.bar("Reading", len(particles)) as bar:
        where = options.keep, job.ranks, device
        images = load_observations(particles, config.diameter, lambda done, _: bar(done), *where)
    left_out = left_out_text(particles, images.rows)
    for text in left_out + empty_text(images, particles.pixel_size_angst):
        job.say(f"WARNING: {text}")
    return first_look(job, images, config.diameter, options.contrast)


def _those_read(images: ImageSet, particles: Particles, rows: Tensor) -> tuple[Particles, Tensor]:
    """Particles whose images can be worked with, and those among them that make the map."""
    if len(images) == len(particles):
        return particles, rows
    return (
        particles.subset(images.rows.numpy()),
        torch.nonzero(torch.isin(images.rows, rows.int()))[:, 0],
    )


def _stages(
    job: Job,
    config: RmfnConfig | AmortizedConfig,
    generator: torch.Generator,
    options: AbinitioOptions,
    particles: Particles,
) -> RmfnStages | AmortizedStages:
    mask = given_mask(options.mask, particles)
    mask = None if mask is None else mask.to(job.ranks.device(options.device))
    stages: RmfnStages | AmortizedStages
    if isinstance(config, RmfnConfig):
        stages = RmfnStages(job, config, generator, particles.pixel_size_angst, mask)
    else:
        stages = AmortizedStages(job, config, generator, particles.pixel_size_angst, mask)
    return stages


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
        start = starting_map(options.init_map, particles, stages.config.diameter)
        return stages.from_map(images, half, start)
    return stages.from_scratch(images, half)
