"""Where to draw the surface of a map."""

from __future__ import annotations

import torch
from torch import Tensor


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
    n, total = len(values), float(values.sum(dtype=torch.float64))
    low, high = values.aminmax()
    level = (float(low) + float(high)) / 2
    for _ in range(100):
        below = values <= level
        count = int(below.sum())
        if count in (0, n):
            break
        dark = float((values * below).sum(dtype=torch.float64))
        new = (dark / count + (total - dark) / (n - count)) / 2
        if new == level:
            break
        level = new
    return level
