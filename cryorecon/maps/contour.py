"""Where to draw the surface of a map."""

from __future__ import annotations

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
    values = volume.double().flatten().sort().values
    sums = values.cumsum(0)
    level = float(values[0] + values[-1]) / 2
    for _ in range(100):
        below = int((values <= level).sum())
        if below in (0, len(values)):
            break
        low = float(sums[below - 1]) / below
        high = float(sums[-1] - sums[below - 1]) / (len(values) - below)
        new = (low + high) / 2
        if new == level:
            break
        level = new
    return level
