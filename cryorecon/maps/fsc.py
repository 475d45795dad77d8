"""Fourier shell correlation and what is read off it."""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.conventions import shell_to_angst
from cryorecon.physics.fourier import fft_centred, radius_grid, shell_sums


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
