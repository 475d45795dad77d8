"""Aligned maps side by side, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from cryorecon.maps.align import Alignment

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
        In units of the reference's standard deviation.
    """
    return _rows([(label, v.cpu().numpy()) for label, v in volumes], title, signed=True)


def _rows(
    volumes: Sequence[tuple[str, NDArray[np.floating]]], title: str, *, signed: bool
) -> Figure:
    figure = Figure(figsize=(10.2, 0.6 + 1.85 * len(volumes)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(volumes), len(_COLUMNS), squeeze=False)
    for row, (label, volume) in enumerate(volumes):
        for column, picture in enumerate(_views(volume)):
            panel = panels[row, column]
            low, high = _range(picture, signed=signed)
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


def _range(picture: NDArray[np.floating], *, signed: bool) -> tuple[float, float]:
    if signed:
        limit = max(float(np.abs(picture).max()), 1e-12)
        return -limit, limit
    low, high = np.quantile(picture, (0.005, 0.9995))
    return float(low), max(float(high), float(low) + 1e-12)


def alignment_text(alignment: Alignment) -> str:
    """Hand in words."""
    return "mirrored" if alignment.flipped else "same hand"
