"""From a moments file to a map, or to the statement that the moments do not determine one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import healpix
import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from cryorecon.engines.moments.config import MomentFitConfig
from cryorecon.engines.moments.fit import Fitter, MomentFit, visible_radius
from cryorecon.engines.moments.forms import Moments, MomentsGeometry
from cryorecon.engines.moments.full_fit import FullViews, in_plane_departure
from cryorecon.engines.moments.information import expected_fsc, information_bytes
from cryorecon.engines.moments.models import Beads, Density, ViewDensity
from cryorecon.engines.reconstruction import RefineConfig
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import write_map
from cryorecon.io.particles import read_particles
from cryorecon.io.star import write_star
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import crossing_shell, fsc_curve
from cryorecon.physics.fourier import lowpass
from cryorecon.ranks import ALONE, Ranks
from cryorecon.run.curves import FscCurve, write_fsc_star
from cryorecon.run.device import own_device
from cryorecon.run.given_maps import map_like
from cryorecon.run.image_checks import checksums
from cryorecon.run.job import Job, Task, continue_command, open_job, write_output_nodes
from cryorecon.run.moments.estimate import MomentsOptions, moments_of, resolve_geometry, state_path
from cryorecon.run.moments.maps import on_images
from cryorecon.run.moments.restarts import all_starts
from cryorecon.run.moments.start_map import (
    LARGEST_INFORMATION,
    StartMap,
    compare_with_starts,
    fit_start_map,
)
from cryorecon.run.moments.store import finished_moments, read_moments
from cryorecon.run.moments.trust import Trust, agreement_with_best
from cryorecon.run.plots import fsc_figure, map_figure, save_figure, view_density_figure
from cryorecon.run.report.written import report_at_end
from cryorecon.run.results import write_model
from cryorecon.run.table_doubts import table_doubts

# Cells of the picture of viewing directions.
_NSIDE = 16
_LEAST_RADIUS = 3


@dataclass(frozen=True)
class MomentReconstructOptions:
    """What a user chooses.

    Attributes
    ----------
    engine : MomentFitConfig
    reference : Path, optional
        A map of the images' box and pixel size to align the result to.
    start_map : StartMap, optional
        A map to fit from as well, to tell whether moments or search hold the random starts back.
        With it `engine.starts` may be 0.
    allow_ambiguous : bool
        Write the best map even if starts that fit equally well disagree.
    seed : int
    device : str
    """

    engine: MomentFitConfig = field(default_factory=MomentFitConfig)
    reference: Path | None = None
    start_map: StartMap | None = None
    allow_ambiguous: bool = False
    seed: int = 0
    device: str = "cpu"


def reconstruct_moments(
    path: Path,
    output: Path,
    options: MomentReconstructOptions,
    console: Console,
    *,
    resume: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Fit a map and a view density to a moments file and write what can be trusted.

    Parameters
    ----------
    path : Path
        From ``cryorecon moments estimate``, in either form.
    output : Path
        Job directory.
    resume : bool
        Go on with what an interrupted job left there.
    ranks : Ranks
        Processes that share the starts; the first one writes.

    Raises
    ------
    CryoreconError
        If the file does not fit, shows no signal, or does not determine a map.
    """
    moments = read_moments(path)
    reference = None
    if options.reference is not None:
        reference = map_like(options.reference, moments.geometry, "reference")
    given = None
    if options.start_map is not None:
        if ranks.count > 1:
            raise CryoreconError("--start-map is fitted by one process", "Run it without torchrun")
        given = map_like(options.start_map.path, moments.geometry, "start map")
    elif options.engine.starts == 0:
        raise CryoreconError("Nothing to start from", "Give --starts 2 or more, or --start-map")
    own_device(options.device, ranks)
    task = Task("moments-fit", path, moments.n_images, options, options, options.seed)
    with open_job(output, console, task, resume=resume, ranks=ranks) as job:
        _fit_and_write(job, path, moments, options, reference, given)


