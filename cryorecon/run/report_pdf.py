"""``logfile.pdf``: a report's content as still pages, for RELION's display."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from cryorecon.io.files import replacing
from cryorecon.run.plots import fsc_figure, map_figure, view_density_figure
from cryorecon.run.report_particles import Examples
from cryorecon.run.surface import shaded_views

if TYPE_CHECKING:
    import pandas as pd

    from cryorecon.run.report import Report

_SIZE = (8.27, 5.85)
_LINES = 34
_CHARACTERS = 96
_DPI = 110


def write_pdf(path: Path, report: Report) -> None:
    """Write the pages; fonts are embedded, pictures are pixels."""
    with (
        replacing(path) as temporary,
        PdfPages(temporary, metadata={"Creator": "cryorecon"}) as pdf,
    ):
        for figure in _pages(report):
            pdf.savefig(figure, dpi=_DPI)


def _pages(report: Report) -> Iterator[Figure]:
    inputs = report.inputs
    yield from _text_pages(report.title, _summary(report))
    if inputs.map is not None:
        pixel = inputs.map.pixel_size_angst
        yield map_figure(inputs.map.data, pixel, inputs.map_name)
        yield _surface_figure(inputs.map.data)
    if inputs.fsc is not None:
        yield fsc_figure({inputs.fsc.maps: inputs.fsc})
    if report.density is not None:
        yield view_density_figure(report.density, "viewing directions")
    if inputs.rounds is not None and len(inputs.rounds):
        yield _rounds_figure(inputs.rounds)
    if report.examples is not None:
        yield _particles_figure(report.examples)
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


def _figure(height: float = _SIZE[1]) -> Figure:
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _text_pages(title: str, lines: list[str]) -> Iterator[Figure]:
    wrapped = [part for line in lines for part in textwrap.wrap(line, _CHARACTERS) or [""]]
    for start in range(0, len(wrapped), _LINES):
        figure = _figure()
        # Dollar signs are no formulas here.
        shown = "\n".join(wrapped[start : start + _LINES]).replace("$", r"\$")
        figure.text(0.05, 0.95, title.replace("$", r"\$"), fontsize=13, va="top")
        figure.text(0.05, 0.88, shown, fontsize=8, va="top", family="monospace", linespacing=1.25)
        yield figure


def _surface_figure(volume: np.ndarray) -> Figure:
    figure = _figure(3.2)
    for panel, view, name in zip(figure.subplots(1, 3), shaded_views(volume), "zyx", strict=True):
        panel.imshow(view, cmap="gray", origin="lower", vmin=0, vmax=1)
        panel.set_title(f"surface along {name}", fontsize=9)
        panel.set_axis_off()
    return figure


def _rounds_figure(rounds: pd.DataFrame) -> Figure:
    figure = _figure(4.2)
    axes = figure.add_subplot()
    series = (
        ("cryoreconPoseChange", "rotation (degrees)", "#0b6fa4", "o"),
        ("cryoreconOffsetChangeAngst", "offset (A)", "#c7852b", "s"),
        ("cryoreconHalfMapResolution", "half maps agree to (A)", "#3a7d44", "D"),
    )
    number = np.arange(1, len(rounds) + 1)
    for column, label, colour, marker in series:
        if column in rounds:
            values = rounds[column].astype(float).to_numpy(copy=True)
            values[~((values > 0) & np.isfinite(values))] = np.nan
            axes.plot(number, values, color=colour, marker=marker, markersize=4, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("round")
    axes.set_ylabel("change (median)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _particles_figure(examples: Examples) -> Figure:
    count = len(examples.names)
    figure = _figure(2.1 * count + 0.6)
    figure.suptitle(f"particles, low-passed to {examples.resolution_angst:.1f} A", fontsize=10)
    panels = figure.subplots(count, 3, squeeze=False)
    for row, name in enumerate(examples.names):
        pictures = (examples.images, examples.predictions, examples.residuals)
        limit = float(np.quantile(examples.images[row].abs().numpy(), 0.998))
        for panel, stack, what in zip(
            panels[row], pictures, ("image", "prediction", "residual"), strict=True
        ):
            panel.imshow(stack[row].numpy(), cmap="gray", origin="lower", vmin=-limit, vmax=limit)
            panel.set_axis_off()
            panel.set_title(what if what != "image" else name[-40:].replace("$", r"\$"), fontsize=7)
    return figure
