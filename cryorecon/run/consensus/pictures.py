"""Aligned maps side by side, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

_COLUMNS = ("slice, z", "slice, y", "slice, x", "sum, z", "sum, y", "sum, x")


def _views(volume: NDArray[np.floating]) -> list[NDArray[np.floating]]:
    """Central slices and projections along z, y and x."""
    centre = len(volume) // 2
    return [np.take(volume, centre, axis) for axis in range(3)] + [
        volume.sum(axis) for axis in range(3)
    ]


def side_by_side_figure(volumes: Sequence[tuple[str, Tensor]], title: str) -> Figure:
    """A row for each map: central slices and projections.

    Parameters
    ----------
    volumes : sequence of (label, Tensor of shape (N, N, N))
        In one frame, low-passed alike.
    """
    return _rows([(label, v.cpu().numpy()) for label, v in volumes], title, signed=False)


def difference_figure(volumes: Sequence[tuple[str, Tensor]], title: str) -> Figure:
    """A row for each difference map: red where the first map has more, blue where less.

    Parameters
    ----------
    volumes : sequence of (label, Tensor of shape (N, N, N))
        In units of the reference's standard deviation; all rows share one scale.
    """
    return _rows([(label, v.cpu().numpy()) for label, v in volumes], title, signed=True)


def _rows(
    volumes: Sequence[tuple[str, NDArray[np.floating]]], title: str, *, signed: bool
) -> Figure:
    figure = Figure(figsize=(10.2, 0.6 + 1.85 * len(volumes)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(volumes), len(_COLUMNS), squeeze=False)
    # Differences are drawn on one scale, slices and sums each, so that rows compare.
    seen = [_views(volume) for _, volume in volumes]
    largest = [max(float(np.abs(p).max()) for row in seen for p in row[k : k + 3]) for k in (0, 3)]
    for row, (label, _) in enumerate(volumes):
        for column, picture in enumerate(seen[row]):
            panel = panels[row, column]
            limit = max(largest[column // 3], 1e-12)
            low, high = (-limit, limit) if signed else _range(picture)
            panel.imshow(
                picture, cmap="RdBu_r" if signed else "gray", origin="lower", vmin=low, vmax=high
            )
            panel.set_xticks([])
            panel.set_yticks([])
            if row == 0:
                panel.set_title(_COLUMNS[column], fontsize=8)
        panels[row, 0].set_ylabel(label, fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def _range(picture: NDArray[np.floating]) -> tuple[float, float]:
    low, high = np.quantile(picture, (0.005, 0.9995))
    return float(low), max(float(high), float(low) + 1e-12)
