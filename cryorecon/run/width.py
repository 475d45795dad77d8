"""The diameter that a job takes: what may be given, where it comes from, how it is printed."""

from __future__ import annotations

import math
from typing import Literal

from cryorecon.engines.reconstruction import RefineConfig
from cryorecon.errors import CryoreconError
from cryorecon.io.particles import Particles

Source = Literal["given", "told", "assumed"]
# Largest share of the box that a particle may take.
WIDEST = 0.95
# A particle's least width: less shows nothing.
LEAST_PIXELS = 4
# Given diameters that are so much smaller than what images tell cut particles.
_CUTS = 0.85
# Products are rounded: by less than this.
ROUNDED = 1 + 1e-9


def side_angst(particles: Particles) -> float:
    """Width of the images."""
    return particles.box * particles.pixel_size_angst


def whole_angst(diameter_angst: float) -> str:
    """A diameter as it is printed: rounded down, so that it can be given back."""
    return f"{math.floor(diameter_angst * ROUNDED):.0f}"


def limits_text(side: float, pixel_size_angst: float) -> str:
    """Diameters that may be given, in angstrom, rounded so that both ends may."""
    least = math.ceil(10 * LEAST_PIXELS * pixel_size_angst / ROUNDED) / 10
    return f"from {least:g} ({LEAST_PIXELS} pixels) to {widest_text(side)}"


def widest_text(side: float) -> str:
    """The largest diameter that may be given, in angstrom, rounded down."""
    return f"{math.floor(10 * WIDEST * side * ROUNDED) / 10:g} ({WIDEST:g} of the box)"


def diameter_share(diameter_angst: float, particles: Particles) -> float:
    """A particle's diameter as a share of the box side.

    Raises
    ------
    CryoreconError
        If it is no wider than some pixels, or does not fit the images.
    """
    side = side_angst(particles)
    remedy = f"Give --diameter in angstrom, {limits_text(side, particles.pixel_size_angst)}"
    if not diameter_angst >= LEAST_PIXELS * particles.pixel_size_angst / ROUNDED:
        raise CryoreconError(
            f"A particle of {diameter_angst:g} A is no wider than {LEAST_PIXELS} pixels of "
            f"{particles.path}",
            remedy,
        )
    if diameter_angst > WIDEST * side * ROUNDED:
        raise CryoreconError(
            f"A particle of {diameter_angst:g} A does not fit the images of {particles.path}, "
            f"{side:.4g} A wide",
            remedy,
        )
    return diameter_angst / side


def width_text(particles: Particles, diameter: float, source: Source) -> str:
    """The diameter, a share of the box, and where it comes from."""
    whence = {
        "given": "",
        "told": ", as the images tell",
        "assumed": f", assumed: {RefineConfig.diameter:g} of the box",
    }
    return f"particle diameter {whole_angst(diameter * side_angst(particles))} A{whence[source]}"


def width_doubts(
    particles: Particles, diameter: float, source: Source, seen: float | None
) -> list[str]:
    """What is odd about the diameter; a line or none.

    Parameters
    ----------
    diameter, seen : float
        That the job takes, and that the images tell, if they do; shares of the box.
    """
    side = side_angst(particles)
    if source == "assumed":
        return [
            f"the images do not tell the particle's diameter: {RefineConfig.diameter:g} of the "
            f"box, {whole_angst(diameter * side)} A, is assumed; give --diameter, or extract wider "
            "where particles fill the box"
        ]
    if source == "given" and seen is not None and diameter <= _CUTS * seen:
        return [
            f"the images look as if particles were {whole_angst(seen * side)} A wide: a smaller "
            "--diameter cuts them"
        ]
    return []
