"""Cutting molecules out of boxes that are much wider than they are."""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.physics.fourier import centred_frequencies, crop_or_pad_centred
from cryorecon.physics.masks import centre_of_mass, standing_out

# What stands out of a map low-passed to as many cycles per box.
_BAND = 8.0
# Sides of a cut box per distance of what stands out from its centre: maps are masked by a sphere
# of 0.44 of the box. A margin, as a fraction of the box, and the widest cut that is worth it.
_SIDES, _MARGIN, _WORTHWHILE = 2.3, 0.03, 0.8
_LEAST_SIDE = 16


def about_molecules(first: Tensor, second: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Two maps in boxes that their molecules fill, each in the middle of its own.

    Poses and shifts are coupled about the middle of a box, and details are measured by its width:
    of a molecule that is narrow against it and far off centre, neither would be found.

    Parameters
    ----------
    first, second : Tensor, shape (N, N, N)
        White on black.

    Returns
    -------
    maps : list of two Tensor, shape (M, M, M)
        As they were given where anything stands out in most of a box: noise does.
    centres : list of two Tensor, shape (3,), float64
        Where their middles were, (x, y, z) from the centre of the box in whole pixels.
    """
    maps, box = [first, second], first.shape[-1]
    centres = [centre_of_mass(volume, _BAND).round() for volume in maps]
    reach = max(_reach(*pair) for pair in zip(maps, centres, strict=True))
    side = max(int(_SIDES * (reach + _MARGIN * box)), _LEAST_SIDE)
    # Odd boxes stay odd, so that the middle stays a sample.
    side += (side - box) % 2
    if not side < _WORTHWHILE * box:
        return maps, [torch.zeros(3, dtype=torch.float64) for _ in maps]
    return [_cut(*pair, side) for pair in zip(maps, centres, strict=True)], centres


def _reach(volume: Tensor, centre: Tensor) -> float:
    """Distance in pixels of what stands out farthest from a centre, around the box's borders."""
    box = volume.shape[-1]
    axis = centred_frequencies(box, volume.device)
    apart = [((axis - float(c) + box / 2) % box - box / 2).square() for c in centre.flip(0)]
    squares = apart[0][:, None, None] + apart[1][:, None] + apart[2]
    inside = standing_out(volume, min(_BAND, box / 2))
    return float(squares[inside].max().sqrt()) if inside.any() else float(box)


def _cut(volume: Tensor, centre: Tensor, side: int) -> Tensor:
    """A cube about a centre; what lies across the border is taken from the other side."""
    shifts = [-int(c) for c in centre.flip(0)]
    return crop_or_pad_centred(volume.roll(shifts, (0, 1, 2)), side, 3)
