"""Moments of a particle stack: one pass over the images, in memory that does not grow with them."""

from __future__ import annotations

import copy
import dataclasses
import glob
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from cryorecon.engines.contrast import Contrast
from cryorecon.engines.moments.forms import (
    BOX_OVER_DIAMETER,
    Form,
    Moments,
    MomentsGeometry,
)
from cryorecon.engines.moments.sums import MomentSums
from cryorecon.engines.moments.sums_full import check_full
from cryorecon.errors import CryoreconError
from cryorecon.io.files import remove_unfinished, sha256_of
from cryorecon.io.particles import Particles, read_particles
from cryorecon.physics.fourier import max_band
from cryorecon.ranks import ALONE, Ranks
from cryorecon.run.contrast import bright_text
from cryorecon.run.device import own_device
from cryorecon.run.image_checks import left_out_text
from cryorecon.run.load import with_next
from cryorecon.run.moments.reader import Reader
from cryorecon.run.moments.store import (
    Progress,
    finished_moments,
    load_progress,
    new_sums,
    save_progress,
)
from cryorecon.run.stopping import Stop, StoppedError, listening
from cryorecon.run.table_doubts import table_doubts
from cryorecon.run.width import LEAST_PIXELS, ROUNDED, WIDEST, limits_text

_BLOCK = 128
_DEFAULT_RADIUS = 16
# Of a particle's width: less shows nothing.
_LEAST_PIXELS = 4
_DEFAULT_THIRD = 6
# Beyond this radius the moments take seconds to solve for once all images are summed.
_LONG_FINISH = 32


@dataclass(frozen=True)
class MomentsOptions:
    """What a user chooses.

    Attributes
    ----------
    form : "steerable" or "full"
    diameter_angst : float, optional
        Of the particle; default 0.8 of the image.
    max_radius : int, optional
        In cycles per particle box (steerable) or per image (full).
    resolution_angst : float, optional
        Sets `max_radius` where that is not given; default radius 16, or what the images hold.
    max_order : int, optional
        Largest angular order; default what a particle of this diameter has.
    third_radius : int
        Third moments too, of radii up to this one, 6 unless told (0 in the full form); 0 for none.
    noise_std : float, optional
        Standard deviation of white noise, in the units of the file; images then keep their
        scale, and only lose their level. Default: spectra from outside the particle, image by
        image.
    ctf : bool
        Correct for the CTF.
    contrast : "auto", "white" or "black"
    project : Path, optional
        Folder that image paths are relative to.
    device : str
    checkpoint_images : int
        Images between two states on disk.
    """

    form: Form = "steerable"
    diameter_angst: float | None = None
    max_radius: int | None = None
    resolution_angst: float | None = None
    max_order: int | None = None
    third_radius: int | None = None
    noise_std: float | None = None
    ctf: bool = True
    contrast: Contrast = "auto"
    project: Path | None = None
    device: str = "cpu"
    checkpoint_images: int = 20_000


def resolve_geometry(options: MomentsOptions, box: int, pixel_size_angst: float) -> MomentsGeometry:
    """Which moments the options ask for, of images of a given size.

    Raises
    ------
    CryoreconError
        If the particle or the resolution does not fit the images.
    """
    image_side = box * pixel_size_angst
    diameter = 0.8 * image_side if options.diameter_angst is None else options.diameter_angst
    least = LEAST_PIXELS * pixel_size_angst
    if not least <= diameter * ROUNDED or diameter > WIDEST * image_side * ROUNDED:
        raise CryoreconError(
            f"A particle of {diameter:g} A does not fit images {image_side:.4g} A wide, of "
            f"{pixel_size_angst:g} A a pixel",
            f"Give --diameter in angstrom, {limits_text(image_side, pixel_size_angst)}",
        )
    _refuse_contradictions(options)
    steerable = options.form == "steerable"
    side = min(BOX_OVER_DIAMETER * diameter, image_side) if steerable else image_side
    largest = int(max_band(box) * side / image_side + 1e-9)
    radius = options.max_radius or min(_DEFAULT_RADIUS, largest)
    if options.max_radius is None and options.resolution_angst is not None:
        radius = int(side / options.resolution_angst + 1e-9)
    if not 1 <= radius <= largest:
        raise CryoreconError(
            f"Radius {radius} ({side / max(radius, 1):.1f} A) is not within the images' "
            f"1 to {largest} cycles per {side:.0f} A",
            f"Give --resolution between {np.ceil(10 * side / largest) / 10:.1f} and "
            f"{np.floor(10 * side) / 10:g}, or --max-radius",
        )
    order = int(np.pi * radius * diameter / side) + 2
    order = (order if options.max_order is None else options.max_order) if steerable else 0
    return MomentsGeometry(
        options.form,
        box,
        pixel_size_angst,
        diameter,
        side,
        radius,
        order,
        normalised=options.noise_std is None,
        noise_std=options.noise_std or 0.0,
        ctf=options.ctf,
        contrast=options.contrast,
        third_radius=_third_radius(options, radius if steerable else 0),
    )


