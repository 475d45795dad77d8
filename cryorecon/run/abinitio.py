"""The ab initio job with engine rmfn, from a STAR file to a map, poses, half maps and FSC."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from cryorecon.conventions import matrix_to_euler, shell_to_angst
from cryorecon.engines.observations import Observations
from cryorecon.engines.rmfn import RmfnConfig, RmfnState, Search, assign
from cryorecon.engines.rmfn_refine import fit_scales, half_maps, reassign, refine_round
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import write_map
from cryorecon.io.particles import Particles, read_particles
from cryorecon.maps.fsc import fsc_curve
from cryorecon.run.curves import FscCurve, write_fsc_star, write_fsc_xml
from cryorecon.run.job import Job, open_job, write_output_nodes
from cryorecon.run.load import half_sets, load_observations
from cryorecon.run.plots import (
    fsc_figure,
    map_figure,
    save_figure,
    viewing_direction_figure,
)

# All images are searched again after this round, and every second round from then on while more
# than this share of them finds a better pose.
_FIRST_NEW_SEARCH = 3
_ENOUGH_FOUND = 0.02


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
    engine : RmfnConfig
        Its diameter and offset range are replaced by the two above.
    """

    diameter_angst: float | None = None
    offset_range_angst: float | None = None
    project: Path | None = None
    seed: int = 0
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


class _Update(Protocol):
    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def _bar(console: Console, title: str, total: int) -> Iterator[_Update]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(title, total=total, rate="", note="")

        def update(done: int, note: str = "") -> None:
            seconds = progress.tasks[0].elapsed or 1e-9
            progress.update(task, completed=done, rate=f"{done / seconds:.0f} images/s", note=note)

        yield update


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
        _run(job, particles, config, options.seed)


def _run(job: Job, particles: Particles, config: RmfnConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixel, box = particles.pixel_size_angst, particles.box
    job.say(
        f"{len(particles)} particles, {box} px at {pixel:g} A, particle diameter "
        f"{config.diameter * box * pixel:.0f} A"
    )
    with _bar(job.console, "Reading", len(particles)) as bar:
        observations = load_observations(particles, config.diameter, lambda done, _: bar(done))
    half = half_sets(particles, generator)
    search = _search(job, observations, config, generator, pixel)
    with _bar(job.console, "Assigning", len(observations)) as bar:
        state = assign(search, observations, half, bar)
    job.say("every image has a first pose")
    _refine(job, state, observations, config, generator, pixel)
    job.say("fitting the network's scales to the map")
    scales = fit_scales(state, config, generator)
    _write(job, particles, state, scales)


def _search(
    job: Job,
    observations: Observations,
    config: RmfnConfig,
    generator: torch.Generator,
    pixel_size_angst: float,
) -> Search:
    """Run the starts and keep the likeliest."""
    box = observations.plane.box
    n = min(config.search_images, len(observations))
    best: Search | None = None
    band_angst = shell_to_angst(config.search_band(box), box, pixel_size_angst)
    job.say(f"searching from random poses at {band_angst:.1f} A with {n} images")
    for start in range(config.n_starts):
        rows = torch.randperm(len(observations), generator=generator)[:n]
        search = Search(config, observations.select(rows), generator)
        title = f"Search {start + 1}/{config.n_starts}"
        with _bar(job.console, title, n * len(config.temperatures)) as bar:
            done = 0
            for temperature in config.temperatures:
                for batch in search.batches():
                    effective = search.step(batch, temperature)
                    done += len(batch)
                    bar(done, f"{band_angst:.1f} A, {effective:.1f} poses an image")
                search.end_epoch()
        job.say(f"start {start + 1}: log-evidence {search.log_evidence:.2f} an image")
        if best is None or search.log_evidence > best.log_evidence:
            best = search
    assert best is not None
    return best


def _refine(
    job: Job,
    state: RmfnState,
    observations: Observations,
    config: RmfnConfig,
    generator: torch.Generator,
    pixel_size_angst: float,
) -> None:
    """Rounds against the half maps until they settle, then against the joint map."""
    box, n = observations.plane.box, len(observations)
    settled, joint_left, number = False, config.joint_rounds, 0
    search_after: int | None = _FIRST_NEW_SEARCH
    while not settled or joint_left > 0:
        joint = settled
        if number == search_after:
            with _bar(job.console, "Searching again", n) as bar:
                share = reassign(state, observations, config, generator, bar)
            job.say(f"searched again: {100 * share:.1f} % of the images found a better pose")
            search_after = number + 2 if share > _ENOUGH_FOUND else None
        number += 1
        band_angst = shell_to_angst(state.band, box, pixel_size_angst)
        title = f"Refining {'all' if joint else 'halves'} at {band_angst:.2f} A"
        with _bar(job.console, title, n) as bar:
            report = refine_round(
                state,
                observations,
                config,
                fsc_curve,
                joint=joint,
                n_steps=8 if number == 1 else 4,
                progress=bar,
            )
        agreed = shell_to_angst(report.agreement_band, box, pixel_size_angst)
        job.say(
            f"round {number} ({'joint' if joint else 'half'} maps) at {band_angst:.2f} A: "
            f"log-likelihood {report.log_likelihood:.2f}, poses moved "
            f"{report.pose_change_deg:.2f} deg and {report.offset_change_px:.2f} px, half maps "
            f"agree to {agreed:.2f} A"
        )
        joint_left -= joint
        stable = report.pose_change_deg < config.settled_deg and state.band <= report.band
        settled = settled or (stable and search_after is None) or number >= config.half_rounds


def _write(job: Job, particles: Particles, state: RmfnState, scales: list[Tensor]) -> None:
    pixel, box = particles.pixel_size_angst, particles.box
    joint = ((state.maps[0] + state.maps[1]) / 2).numpy()
    write_map(job.path("initial_model.mrc"), joint, pixel)
    for number, volume in enumerate(half_maps(state, box), 1):
        write_map(job.path(f"run_half{number}_class001_unfil.mrc"), volume.numpy(), pixel)
    for number, volume in enumerate(scales, 1):
        write_map(job.path(f"scale{number}.mrc"), volume.numpy(), pixel)
    particles.write(
        job.path("run_data.star"),
        euler_deg=matrix_to_euler(state.rotations.double()).numpy(),
        origins_angst=(state.offsets_px.double() * pixel).numpy(),
        random_subsets=(state.half + 1).numpy(),
        class_number=1,
    )
    curve = FscCurve(
        state.fsc, box, pixel, "half maps split after the search", "soft sphere of the diameter"
    )
    write_fsc_star(job.path("fsc.star"), curve)
    write_fsc_xml(job.path("fsc.xml"), curve)
    save_figure(fsc_figure({"half maps": curve}), job.path("fsc.png"))
    save_figure(map_figure(joint, pixel, "initial_model.mrc"), job.path("map.png"))
    views = viewing_direction_figure(state.rotations, "run_data.star")
    save_figure(views, job.path("views.png"))
    write_output_nodes(job.folder, {"initial_model.mrc": 6, "run_data.star": 3})
    job.say(f"half maps, masked: {curve.resolution_text(0.143)}")
    job.say("projections do not tell the hand: the mirror image of the map is as good")
    written = "initial_model.mrc run_data.star fsc.star fsc.png map.png views.png"
    for name in written.split():
        job.say(f"{job.path(name)}")
