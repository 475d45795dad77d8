"""Static plots: each function returns a matplotlib figure, drawn without pyplot's global state."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import healpix
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray
from torch import Tensor

from cryorecon.errors import CryoreconError
from cryorecon.io.files import replacing
from cryorecon.maps.poses import FRACTION_LIMITS_DEG, PoseComparison
from cryorecon.run.curves import THRESHOLDS, FscCurve

_COLOURS = ("#0b6fa4", "#d1495b", "#3a7d44", "#8d5fd3", "#c7852b", "#555555")
_GREY = "#767676"
# Characters a line of a legend, which would else take the room of the curve.
_LEGEND = 42


# What matplotlib writes with programs or libraries that may not be there.
_NOT_EVERYWHERE = ("pgf", "avif")


def picture_kind(path: str | Path) -> str:
    """Format that a picture's name asks for by its ending; png where it has none.

    Raises
    ------
    CryoreconError
        If there is no such format.
    """
    kind = Path(path).suffix.lstrip(".").lower() or "png"
    if kind not in FigureCanvasAgg.get_supported_filetypes() or kind in _NOT_EVERYWHERE:
        raise CryoreconError(
            f"{path} cannot be drawn: .{kind} is no format of pictures",
            "Let the name end in .png, .svg or .pdf",
        )
    return kind


def save_figure(figure: Figure, path: str | Path, dpi: int = 120) -> None:
    """Write a figure in the format that the name's ending asks for: png, svg or pdf."""
    path, kind = Path(path), picture_kind(path)
    # On a full disk matplotlib's PDF writer breaks down before it says why.
    drawn = BytesIO()
    figure.savefig(drawn, format=kind, dpi=dpi)
    with replacing(path) as temporary:
        temporary.write_bytes(drawn.getbuffer())


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors="#333333")


def fsc_figure(curves: Mapping[str, FscCurve], thresholds: Sequence[float] = THRESHOLDS) -> Figure:
    """Fourier shell correlations over spatial frequency, with named thresholds.

    Parameters
    ----------
    curves : mapping of label to FscCurve
        Each label's legend line adds mask, alignment and crossings.
    thresholds : sequence of float
        Drawn as dashed lines.
    """
    figure = _figure(8.4, 4.4)
    axes = figure.add_subplot()
    for number, (label, curve) in enumerate(curves.items()):
        frequency = np.arange(len(curve.values)) / (curve.box * curve.pixel_size_angst)
        crossings = "\n".join(curve.resolution_text(threshold) for threshold in thresholds)
        told = textwrap.fill(label, _LEGEND), textwrap.fill(f"({curve.conditions})", _LEGEND)
        axes.plot(
            frequency[1:],
            curve.values[1:].cpu().numpy(),
            color=_COLOURS[number % len(_COLOURS)],
            linewidth=1.8,
            label="\n".join([*told, crossings]),
        )
    last = max(float(len(c.values) - 1) / (c.box * c.pixel_size_angst) for c in curves.values())
    for threshold in thresholds:
        axes.axhline(threshold, color=_GREY, linestyle="--", linewidth=0.9)
        axes.annotate(
            f"{threshold:g}", (last, threshold), (3, 0), textcoords="offset points",
            va="center", color=_GREY, fontsize=9, annotation_clip=False,
        )  # fmt: skip
    axes.axhline(0, color=_GREY, linewidth=0.6)
    lowest = min(float(c.values[1:].min()) for c in curves.values())
    axes.set_xlim(0, last)
    axes.set_ylim(min(-0.1, lowest - 0.05), 1.05)
    _resolution_ticks(axes, last)
    axes.set_ylabel("Fourier shell correlation")
    axes.legend(loc="upper left", bbox_to_anchor=(1.08, 1.0), frameon=False, fontsize=8)
    _plain(axes)
    return figure


def _resolution_ticks(axes: Axes, last: float) -> None:
    """Ticks at equal frequency steps, labelled with the resolution in angstrom."""
    ticks = np.linspace(0, last, 7)[1:]
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"1/{1 / value:.3g}"))
    axes.set_xlabel("spatial frequency (1/A)")


def pose_error_figure(comparison: PoseComparison, title: str = "") -> Figure:
    """Histogram of geodesic errors on a logarithmic angle axis, with the cumulative share."""
    angles = comparison.angles_deg.cpu().numpy().clip(0.01, 180.0)
    figure = _figure(7.0, 4.2)
    axes = figure.add_subplot()
    lowest = min(1.0, 10 ** np.floor(np.log10(np.quantile(angles, 0.01))))
    edges = np.geomspace(lowest, 180, 61)
    axes.hist(angles.clip(lowest), bins=list(edges), color=_COLOURS[0], alpha=0.8)
    axes.set_xscale("log")
    axes.set_xlim(lowest, 180)
    ticks = [t for t in (0.01, 0.1, 0.3, *FRACTION_LIMITS_DEG, 90.0, 180.0) if t >= lowest]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axvline(comparison.median_deg, color=_COLOURS[1], linestyle="--", linewidth=1.2)
    axes.set_xlabel("pose error after global alignment (degrees)")
    axes.set_ylabel("images")
    share = axes.twinx()
    order = np.sort(angles)
    share.plot(order, np.arange(1, len(order) + 1) / len(order), color="#333333", linewidth=1.2)
    share.set_ylim(0, 1.02)
    share.set_ylabel("share of images with at most this error")
    share.spines["top"].set_visible(False)
    hand = "other hand" if comparison.flipped else "same hand"
    lines = [title] if title else []
    lines.append(
        f"{len(angles):,} images, {hand}: median {comparison.median_deg:.2f}, "
        f"mean {comparison.mean_deg:.2f} degrees"
    )
    axes.set_title("\n".join(lines), fontsize=10)
    axes.spines["top"].set_visible(False)
    return figure