def abinitio_moments(
    star: Path,
    output: Path,
    wanted: MomentsOptions,
    options: MomentReconstructOptions,
    console: Console,
    *,
    resume: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Both steps in one job directory: ``moments.h5``, then the map.

    Raises
    ------
    CryoreconError
        If input or options do not fit, or the moments do not determine a map.
    StoppedError
        If asked to stop; the state is on disk.
    """
    particles = read_particles(star, wanted.project)
    resolve_geometry(wanted, particles.box, particles.pixel_size_angst)
    own_device(options.device, ranks)
    doubts = table_doubts(particles, ctf=wanted.ctf)
    both = {"moments": wanted, "fit": options}
    task = Task("moments", star, len(particles), both, both, options.seed, checksums(particles))
    with open_job(output, console, task, resume=resume, ranks=ranks) as job:
        for doubt in doubts:
            job.say(f"WARNING: {doubt}")
        path = job.path("moments.h5")
        job.checkpoint.before = state_path(path), "what has been averaged"
        found = finished_moments(path, star) if resume else None
        if found is None:
            begun = resume and state_path(path).exists()
            with job.bar("Averaging", len(particles)) as bar:
                found = moments_of(
                    particles,
                    path,
                    wanted,
                    begun,
                    lambda done, _: bar(done),
                    job.stop,
                    lambda *done: bar(len(particles), "noise: shell {} of {}".format(*done)),
                    ranks,
                    job.say,
                )
        _fit_and_write(job, path, found, options, None)


def _fit_and_write(
    job: Job,
    path: Path,
    moments: Moments,
    options: MomentReconstructOptions,
    reference: Tensor | None,
    given: Tensor | None = None,
) -> None:
    radius = _radius(path, moments, options.engine, job)
    device = own_device(options.device, job.ranks)
    fitter = Fitter.of(moments, options.engine, radius, device)
    near, geometry = None, moments.geometry.in_particle_box()
    if given is not None and options.start_map is not None:
        near = fit_start_map(job, fitter, options.start_map, given, geometry, options.seed)
        if options.engine.starts == 0:
            compare_with_starts(job, near, [], [], geometry)
            job.say("no random starts: nothing but from_start_map.mrc and shells.star, both USE IT")
            return
    fits = all_starts(fitter, options.engine.starts, options.seed, job)
    if not job.writes:
        return
    best = fits[0][1]
    _tell_information(fitter, best, geometry, job)
    _tell_in_plane(fitter, best, job)
    maps = [on_images(fit.volume, geometry, radius) for _, fit in fits]
    agreement = agreement_with_best([fit for _, fit in fits], maps, geometry, radius)
    good = sum(agreed is not None for agreed in agreement[1:])
    job.say(f"{good} of {len(fits) - 1} other starts fit the moments as well as the best")
    _write_starts(job, fits, agreement)
    if near is not None:
        compare_with_starts(job, near, [fit.misfit for _, fit in fits], maps, geometry)
    trust = Trust.of(best, agreement, geometry, radius)
    if trust.radius == 0 and not options.allow_ambiguous:
        raise CryoreconError(
            trust.said,
            "See starts.star; average more particles, raise --starts or --set settling, fit "
            "fewer radii, or write the best map all the same: "
            f"{continue_command(job.folder)} --allow-ambiguous",
        )
    trusted = _trusted(job, maps[0], geometry, trust)
    _write_result(job, trusted, best.density, geometry, trust)
    _compare_starts(job, maps, agreement, geometry, trust)
    job.say(f"{job.path('initial_model.mrc')}  refine it: abinitio-rmfn --init-map")
    if reference is not None:
        _compare(job, trusted, reference, str(options.reference), geometry.pixel_size_angst)
    report_at_end(job)


def _radius(path: Path, moments: Moments, config: MomentFitConfig, job: Job) -> int:
    """How far the moments are fitted: as asked, while they stand above their errors."""
    inside = moments.geometry.in_particle_box()
    visible, side, held = visible_radius(moments), inside.side_angst, inside.max_radius
    if visible < _LEAST_RADIUS:
        raise CryoreconError(
            f"No signal found: the second moment of {path} stands above its error only up to "
            f"radius {visible} of the file's {held}; {_LEAST_RADIUS} are needed",
            "Average more particles or more radii, check --diameter and the CTF, or use "
            "abinitio-rmfn",
        )
    radius = min(config.radius, visible)
    why = "the file holds no more" if radius == held else "beyond that, errors exceed the signal"
    why = "as asked" if radius == config.radius else why
    source = f"{moments.n_images} images" if moments.n_images else "exact moments"
    job.say(f"{source}; radii to {radius}, {side / radius:.1f} A ({why})")
    low = min(inside.third_radius, radius, config.third_radius)
    if low:
        job.say(f"third moments of radii to {low}, {side / low:.1f} A")
    return radius


def _tell_information(fitter: Fitter, best: MomentFit, geometry: MomentsGeometry, job: Job) -> None:
    """How far the moments determine the map near the best start."""
    if not isinstance(best.volume, Beads):
        return
    if information_bytes(fitter, best) > LARGEST_INFORMATION:
        job.say("how far the moments determine the map is not computed: too many entries")
        return
    curve = expected_fsc(fitter, best)
    radii = np.arange(1, len(curve))
    table = pd.DataFrame(
        {
            "cryoreconRadius": radii,
            "rlnAngstromResolution": geometry.side_angst / radii,
            "cryoreconExpectedFsc": curve[1:].numpy(),
        }
    )
    write_star(job.path("information.star"), {"information": table})
    shell = crossing_shell(curve, 0.5)
    reach = f"to {geometry.side_angst / shell:.1f} A" if shell > 0 else "to no radius"
    job.say(f"near the best start the moments determine the map {reach} (expected FSC 0.5)")


def _tell_in_plane(fitter: Fitter, best: MomentFit, job: Job) -> None:
    """How uniform in-plane angles are, where the moments tell."""
    views = fitter.views[-1]
    if isinstance(views, FullViews):
        with torch.no_grad():
            found = torch.cat(best.density.probabilities(views))
        share = in_plane_departure(found, views)
        job.say(f"in-plane angles are within {100 * share:.0f} % of uniform (root mean square)")


def _write_starts(
    job: Job, fits: list[tuple[int, MomentFit]], agreement: list[float | None]
) -> None:
    rows = [
        {
            "cryoreconStart": number,
            "cryoreconMisfit": fit.misfit,
            "cryoreconFirstMomentError": fit.frobenius[0],
            "cryoreconSecondMomentError": fit.frobenius[1],
            "cryoreconFirstMomentErrorWhitened": fit.white[0],
            "cryoreconSecondMomentErrorWhitened": fit.white[1],
            "cryoreconAgreementRadius": -1.0 if agreed is None else agreed,
        }
        for (number, fit), agreed in zip(fits, agreement, strict=True)
    ]
    write_star(job.path("starts.star"), {"starts": pd.DataFrame(rows)})


def _trusted(job: Job, best: Tensor, geometry: MomentsGeometry, trust: Trust) -> Tensor:
    """The best start's map as far as the others confirm it; all of it if none do."""
    if trust.radius == 0:
        job.say(f"AMBIGUOUS: {trust.said}")
    if trust.radius == 0 or not trust.said:
        return best
    whole = job.path("initial_model_unfiltered.mrc")
    write_map(whole, best.numpy(), geometry.pixel_size_angst)
    job.say(f"{trust.said}. initial_model.mrc ends there; what is beyond, in {whole.name}, only "
            "the best start says")  # fmt: skip
    return lowpass(best, trust.radius * geometry.image_side_angst / geometry.side_angst, 3)


def _label(trust: Trust) -> str:
    return "" if trust.radius > 0 else f"AMBIGUOUS: {trust.label}; "


def _write_result(
    job: Job, volume: Tensor, density: Density, geometry: MomentsGeometry, trust: Trust
) -> None:
    pixel = geometry.pixel_size_angst
    config = RefineConfig(diameter=geometry.diameter)
    write_output_nodes(job.folder, write_model(job, volume, pixel, config, ends=True))
    reach = f"{geometry.side_angst / trust.radius:.1f} A; " if trust.radius > 0 else ""
    title = f"{_label(trust)}map from moments, {reach}hand unknown"
    save_figure(map_figure(volume.numpy(), pixel, title), job.path("map.png"))
    cells = np.arange(12 * _NSIDE**2)
    tilt, rot = healpix.pix2ang(_NSIDE, cells)
    flat = np.stack([np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)], -1)
    values = density.over_uniform(torch.from_numpy(flat)).numpy()
    smooth = isinstance(density, ViewDensity) and density.residual is None
    figure = view_density_figure(values, f"views, from moments{'' if smooth else ', smooth part'}")
    save_figure(figure, job.path("views.png"))
    columns = {"rlnAngleRot": np.rad2deg(rot), "rlnAngleTilt": np.rad2deg(tilt)}
    table = pd.DataFrame({**columns, "cryoreconViewDensity": values})
    write_star(job.path("view_density.star"), {"view_density": table})


