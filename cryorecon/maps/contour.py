"""Where to draw the surface of a map."""

from __future__ import annotations

import torch
from torch import Tensor

# Voxels that the iteration begins with; how near the level others are looked at again, as a share
# of the range.
_SAMPLED, _NEAR = 200_000, 0.01


def contour_level(volume: Tensor) -> float:
    """Level half way between the mean density above it and the mean density below it.

    Ridler and Calvard's threshold (1978): it splits a map into molecule and solvent by itself.
    Found by iteration from the middle of the range; white on black.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)

    Returns
    -------
    float
        In the map's own unit; the value of the voxels where all are equal.
    """
    values = volume.flatten()
    low, high = (float(v) for v in values.aminmax())
    n, total = len(values), float(values.sum(dtype=torch.float64))
    some = values[:: max(1, n // _SAMPLED)]
    level = _settled(some, (low + high) / 2, (len(some), float(some.sum(dtype=torch.float64))))
    # A part of the voxels leads most of the way; the rest of it, those near the level do.
    near = (high - low) * _NEAR
    below = values <= level - near
    window = values[(values <= level + near) & ~below]
    dark = float((values * below).sum(dtype=torch.float64))
    found = _settled(window, level, (n, total), (int(below.sum()), dark))
    return found if abs(found - level) <= near else _settled(values, level, (n, total))


def _settled(
    values: Tensor, level: float, of_all: tuple[int, float], below: tuple[int, float] = (0, 0.0)
) -> float:
    """Where the iteration ends that begins at a level.

    Parameters
    ----------
    values : Tensor, shape (n,)
        Voxels on either side of it.
    of_all, below : tuple of int and float
        Number and sum of all voxels, and of those that are surely below the level.
    """
    for _ in range(100):
        under = values <= level
        count = below[0] + int(under.sum())
        if count in (0, of_all[0]):
            break
        dark = below[1] + float((values * under).sum(dtype=torch.float64))
        new = (dark / count + (of_all[1] - dark) / (of_all[0] - count)) / 2
        if new == level:
            break
        level = new
    return level
