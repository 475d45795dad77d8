"""``--dry-run``: what a job would work on and take; reads some images and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console

from cryorecon.engines.contrast import SURE, FirstLook
from cryorecon.engines.moments.sums_full import check_full
from cryorecon.io.mrc import StackReader
from cryorecon.io.particles import Particles, read_particles
from cryorecon.run.abinitio_input import AbinitioOptions, prepared
from cryorecon.run.contrast import differing_text
from cryorecon.run.cost import (
    Cost,
    abinitio_cost,
    backprojection_cost,
    moment_fit_cost,
    moments_cost,
)
from cryorecon.run.device import device_text
from cryorecon.run.image_checks import left_out_text
from cryorecon.run.load import (
    Keep,
    load_observations,
    memory_needed,
    memory_to_use,
    place_to_hold,
)
from cryorecon.run.moments.estimate import MomentsOptions, resolve_geometry
from cryorecon.run.moments.reconstruct import MomentReconstructOptions
from cryorecon.run.repeats import repeats
from cryorecon.run.results import size_text
from cryorecon.run.table_doubts import table_doubts
from cryorecon.run.width import Source, width_text

# Images that the contrast is guessed from: enough to be sure of most stacks.
_LOOKED_AT = 500
_GB = 1e9


def describe_abinitio(star: Path, options: AbinitioOptions, console: Console) -> dict[str, Any]:
    """Tell what ``abinitio`` with these options would do.

    Returns
    -------
    dict
        The same as plain data: ``particles``, ``map_particles`` (those that make the map),
        ``box``, ``stored_box``, ``pixel_size_angst``, ``diameter_angst``, ``optics_groups``,
        ``contrast`` (white, black, or null where it is not told), ``images_held``,
        ``memory_bytes``, ``cpu_s`` of one core, ``cpu_s_hard`` if images hardly tell their poses,
        ``warnings``.

    Raises
    ------
    CryoreconError
        Whatever the job itself would refuse before its start.
    """
    ready = prepared(star, options)
    particles, rows, config = ready[:3]
    say = _teller(console)
    left_out = ", of run_data.star, too"
    found = _tell_particles(particles, config.diameter, say, left_out=left_out)
    say(ready.width_text)
    doubts = ready.doubts + repeats(particles, config.diameter).texts()
    for doubt in doubts:
        say(f"WARNING: {doubt}")
    others = len(particles) - len(rows)
    if others:
        say(f"{len(rows)} of the particles make the map, {others} join it")
    independent = options.halves == "independent"
    box, stored, n = particles.box, particles.stored_box, len(rows)
    cost = partial(
        abinitio_cost,
        config,
        n,
        box,
        independent=independent,
        others=others,
        stored_box=stored,
        refine_others=options.assign == "refine",
    )
    easy, hard = cost(hard=False), cost(hard=True)
    held, place = _tell_images(len(particles), box, options.keep, torch.device(options.device), say)
    found["warnings"] += doubts
    found |= {"map_particles": n, "images_held": place}
    return found | _tell_cost(easy, held, say, options.device, hard)


def describe_moments(
    star: Path, wanted: MomentsOptions, fit: MomentReconstructOptions | None, console: Console
) -> dict[str, Any]:
    """Tell what ``moments estimate``, with or without a fit, would do; the same as plain data."""
    particles = read_particles(star, wanted.project)
    geometry = resolve_geometry(wanted, particles.box, particles.pixel_size_angst)
    if geometry.form == "full":
        check_full(geometry, psutil.virtual_memory().available)
    say = _teller(console)
    share = geometry.diameter_angst / (particles.box * particles.pixel_size_angst)
    found = _tell_particles(particles, share, say, ctf=wanted.ctf, left_out=" of the sums")
    assumed: Source = "assumed" if wanted.diameter_angst is None else "given"
    say(width_text(particles, share, assumed))
    doubts = table_doubts(particles, ctf=wanted.ctf)
    for doubt in doubts:
        say(f"WARNING: {doubt}")
    found["warnings"] += doubts
    radius, side = geometry.max_radius, geometry.side_angst
    say(f"radii to {radius} cycles per {side:.0f} A ({side / radius:.1f} A)")
    cost = moments_cost(geometry, len(particles))
    say("images are read once, in blocks")
    cost = cost if fit is None else cost.plus(moment_fit_cost(fit.engine))
    return found | _tell_cost(cost, 0, say, wanted.device)


def describe_reconstruct(
    particles: Particles, console: Console, device: str, doubts: list[str]
) -> dict[str, Any]:
    """Tell what ``reconstruct`` of particles with their poses would do; the same as plain data.

    What is odd about the table, `doubts`, has been told.
    """
    particles.euler_deg()
    say = _teller(console)
    found = _tell_particles(particles, 0.8, say)
    found["warnings"] += doubts
    del found["diameter_angst"]  # Assumed, for the contrast alone.
    say("images are read once, in blocks")
    cost = backprojection_cost(len(particles), particles.box)
    return found | _tell_cost(cost, 0, say, device)


def _teller(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, markup=False, highlight=False)


def _tell_particles(
    particles: Particles,
    diameter: float,
    say: Callable[[str], None],
    *,
    ctf: bool = True,
    left_out: str = "",
) -> dict[str, Any]:
    """Open the first and the last stack, and look at some images."""
    order = particles.file_order()
    particles.read(order[[0, -1]], StackReader())
    say(f"{len(particles)} particles, {size_text(particles)}")
    groups = np.unique(particles.optics_index())
    say(f"{len(groups)} optics group{'s' * (len(groups) > 1)}")
    found: dict[str, Any] = {
        "particles": len(particles),
        "box": particles.box,
        "stored_box": particles.stored_box,
        "pixel_size_angst": particles.pixel_size_angst,
        "diameter_angst": diameter * particles.box * particles.pixel_size_angst,
        "optics_groups": len(groups),
        "contrast": None,
        "warnings": [],
    }
    if not ctf:
        return found
    voltages = particles.ctf_parameters().voltage_kv.unique().tolist()
    say(f"voltage {', '.join(f'{v:g}' for v in voltages)} kV")
    some = order[:: max(1, -(-len(order) // _LOOKED_AT))]
    looked_at = particles.subset(np.sort(some))
    images = load_observations(looked_at, diameter, keep="memory")
    if left_out:
        where = f"left out{left_out}; {len(looked_at)} of {len(particles)} were looked at"
        found["warnings"] = left_out_text(looked_at, images.rows, where)
    for text in found["warnings"]:
        say(f"WARNING: {text}")
    look = FirstLook.at(images, diameter)
    score, sure = look.score(), look.sure_groups(images.group)
    if all(sure):
        found["contrast"] = "differs"
        say(f"contrast: {differing_text(*sure)}: each will be taken as it looks")
        return found
    seen = "white on black" if score > 0 else "BLACK ON WHITE"
    if abs(score) >= SURE:
        found["contrast"] = "white" if score > 0 else "black"
    else:
        seen = "not told by so few images"
    say(f"contrast: {seen} ({score:.1f} standard errors, {len(images)} images)")
    return found


def _tell_images(
    n: int, box: int, keep: Keep, device: torch.device, say: Callable[[str], None]
) -> tuple[int, str]:
    """Bytes of the CPU's memory that images take as they would be held, and where that is."""
    needed, limit = memory_needed(n, box), memory_to_use()
    place = place_to_hold(n, box, keep, device)
    why = f"half of the free memory is {limit / _GB:.1f} GB" if keep == "auto" else "as asked"
    if place is not None and place.type != "cpu":
        say(f"images held in the memory of {device}, {needed / _GB:.2f} GB")
        return 0, str(device)
    if place is not None:
        say(f"images held in memory, {needed / _GB:.2f} GB ({why})")
        return needed, "memory"
    say(f"images read again when needed; held they would take {needed / _GB:.1f} GB ({why})")
    return 0, "disk"


def _tell_cost(
    cost: Cost,
    images: int,
    say: Callable[[str], None],
    device: str,
    hard: Cost | None = None,
) -> dict[str, Any]:
    peak, free = cost.bytes + images, psutil.virtual_memory().available
    short = "" if peak < free else f"; ONLY {free / _GB:.1f} GB ARE FREE"
    say(f"memory about {peak / _GB:.1f} GB{short}")
    cores = torch.get_num_threads()
    if device != "cpu":
        say(f"computes on {device_text(device)}; the time is that of a CPU, a GPU's is not known")
    longer = "" if hard is None else f" (if images hardly tell their poses {_duration(hard.cpu_s)})"
    say(
        f"time about {_duration(cost.cpu_s)}{longer} of one core ({cores} in use), within a factor "
        "of two; nothing was written"
    )
    told = {"memory_bytes": round(peak), "cpu_s": round(cost.cpu_s)}
    return told if hard is None else told | {"cpu_s_hard": round(hard.cpu_s)}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