def _compare_starts(
    job: Job,
    maps: list[Tensor],
    agreement: list[float | None],
    geometry: MomentsGeometry,
    trust: Trust,
) -> None:
    """FSC of the best start and the one, of those that fit as well, that is least like it.

    If none does, of the next one.
    """
    if len(maps) > 1:
        as_good = {k: agreed for k, agreed in enumerate(agreement) if k > 0 and agreed is not None}
        other = min(as_good, key=lambda k: as_good[k]) if as_good else 1
        values = fsc_curve(maps[other], maps[0])
        pair = "the two least alike of the best starts" if as_good else "the two best starts"
        what = f"{_label(trust)}{pair}, no half maps"
        curve = FscCurve(values, geometry.box, geometry.pixel_size_angst, what, aligned=True)
        write_fsc_star(job.path("fsc.star"), curve, 0.5)
        save_figure(fsc_figure({what: curve}, [0.5]), job.path("fsc.png"))


def _compare(job: Job, volume: Tensor, target: Tensor, name: str, pixel: float) -> None:
    found = align_maps(volume, target, pixel)
    moved = apply_alignment(volume, found)
    path = job.path("initial_model_aligned.mrc")
    write_map(path, moved.numpy(), pixel)
    curve = FscCurve(fsc_curve(moved, target), len(target), pixel, f"map and {name}", aligned=True)
    hand = "mirrored" if found.flipped else "same hand"
    job.say(f"{path}  on {name}: {curve.resolution_text(0.5)} ({hand})")
