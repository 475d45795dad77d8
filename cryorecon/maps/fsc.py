"""Fourier shell correlation and what is read off it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.conventions import shell_to_angst
from cryorecon.physics.fourier import fft_centred, ifft_centred, radius_grid, shell_sums

# Phases are random from the first shell on where unmasked maps agree by less, as
# relion_postprocess has it; so many shells more are left as they are, which the mask mixes.
_RANDOM_BELOW, _MIXED = 0.8, 2
_TRIALS = 3
# Of an agreement that the mask brings, what can be taken out at most: beyond it nothing is told.
_CERTAIN = 0.999


def fsc_curve(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """Fourier shell correlation of two maps.

    ``sum Re(conj(F) G) / sqrt(sum |F|^2 sum |G|^2)`` over the coefficients whose radius in
    cycles per box rounds to the shell (Harauz and van Heel 1986); 0 where a map is empty.

    Parameters
    ----------
    first, second : Tensor, shape (N, N, N), real
    mask : Tensor, shape (N, N, N), optional
        Multiplies both maps first.

    Returns
    -------
    Tensor, shape (N // 2 + 1,), float64
        Shells 0 to N // 2, whatever the type of the maps.

    Raises
    ------
    ValueError
        If the maps or the mask differ in shape or are not cubic.
    """
    box = first.shape[-1]
    for array in (first, second) if mask is None else (first, second, mask):
        if array.shape != (box, box, box):
            raise ValueError(f"shapes {tuple(array.shape)} and {(box, box, box)} differ")
    pair = torch.stack([first, second]).double()
    if mask is not None:
        pair = pair * mask.to(pair)
    f, g = fft_centred(pair, 3).flatten(1)
    shells = (radius_grid(box, 3, first.device) + 0.5).long().flatten()
    products = torch.stack([(f.conj() * g).real, f.abs() ** 2, g.abs() ** 2])
    cross, power_f, power_g = shell_sums(products, shells, int(shells.max()) + 1)
    # A shell with no more power than the rounding of the strongest one holds nothing.
    empty = (power_f <= 1e-24 * power_f.max()) | (power_g <= 1e-24 * power_g.max())
    norm = (power_f * power_g).sqrt().clamp(min=1e-300)
    curve = torch.where(empty, torch.zeros_like(cross), cross / norm)
    return curve[: box // 2 + 1]


@dataclass(frozen=True)
class MaskedFsc:
    """What a mask does to the agreement of two maps; all curves of shape (N // 2 + 1,), float64.

    Attributes
    ----------
    corrected : Tensor
        With what the mask brings taken out.
    unmasked, masked : Tensor
    randomised : Tensor
        Of the masked maps, their phases random where the unmasked ones agree little: what the mask
        brings by itself; 0 in the shells before.
    """

    corrected: Tensor
    unmasked: Tensor
    masked: Tensor
    randomised: Tensor


def masked_fsc(
    first: Tensor, second: Tensor, mask: Tensor, generator: torch.Generator
) -> MaskedFsc:
    """Fourier shell correlation of two maps inside a mask, without what the mask brings.

    Both maps wear the same mask, whose edge carries what they share in coarse shells into finer
    ones. Maps with random phases in the finer shells share nothing there: what they agree by is
    taken out, ``(F - R) / (1 - R)`` (Chen et al. 2013).

    Parameters
    ----------
    first, second : Tensor, shape (N, N, N), real
    mask : Tensor, shape (N, N, N)
        0 to 1.
    generator : torch.Generator
        On the CPU.
    """
    unmasked, masked = fsc_curve(first, second), fsc_curve(first, second, mask)
    randomised = torch.zeros_like(masked)
    below = torch.nonzero(unmasked[1:] < _RANDOM_BELOW)
    if len(below):
        begin = int(below[0]) + 1
        for _ in range(_TRIALS):
            one, other = (_random_phases(volume, begin, generator) for volume in (first, second))
            randomised += fsc_curve(one, other, mask) / _TRIALS
        randomised[: begin + _MIXED] = 0
    return MaskedFsc(without_mask_effect(masked, randomised), unmasked, masked, randomised)


def without_mask_effect(masked: Tensor, randomised: Tensor) -> Tensor:
    """A curve without what the mask brings; see :func:`taken_out`."""
    return taken_out(masked, randomised, _CERTAIN)


def taken_out(curve: Tensor, brought: Tensor, most: float) -> Tensor:
    """``(F - R) / (1 - R)``: 1 stays 1; no less than -1, where an FSC ends.

    Parameters
    ----------
    curve, brought : Tensor, shape (N // 2 + 1,)
    most : float
        Of what is taken out.
    """
    limited = brought.to(curve).clamp(0, most)
    return ((curve - limited) / (1 - limited)).clamp(min=-1)


def _random_phases(volume: Tensor, begin: int, generator: torch.Generator) -> Tensor:
    """A map with random phases from a shell on, amplitudes as they are."""
    white = torch.randn(volume.shape, generator=generator, dtype=torch.float32).to(volume.device)
    turns = fft_centred(white, 3)
    turns /= turns.abs().clamp(min=1e-30)
    found = fft_centred(volume.float(), 3)
    inside = radius_grid(len(volume), 3, volume.device) < begin - 0.5
    # A coefficient and its opposite have opposite phases, so that the map stays real.
    return ifft_centred(torch.where(inside, found, found.abs() * turns), 3).real


def crossing_shell(curve: Tensor, threshold: float) -> float:
    """Shell, interpolated, where a curve first falls below a threshold.

    Starts at shell 1, the first that holds a direction. 0 if the curve is below from there on;
    the last shell if it never falls below.
    """
    values = [float(v) for v in curve]
    if values[1] < threshold:
        return 0.0
    for shell in range(2, len(values)):
        if values[shell] < threshold:
            above, below = values[shell - 1], values[shell]
            return shell - 1 + (above - threshold) / (above - below)
    return float(len(values) - 1)


def resolution_at(curve: Tensor, threshold: float, box: int, pixel_size_angst: float) -> float:
    """Resolution in angstrom where a curve first falls below a threshold.

    Linear interpolation in frequency between shells. Infinite if shell 1 is below already; the
    last shell's resolution (Nyquist of an even box) if the curve never falls below.

    Parameters
    ----------
    curve : Tensor, shape (N // 2 + 1,)
        From :func:`fsc_curve`.
    threshold : float
        0.5 against a known map, 0.143 between half maps (Rosenthal and Henderson 2003).
    box : int
        N.
    pixel_size_angst : float
    """
    return shell_to_angst(crossing_shell(curve, threshold), box, pixel_size_angst)
