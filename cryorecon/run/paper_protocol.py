"""The published protocol as a job: needs poses in the STAR file, and says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console

from cryorecon.conventions import euler_to_matrix, matrix_to_euler, shell_to_angst
from cryorecon.engines.contrast import Contrast
from cryorecon.engines.observations import Observations
from cryorecon.engines.rmfn_paper import PaperConfig, PaperProtocol, perturbed, scale_bands
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import write_map
from cryorecon.io.particles import Particles, read_particles
from cryorecon.maps.poses import compare_pose_sets
from cryorecon.physics.fourier import max_band
from cryorecon.run.checkpoint import Entry, broken
from cryorecon.run.contrast import first_look
from cryorecon.run.image_checks import checksums, left_out_text
from cryorecon.run.job import Job, Task, open_job, write_output_nodes
from cryorecon.run.load import load_observations
from cryorecon.run.plots import map_figure, pose_error_figure, save_figure
from cryorecon.run.report.written import report_at_end
from cryorecon.run.width import diameter_share

LEAST_DEG, MOST_DEG = 45.0, 90.0


@dataclass(frozen=True)
class PaperOptions:
    """What a user chooses.

    Attributes
    ----------
    diameter_angst : float, optional
        Of the soft mask; default 0.9 of the box.
    project : Path, optional
        Folder that image paths are relative to.
    contrast : "auto", "white" or "black"
    """

    diameter_angst: float | None = None
    project: Path | None = None
    seed: int = 0
    engine: PaperConfig = field(default_factory=PaperConfig)
    contrast: Contrast = "auto"


def abinitio_perturbed(
    star: str | Path,
    output: str | Path,
    options: PaperOptions,
    console: Console,
    *,
    resume: bool = False,
) -> None:
    """Run the protocol from the poses of a STAR file, each turned by 45 to 90 degrees.

    Writes every scale as a map, the poses, and the histogram of their differences from the poses
    in the file before and after (figure 6 of the paper).

    Raises
    ------
    CryoreconError
        If the file has no poses or cannot be used.
    """
    particles = read_particles(star, options.project)
    config = options.engine
    if options.diameter_angst is not None:
        share = diameter_share(options.diameter_angst, particles)
        config = dataclasses.replace(config, diameter=share)
    _refuse_settings(config, particles.box)
    given = euler_to_matrix(torch.from_numpy(particles.euler_deg())).float()
    task = Task(
        "perturbed", Path(star), len(particles), config, options, options.seed, checksums(particles)
    )
    with open_job(Path(output), console, task, resume=resume) as job:
        job.say(f"poses start {LEAST_DEG:g} to {MOST_DEG:g} degrees FROM THOSE IN {star}")
        with job.bar("Reading", len(particles)) as bar:
            observations = load_observations(particles, config.diameter, lambda n, _: bar(n))
        for text in left_out_text(particles, observations.rows):
            job.say(f"WARNING: {text}")
        kept = observations.rows.numpy()
        particles, given = particles.subset(kept), given[kept]
        observations = first_look(job, observations, config.diameter, options.contrast)
        run = _begin(particles, observations.whole(), config, given, options.seed)
        _train(job, run, particles)
        _write(job, run, particles, given)
        report_at_end(job, particles)


def _refuse_settings(config: PaperConfig, box: int) -> None:
    """Settings that no training can be made with, before anything is written."""
    epochs, steps = config.epochs, (config.batch, config.structure_steps, config.pose_steps)
    if not epochs or min(epochs) < 0 or sum(epochs) == 0 or min(steps) < 1:
        raise CryoreconError(
            f"No training has epochs {list(epochs)}, batches and steps of {min(steps)}",
            "Give --set epochs=[25,25,50], and batch, structure_steps and pose_steps of 1 or more",
        )
    bands = scale_bands(max_band(box), config) if config.coarsest >= 0 else ()
    if len(bands) < len(epochs) or any(a >= b for a, b in pairwise(bands)):
        raise CryoreconError(
            f"Images of {box} px have no {len(epochs)} scales from {config.coarsest} cycles on",
            "Give fewer --set epochs, or another coarsest",
        )


def _begin(
    particles: Particles,
    observations: Observations,
    config: PaperConfig,
    given: torch.Tensor,
    seed: int,
) -> PaperProtocol:
    generator = torch.Generator().manual_seed(seed)
    start = perturbed(given, LEAST_DEG, MOST_DEG, generator)
    offsets = torch.from_numpy(particles.origins_angst() / particles.pixel_size_angst).float()
    return PaperProtocol(config, observations, start, offsets, generator)


def _train(job: Job, run: PaperProtocol, particles: Particles) -> None:
    total, begun = sum(run.config.epochs), 0
    saved = job.checkpoint.get("training")
    if saved is not None:
        begun = saved["epochs"]
        run.load(saved["run"])
        job.say(f"the training goes on after {begun} epochs")
    with job.bar("Training", total * len(particles)) as bar:
        for scale, done, loss in _epochs(run, begun):
            band = run.bands[scale]
            angst = shell_to_angst(band, particles.box, particles.pixel_size_angst)
            bar(done * len(particles), f"scale {scale + 1} at {angst:.1f} A, loss {loss:.4f}")
            if done == total or done == sum(run.config.epochs[: scale + 1]):
                job.say(f"epoch {done}: scale {scale + 1} at {angst:.1f} A, loss {loss:.4f}")
            pack = partial(_pack, run, done)
            job.checkpoint.put("training", pack, force=done == total)


def _pack(run: PaperProtocol, done: int) -> Entry:
    return {"epochs": done, "run": run.state()}


def _epochs(run: PaperProtocol, begun: int) -> Iterator[tuple[int, int, float]]:
    try:
        yield from run.epochs(begun)
    except FloatingPointError as error:
        raise broken("The training", error) from error


def _write(job: Job, run: PaperProtocol, particles: Particles, given: torch.Tensor) -> None:
    pixel = particles.pixel_size_angst
    trained = [scale for scale, count in enumerate(run.config.epochs) if count]
    for scale in range(len(run.bands)):
        write_map(job.path(f"scale{scale + 1}.mrc"), run.volume(scale).numpy(), pixel)
    final = run.volume(trained[-1]).numpy()
    write_map(job.path("initial_model.mrc"), final, pixel)
    particles.write(
        job.path("run_data.star"),
        euler_deg=matrix_to_euler(run.rotations.double()).numpy(),
        origins_angst=particles.origins_angst(),
        class_number=1,
    )
    errors = compare_pose_sets(run.rotations.double(), given.double())
    title = f"poses against those in {particles.path.name}"
    save_figure(pose_error_figure(errors, title), job.path("pose_errors.png"))
    save_figure(map_figure(final, pixel, "initial_model.mrc"), job.path("map.png"))
    write_output_nodes(job.folder, {"initial_model.mrc": 6, "run_data.star": 3})
    job.say(f"poses differ from those in the file by {errors.median_deg:.2f} deg (median)")
    for name in ("initial_model.mrc", "run_data.star", "pose_errors.png", "map.png"):
        job.say(str(job.path(name)))
