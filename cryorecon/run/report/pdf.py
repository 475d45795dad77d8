"""``logfile.pdf``: a report's content as still pages, for RELION's display."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cryorecon.io.files import replacing
from cryorecon.run.curves import THRESHOLDS, FscCurve
from cryorecon.run.report.charts import (
    BLUE,
    LIKELIHOOD_AXIS,
    ROUND_SERIES,
    THRESHOLD_NAMES,
    likelihood_histogram,
)
from cryorecon.run.report.contents import Report
from cryorecon.run.report.pictures import mosaic, particle_pictures

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

# A5, so that text stays large in a small window.
_SIZE = (8.27, 5.83)
_LINES = 34
_CHARACTERS = 92


def write_pdf(path: Path, report: Report) -> None:
    """Write the pages; fonts are embedded, pictures are pixels."""
    # On a full disk matplotlib's writer breaks down before it says why.
    drawn = BytesIO()
    with PdfPages(drawn, metadata={"Creator": "cryorecon"}) as pdf:
        for figure in _pages(report):
            pdf.savefig(figure)
    with replacing(path) as temporary:
        temporary.write_bytes(drawn.getbuffer())


def _pages(report: Report) -> Iterator[Figure]:
    inputs = report.inputs
    yield from _text_pages(report.title, _summary(report))
    if report.pictures:
        rows = [
            [picture.pixels for picture in report.pictures if picture.what == what]
            for what in ("slice", "projection", "surface")
        ]
        told = "columns: along z, y, x; rows: slice, projection, surface"
        yield _picture_page(
            f"{inputs.map_name}, {inputs.side_angst:.0f} A wide", told, mosaic(rows)
        )
    rounds = inputs.rounds if inputs.rounds is not None and len(inputs.rounds) else None
    if inputs.fsc is not None or rounds is not None:
        yield _chart_page(inputs.fsc, rounds)
    if report.sphere is not None:
        pixels, highest = report.sphere
        told = (
            f"rlnAngleRot -180 to 180, rlnAngleTilt 0 (top) to 180; 0 to {highest:.3g} of uniform"
        )
        yield _picture_page("Viewing directions", told, pixels)
    if inputs.log_likelihood is not None:
        yield _likelihood_page(inputs.log_likelihood)
    if report.examples is not None:
        told = (
            f"image, prediction, residual; low-passed to {report.examples.resolution_angst:.1f} A"
        )
        # Particles in two blocks side by side fill the page.
        pictures = particle_pictures(report.examples)
        half = -(-len(pictures) // 2)
        blank = [np.full((1, 1), 255, np.uint8)] * 3
        pairs = [pictures[i] + [*pictures[half:], blank][i] for i in range(half)]
        yield _picture_page("Particles", told, mosaic(pairs))
    yield from _text_pages("Parameters", [f"{name}: {value}" for name, value in report.parameters])


def _summary(report: Report) -> list[str]:
    lines = [f"{name}: {value}" for name, value in report.facts]
    lines += ["", "Warnings", ""]
    lines += [line for said in report.logged for line in ("From the run: " + said, "")]
    for found in report.findings:
        if found.fires:
            lines += [f"{found.name}. {found.problem} {found.remedy}", ""]
    if not report.logged and not any(found.fires for found in report.findings):
        lines += [
            "None. No known face of failure shows; that is no proof that the map is right.",
            "",
        ]
    lines += ["Measured", ""]
    for found in report.findings:
        lines.append(
            f"{found.name}: {found.score:.3g} ({found.meaning}; warns {found.side} "
            f"{found.threshold:g})"
        )
    return lines


def _figure() -> Figure:
    figure = Figure(figsize=_SIZE)
    FigureCanvasAgg(figure)
    return figure


def _text_pages(title: str, lines: list[str]) -> Iterator[Figure]:
    wrapped = [part for line in lines for part in textwrap.wrap(line, _CHARACTERS) or [""]]
    for start in range(0, len(wrapped), _LINES):
        figure = _figure()
        shown = "\n".join(wrapped[start : start + _LINES])
        figure.text(0.05, 0.95, title, fontsize=13, va="top", parse_math=False)
        figure.text(
            0.05, 0.88, shown, fontsize=8, va="top", family="monospace", linespacing=1.25,
            parse_math=False,
        )  # fmt: skip
        yield figure


def _picture_page(title: str, told: str, pixels: NDArray[np.uint8]) -> Figure:
    figure = _figure()
    figure.text(0.05, 0.95, title, fontsize=13, va="top", parse_math=False)
    figure.text(0.05, 0.89, told, fontsize=8, va="top", parse_math=False)
    axes = figure.add_axes((0.05, 0.03, 0.9, 0.82))
    axes.set_axis_off()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    return figure


def _chart_page(fsc: FscCurve | None, rounds: pd.DataFrame | None) -> Figure:
    figure = _figure()
    if fsc is not None:
        _draw_fsc(figure.add_axes((0.09, 0.13, 0.38, 0.68)), fsc)
        crossings = [fsc.resolution_text(threshold) for threshold in THRESHOLDS]
        lines = textwrap.wrap(f"FSC: {fsc.maps}; {fsc.conditions}", _CHARACTERS) + crossings
        figure.text(0.05, 0.97, "\n".join(lines), fontsize=8, va="top", parse_math=False)
    if rounds is not None:
        _draw_rounds(figure.add_axes((0.59, 0.13, 0.38, 0.68)), rounds)
    return figure


def _likelihood_page(log_likelihood: Tensor) -> Figure:
    figure = _figure()
    figure.text(0.05, 0.95, "How well images fit the map", fontsize=12, va="top")
    axes = figure.add_axes((0.09, 0.13, 0.88, 0.72))
    axes.stairs(*likelihood_histogram(log_likelihood), fill=True, color=BLUE)
    axes.axvline(0, color="#767676", linestyle="--", linewidth=0.8)
    axes.set_xlabel(LIKELIHOOD_AXIS)
    axes.set_ylabel("images")
    return figure


def _draw_fsc(axes: Axes, fsc: FscCurve) -> None:
    values = np.array([float(value) for value in fsc.values])  # noqa: PD011
    frequency = np.arange(len(values)) / (fsc.box * fsc.pixel_size_angst)
    axes.plot(frequency[1:], values[1:], color=BLUE)
    for threshold in THRESHOLDS:
        axes.axhline(threshold, color="#767676", linestyle="--", linewidth=0.8)
        axes.text(0, threshold, " " + THRESHOLD_NAMES[threshold], fontsize=7, va="bottom")
    ticks = np.linspace(0, frequency[-1], 6)[1:]
    axes.set_xticks(ticks, [f"{1 / tick:.3g}" for tick in ticks])
    axes.set_xlim(0, frequency[-1])
    axes.set_ylim(min(-0.1, float(values.min()) - 0.05), 1.05)
    axes.set_xlabel("resolution (A)")
    axes.set_ylabel("Fourier shell correlation")


def _draw_rounds(axes: Axes, rounds: pd.DataFrame) -> None:
    number = np.arange(1, len(rounds) + 1)
    for column, label, colour, _, marker in ROUND_SERIES:
        if column in rounds:
            values = rounds[column].astype(float).to_numpy(copy=True)
            values[~((values > 0) & np.isfinite(values))] = np.nan
            axes.plot(number, values, color=colour, marker=marker, markersize=4, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("round")
    axes.set_ylabel("change of poses (median)")
    axes.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1))