def _refuse_contradictions(options: MomentsOptions) -> None:
    if options.max_radius is not None and options.resolution_angst is not None:
        raise CryoreconError("--max-radius and --resolution say the same", "Give one of them")
    if options.max_order is not None and options.form == "full":
        raise CryoreconError("The full form has no orders", "Leave --max-order out")


def _third_radius(options: MomentsOptions, radius: int) -> int:
    """Largest radius of third moments, when those of both lower ones reach to a radius."""
    if options.third_radius is None:
        return min(_DEFAULT_THIRD, radius)
    if options.third_radius > radius:
        raise CryoreconError(
            f"Third moments to radius {options.third_radius} are not among the {options.form} "
            f"moments to radius {radius}",
            "Give --third at most --max-radius, and --form steerable",
        )
    return options.third_radius


def estimate_moments(
    path: Path,
    output: Path,
    options: MomentsOptions,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    finishing: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] | None = None,
) -> Moments:
    """Estimate moments and write them; the state is kept beside the output while it runs.

    Parameters
    ----------
    path : Path
        Particle STAR file.
    output : Path
        File to write (.h5).
    resume : bool
        Go on from the state that an interrupted run left; what is finished stays as it is.
    progress : callable, optional
        Called with (images done, images in all).
    finishing : callable, optional
        Called with (shells done, shells in all) while the noise is subtracted at the end.
    ranks : Ranks
        Processes that share the images; the first one writes.
    say : callable, optional
        Told of whatever is odd about the table, and of images that are left out.

    Raises
    ------
    CryoreconError
        If input, options or state do not fit.
    StoppedError
        After Ctrl-C, with the state on disk.
    """
    particles = read_particles(path, options.project)
    if say is not None:
        for doubt in table_doubts(particles, ctf=options.ctf):
            say(f"WARNING: {doubt}")
    return moments_of(
        particles, output, options, resume, progress, finishing=finishing, ranks=ranks, say=say
    )


def moments_of(
    particles: Particles,
    output: Path,
    options: MomentsOptions,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    stop: Stop | None = None,
    finishing: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] | None = None,
) -> Moments:
    """The same for particles whose table is read; `stop` is the job's, if there is one."""
    geometry = resolve_geometry(options, particles.box, particles.pixel_size_angst)
    if geometry.form == "full":
        check_full(geometry, psutil.virtual_memory().available)
    source = sha256_of(particles.path)
    state = state_path(output)
    if resume and (found := _finished(output, particles.path, geometry, say)) is not None:
        return found
    device = own_device(options.device, ranks)
    if ranks.first:
        for file in (state, output):
            remove_unfinished(file.parent, glob.escape(file.name))
    done = Progress(new_sums(geometry, device), 0, len(particles), (source,))
    if resume:
        saved = load_progress(state, geometry, source, device)
        # The first process goes on with these sums, the others begin at nothing.
        done = saved if ranks.first else dataclasses.replace(done, images_done=saved.images_done)
    patient = ranks.count > 1
    listen = nullcontext(stop) if stop is not None else listening(grace_s=None, patient=patient)
    with listen as asked:
        reader = Reader.of(particles, geometry, device)
        done = _pass(reader, done, state, options, progress, asked, ranks)
    fit = reader.fit.everywhere(ranks)
    if say is not None:
        for text in _left_out(particles, fit, done.sums.n_images, resume):
            say(f"WARNING: {text}")
    if geometry.max_radius > _LONG_FINISH and ranks.first:
        # Solving for the moments takes long at high radii: an interruption must lose no sums.
        save_progress(state, done)
    result = done.sums.finalise(finishing)
    if ranks.first:
        save_progress(output, done, result)
        state.unlink(missing_ok=True)
    ranks.wait()
    return result


