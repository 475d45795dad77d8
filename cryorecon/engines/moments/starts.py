"""Fits of moments that start from a known map.

A fit from a random start can fail because the moments allow other maps or because it was not found.
A fit from the map itself tells the two apart: what it loses, the moments (with this model of the
map) do not hold; where it ends lower than every random start, the search is at fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cryorecon.engines.moments.descent import Settling, adam
from cryorecon.engines.moments.fit import Fitter, MomentFit
from cryorecon.engines.moments.models import (
    Beads,
    Density,
    ViewDensity,
    VolumeModel,
    Voxels,
    new_volume,
)
from cryorecon.physics.fourier import fft_centred, radius_grid, shell_sums
from cryorecon.physics.resampling import resample_sums

# Adam steps that lay the model on the map, and that fit the density of views to the fixed map.
_PLACE_STEPS, _DENSITY_STEPS = 300, 200
# Of Adam's rate: full steps would throw the map out of where it began.
_GENTLE = 0.2
# Voxels below this share of the largest are as good as empty.
_EMPTY = 1e-3


def start_steps(fitter: Fitter) -> int:
    """Steps that :func:`fit_from_map` reports in all."""
    config = fitter.config
    return _PLACE_STEPS + _DENSITY_STEPS + config.iterations + config.settling


def fit_from_map(
    fitter: Fitter,
    given: Tensor,
    generator: torch.Generator,
    progress: Callable[[int], None] | None = None,
    like: Tensor | None = None,
) -> tuple[VolumeModel, MomentFit]:
    """Lay the volume model on a map, fit the density of views to it, then both to the moments.

    Parameters
    ----------
    fitter : Fitter
        The moments; only its last stage is run, so that no detail is lost to coarse ones.
    given : Tensor, shape (N, N, N), real
        The map on the particle box; any amplitude. The start.
    generator : torch.Generator
        On the CPU. Draws where Gaussians begin.
    progress : callable, optional
        Called with 1 after each step.
    like : Tensor, shape (N, N, N), real, optional
        A map whose power by shell weighs the shells of `given`; itself unless told. Give the sharp
        map where `given` is a low-passed one, so that the empty shells stay empty.

    Returns
    -------
    start : VolumeModel
        The model as it was laid on the map.
    fit : MomentFit

    Raises
    ------
    FloatingPointError
        If the misfit is not finite.
    """
    views, config = fitter.views[-1], fitter.config
    reach = fitter.reach
    volume = new_volume(
        config.volume, reach, fitter.particle_radius, config.beads, config.width, generator
    ).to(fitter.device)
    given = resample_sums(given, views.size).to(fitter.device, torch.float32)
    weights = given if like is None else resample_sums(like, views.size).to(given)
    _place(volume, given, weights, reach, config.rate, generator, progress)
    start = new_volume(
        config.volume, reach, fitter.particle_radius, config.beads, config.width, generator
    ).to(fitter.device)
    start.load_state_dict(volume.state_dict())
    density = fitter.new_density(generator)
    fitter.match_power(volume)
    _fit_density(fitter, volume, density, progress)
    if isinstance(density, ViewDensity) and config.density == "free":
        density.free(views)
    gentle = replace(fitter, config=replace(config, rate=_GENTLE * config.rate))
    count = config.iterations + config.settling
    target = fitter.targets[-1]
    gentle.descend(volume, density, target, views, count, progress, Settling(config.settling))
    return start, fitter.judged(volume, density)


def _place(
    volume: VolumeModel,
    given: Tensor,
    weights: Tensor,
    reach: int,
    rate: float,
    generator: torch.Generator,
    progress: Callable[[int], None] | None,
) -> None:
    """Least squares of the Fourier coefficients up to a radius, every shell of equal power."""
    _lay(volume, given, generator)
    size = len(given)
    distance = radius_grid(size, 3, given.device)
    inside = distance <= reach + 0.5
    shells = (distance[inside] + 0.5).long()
    wanted = fft_centred(given, 3)[inside]
    count = shell_sums(torch.ones_like(wanted.real), shells, int(shells.max()) + 1)
    power = fft_centred(weights, 3)[inside].abs().square()
    mean = shell_sums(power, shells, len(count)) / count
    by = (1 / (mean.clamp(min=1e-12 * float(mean.max())) * count * len(count)))[shells]
    with torch.no_grad():
        seen = fft_centred(volume.density(size), 3)[inside]
        ratio = (by * wanted.abs().square()).sum() / (by * seen.abs().square()).sum()
        volume.log_scale.add_(0.5 * torch.log(ratio.clamp(min=1e-30)))

    def loss() -> Tensor:
        left = fft_centred(volume.density(size), 3)[inside] - wanted
        return (by * left.abs().square()).sum() + volume.penalty()

    adam(loss, volume.rates(rate), _PLACE_STEPS, progress)


def _lay(volume: VolumeModel, given: Tensor, generator: torch.Generator) -> None:
    """A first guess: Gaussians where there is mass, voxels as they are; networks keep theirs."""
    size = len(given)
    mass = given.clamp(min=0)
    mass = torch.where(mass > _EMPTY * mass.max(), mass, torch.zeros_like(mass))
    if isinstance(volume, Beads):
        count = len(volume.centres)
        drawn = torch.multinomial(mass.flatten().cpu(), count, True, generator=generator)
        z, y, x = (drawn // size**2, drawn // size % size, drawn % size)
        at = (
            torch.stack([x, y, z], -1) - size // 2 + torch.rand(count, 3, generator=generator) - 0.5
        )
        # Gaussians that fill as much as stands above half of the highest density.
        share = float((mass > 0.5 * mass.max()).float().mean()) / count
        with torch.no_grad():
            volume.centres.copy_(at / size)
            volume.log_width.fill_(math.log(max(0.6 * share ** (1 / 3), 0.5 / size)))
    elif isinstance(volume, Voxels):
        own = resample_sums(mass, len(volume.values)).clamp(min=0)
        own = (own / own.max() * 3).clamp(min=_EMPTY)
        with torch.no_grad():
            volume.values.copy_(own + torch.log(-torch.expm1(-own)))


def _fit_density(
    fitter: Fitter,
    volume: VolumeModel,
    density: Density,
    progress: Callable[[int], None] | None,
) -> None:
    """Density of views and amplitude, the map's shape fixed."""
    target, views, rate = fitter.targets[-1], fitter.views[-1], fitter.config.rate
    with torch.no_grad():
        harmonics = volume.harmonics(views)
    scale = torch.zeros((), device=harmonics.device, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [scale], "lr": rate}, *density.rates(2 * rate)])
    for _ in range(_DENSITY_STEPS):
        found = views.moments(harmonics * scale.exp(), *density.probabilities(views))
        loss = target.misfit(*found) / target.count
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"misfit {float(loss.detach())}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(1)
    with torch.no_grad():
        volume.log_scale.add_(scale)