def map_figure(volume: NDArray[np.floating], pixel_size_angst: float, title: str = "") -> Figure:
    """Central slices and projections of a map along z, y and x.

    Parameters
    ----------
    volume : array, shape (N, N, N)
        Indexed [z, y, x].
    pixel_size_angst : float
        For the scale bar.
    """
    box = volume.shape[-1]
    figure = _figure(7.5, 5.4)
    axes = figure.subplots(2, 3)
    for column, (axis, name) in enumerate(zip((0, 1, 2), "zyx", strict=True)):
        pictures = (np.take(volume, box // 2, axis), volume.sum(axis))
        across, up = [("x", "y"), ("x", "z"), ("y", "z")][column]
        for row, (picture, what) in enumerate(zip(pictures, ("slice", "projection"), strict=True)):
            panel = axes[row, column]
            low, high = np.quantile(picture, (0.005, 0.9995))
            panel.imshow(
                picture, cmap="gray", origin="lower", vmin=low, vmax=max(high, low + 1e-12)
            )
            panel.set_title(f"{what} along {name}: {across} right, {up} up", fontsize=8)
            panel.set_xticks([])
            panel.set_yticks([])
    _scale_bar(axes[0, 0], box, pixel_size_angst)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _scale_bar(axes: Axes, box: int, pixel_size_angst: float) -> None:
    width = box * pixel_size_angst / 3
    decade = 10.0 ** np.floor(np.log10(width))
    length = max(step * decade for step in (1, 2, 5) if step * decade <= width)
    x, y = 0.06 * box, 0.06 * box
    axes.plot([x, x + length / pixel_size_angst], [y, y], color="#ffd166", linewidth=2.5)
    axes.text(x, y + 0.025 * box, f"{length:g} A", color="#ffd166", fontsize=8, va="bottom")


def viewing_direction_figure(rotations: Tensor, title: str = "") -> Figure:
    """Density of viewing directions over the sphere, relative to uniform.

    Equal-area (Mollweide) picture with longitude rlnAngleRot and latitude 90 - rlnAngleTilt, in
    HEALPix cells of equal area; 1 is the density of uniformly spread views.

    Parameters
    ----------
    rotations : Tensor, shape (n, 3, 3)
        A, reference to image coordinates; the viewing direction is its third row.
    """
    count = f"{len(rotations):,} images"
    return view_density_figure(view_density(rotations), f"{title}\n{count}" if title else count)


def view_density(rotations: Tensor) -> NDArray[np.float64]:
    """Density of viewing directions relative to uniform, in HEALPix cells (ring order).

    Parameters
    ----------
    rotations : Tensor, shape (n, 3, 3)
        A, reference to image coordinates.
    """
    x, y, z = rotations[:, 2, :].double().cpu().numpy().T
    # About ten images a cell, so that the picture shows views rather than counting noise.
    nside = int(np.clip(np.sqrt(len(z) / 120), 1, 16))
    cells = healpix.ang2pix(nside, np.arccos(z.clip(-1, 1)), np.arctan2(y, x))
    counts = np.bincount(cells, minlength=12 * nside**2).astype(np.float64)
    return counts * (12 * nside**2 / len(z))


def view_density_figure(density: NDArray[np.floating], title: str = "") -> Figure:
    """A density of viewing directions relative to uniform, in HEALPix cells (ring order).

    Parameters
    ----------
    density : array, shape (12 nside^2,)
        1 is uniform.
    """
    nside = round((len(density) / 12) ** 0.5)
    longitude, latitude = np.linspace(-np.pi, np.pi, 361), np.linspace(-np.pi / 2, np.pi / 2, 181)
    tilt, rot = np.meshgrid(
        np.pi / 2 - (latitude[1:] + latitude[:-1]) / 2,
        (longitude[1:] + longitude[:-1]) / 2,
        indexing="ij",
    )
    picture = density[healpix.ang2pix(nside, tilt, rot)]
    figure = _figure(7.0, 4.2)
    axes = figure.add_subplot(projection="mollweide")
    highest = max(2.0, float(density.max()))
    mesh = axes.pcolormesh(longitude, latitude, picture, vmin=0, vmax=highest, rasterized=True)
    degrees = (-120, -60, 0, 60, 120)
    axes.set_xticks(np.deg2rad(degrees), [str(value) for value in degrees], color="white")
    axes.set_yticks(np.deg2rad([-60, -30, 0, 30, 60]), [str(t) for t in (150, 120, 90, 60, 30)])
    axes.tick_params(labelsize=8)
    axes.set_xlabel("longitude: rlnAngleRot; latitude: rlnAngleTilt (degrees)", fontsize=9)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.7)
    bar.set_label("density of views over uniform")
    axes.set_title(title, fontsize=10)
    return figure
