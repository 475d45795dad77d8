"""From particles on disk to what the engines work on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cryorecon.engines.observations import Observations
from cryorecon.errors import CryoreconError
from cryorecon.io.particles import Particles
from cryorecon.physics.ctf import ctf
from cryorecon.physics.fourier import half_plane, to_coefficients
from cryorecon.physics.imaging import noise_power_outside
from cryorecon.physics.masks import soft_ball

_BLOCK = 512


def _normalised(images: Tensor, outside: Tensor) -> Tensor:
    """Images with zero mean and unit standard deviation outside the particle."""
    area = outside.sum()
    level = (images * outside).sum((-2, -1), keepdim=True) / area
    images = images - level
    spread = ((images**2 * outside).sum((-2, -1), keepdim=True) / area).sqrt()
    return images / spread.clamp(min=1e-20)


def load_observations(
    particles: Particles,
    diameter: float,
    progress: Callable[[int, int], None] | None = None,
) -> Observations:
    """Read all images in file order, normalise them, and keep their half-plane coefficients.

    Each image gets zero mean and unit variance outside the particle; the noise spectrum of each
    optics group is the mean power out there.

    Parameters
    ----------
    particles : Particles
    diameter : float
        Of the particle, as a fraction of the box side.
    progress : callable, optional
        Called with (images done, images in all).

    Raises
    ------
    CryoreconError
        If an image is blank outside the particle, so that no noise can be measured.
    """
    plane = half_plane(particles.box)
    n = len(particles)
    radius_px = diameter / 2 * particles.box
    outside = 1 - soft_ball(particles.box, radius_px, 2.0, 2)
    group = torch.from_numpy(particles.optics_index())
    n_groups = int(group.max()) + 1
    power = torch.zeros(n_groups, plane.n_shells)
    coefficients = torch.empty(n, len(plane), dtype=torch.complex64)
    order = particles.file_order()
    for start in range(0, n, _BLOCK):
        rows = order[start : start + _BLOCK]
        raw = torch.from_numpy(particles.images(rows))
        _refuse_blank(particles, rows, raw)
        images = _normalised(raw, outside)
        coefficients[rows] = to_coefficients(images, plane)
        for number in range(n_groups):
            of_group = images[group[rows] == number]
            if len(of_group):
                power[number] += noise_power_outside(of_group, radius_px, plane) * len(of_group)
        if progress is not None:
            progress(start + len(rows), n)
    counts = torch.bincount(group, minlength=n_groups).clamp(min=1)
    parameters = particles.ctf_parameters()
    gain = ctf(plane.frequencies, parameters, particles.box, particles.pixel_size_angst).float()
    return Observations(plane, coefficients, gain, power / counts[:, None], group)


def _refuse_blank(particles: Particles, rows: np.ndarray, images: Tensor) -> None:
    spread = images.flatten(1).std(-1)
    blank = torch.nonzero(spread == 0)
    if len(blank):
        row = rows[int(blank[0])]
        raise CryoreconError(
            f"{particles.path}, row {particles.rows[row] + 1}: the image is blank",
            "Remove such rows from the STAR file",
        )


def half_sets(particles: Particles, generator: torch.Generator) -> Tensor:
    """Half set of each particle, 0 or 1: the STAR file's, or drawn at random."""
    given = particles.random_subsets()
    if given is not None and len(np.unique(given)) == 2:
        return torch.from_numpy(given) - 1
    return torch.randperm(len(particles), generator=generator) % 2