def _finished(
    output: Path, star: Path, geometry: MomentsGeometry, say: Callable[[str], None] | None
) -> Moments | None:
    """What an earlier run has finished, if it was of the same particles and options."""
    if state_path(output).exists():
        return None
    found = finished_moments(output, star)
    if found is None or found.geometry.attributes() != geometry.attributes():
        return None
    if say is not None:
        say(f"{output} is finished: nothing was averaged")
    return found


def _left_out(particles: Particles, fit: Tensor, n_used: int, resumed: bool) -> list[str]:
    """What is said of images that are not in the sums."""
    total = len(particles)
    if resumed and n_used < total:
        # Which an earlier run left out, and why, the state does not hold.
        known = left_out_text(particles, fit, "left out, if not before the interruption")
        some = (
            f"{total - n_used} of {total} images cannot be used, or outshine the others: left out"
        )
        return [some, *known]
    texts, n_bright = left_out_text(particles, fit, "left out"), len(fit) - n_used
    if n_bright:
        texts.append(f"{bright_text(n_bright, total)}; they are left out")
    return texts


def state_path(output: Path) -> Path:
    """Where the state lies while the moments are estimated."""
    return output.with_name(f"{output.stem}.partial{output.suffix}")


def _pass(
    reader: Reader,
    done: Progress,
    state: Path,
    options: MomentsOptions,
    progress: Callable[[int, int], None] | None,
    stop: Stop,
    ranks: Ranks,
) -> Progress:
    """All images that are not in the sums yet; each process takes every k-th block of them."""
    sums: MomentSums = done.sums
    particles = reader.images.particles
    total = len(particles)
    seen = saved = done.images_done
    blocks = map(torch.from_numpy, particles.in_file_order(_BLOCK * ranks.count, seen))
    mine = slice(ranks.index * _BLOCK, (ranks.index + 1) * _BLOCK)
    for rows, following in with_next(blocks):
        if len(rows[mine]) > 0:
            batch = reader.read(rows[mine], sums.frequencies, following[mine])
            if len(batch) > 0:
                sums.add(batch)
        seen += len(rows)
        if progress is not None:
            progress(seen, total)
        stopping = ranks.any(stop.asked) and seen < total
        if stopping or (seen - saved >= options.checkpoint_images and seen < total):
            _save(state, dataclasses.replace(done, images_done=seen), ranks)
            saved = seen
        if stopping:
            raise StoppedError(f"{seen} of {total} images are in {state}")
    _together(sums, ranks)
    return dataclasses.replace(done, images_done=total)


def _save(state: Path, done: Progress, ranks: Ranks) -> None:
    """The sums of all processes, written by the first."""
    if ranks.count == 1:
        save_progress(state, done)
        return
    whole = copy.copy(done.sums)
    whole.arrays = {name: array.clone() for name, array in done.sums.arrays.items()}
    _together(whole, ranks)
    if ranks.first:
        save_progress(state, dataclasses.replace(done, sums=whole))
    ranks.wait()


def _together(sums: MomentSums, ranks: Ranks) -> None:
    """Add up the sums of all processes."""
    ranks.add_up(*sums.arrays.values())
    sums.n_images = ranks.total(sums.n_images)
