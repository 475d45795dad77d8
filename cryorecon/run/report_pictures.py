"""Small pictures of a report, as PNG inside the page, and the numbers of its charts."""

from __future__ import annotations

import base64
import math
from io import BytesIO
from typing import Any

import healpix
import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from cryorecon.run.curves import THRESHOLDS, FscCurve
from cryorecon.run.report_particles import Examples
from cryorecon.run.surface import Mesh, shaded_views

Json = dict[str, Any]
# What the field uses each threshold for.
_THRESHOLD_NAMES = {0.5: "0.5 (against a known map)", 0.143: "0.143 (between half maps)"}
# Wong's palette (2011), told apart by the colour-blind on light and dark ground.
_BLUE, _ORANGE, _GREEN = "#3d8fd1", "#d9782d", "#1f9e77"
_SLICE_PX = 192


def png(picture: NDArray[np.uint8]) -> str:
    """A data URI of grey (h, w) or colour (h, w, 3 or 4) pixels, first row on top."""
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def grey(picture: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """Values between two limits as grey levels, first row at the bottom; at most 192 px a side."""
    scaled = (picture - low) / max(high - low, 1e-30)
    levels = (scaled.clip(0, 1) * 255).round().astype(np.uint8)[::-1]
    image = Image.fromarray(levels)
    if max(image.size) > _SLICE_PX:
        image.thumbnail((_SLICE_PX, _SLICE_PX), Image.Resampling.BOX)
    return np.asarray(image)


def slice_pictures(volume: NDArray[np.floating]) -> list[Json]:
    """Central slices, projections and shaded surfaces along z, y and x."""
    box, pictures = len(volume), []
    shaded = shaded_views(volume)
    for axis, (name, across, up) in enumerate((("z", "x", "y"), ("y", "x", "z"), ("x", "y", "z"))):
        flat = {
            "slice": np.take(volume, box // 2, axis),
            "projection": volume.sum(axis),
        }
        for what, picture in flat.items():
            low, high = np.quantile(picture, (0.005, 0.9995))
            pictures.append(_picture(what, name, across, up, png(grey(picture, low, high))))
        solid = np.nan_to_num(shaded[axis]) * 255
        layers = [solid, np.isfinite(shaded[axis]) * 255]
        both = np.stack([a.round().astype(np.uint8)[::-1] for a in layers], -1)
        pictures.append(_picture("surface", name, across, up, png(both)))
    return pictures


def _picture(what: str, axis: str, across: str, up: str, uri: str) -> Json:
    return {"what": what, "axis": axis, "across": across, "up": up, "uri": uri}


def particle_pictures(examples: Examples) -> list[Json]:
    """A row of three pictures for each particle, all of a row with the same grey levels."""
    rows = []
    for number, name in enumerate(examples.names):
        image = examples.images[number].numpy()
        limit = float(np.quantile(np.abs(image), 0.998))
        three = (examples.images, examples.predictions, examples.residuals)
        uris = [png(grey(t[number].numpy(), -limit, limit)) for t in three]
        rows.append({"name": name, "uris": uris, "correlation": examples.correlations[number]})
    return rows


def sphere_picture(density: NDArray[np.floating], width: int = 720) -> tuple[str, float]:
    """A density over the sphere in Mollweide's equal-area projection, and its highest colour.

    Longitude is rlnAngleRot from -180 to 180, latitude 90 - rlnAngleTilt. Clear outside.

    Parameters
    ----------
    density : array, shape (12 nside^2,)
        Relative to uniform, in HEALPix cells (ring order).
    """
    nside = round((len(density) / 12) ** 0.5)
    y, x = np.mgrid[1 : -1 : 1j * (width // 2), -2 : 2 : 1j * width]
    inside = (x / 2) ** 2 + y**2 <= 1
    angle = np.arcsin(y.clip(-1, 1))
    latitude = np.arcsin(((2 * angle + np.sin(2 * angle)) / np.pi).clip(-1, 1))
    longitude = (np.pi / 2 * x / np.maximum(np.cos(angle), 1e-9)).clip(-np.pi, np.pi)
    cells = healpix.ang2pix(nside, np.pi / 2 - latitude, longitude)
    highest = max(2.0, float(np.max(density)))
    colours = mpl.colormaps["viridis"](density[cells].clip(0) / highest)
    for lines in (np.rad2deg(longitude) / 60, np.rad2deg(latitude) / 30):
        # A line where the next pixel is in another stripe.
        stripe = np.floor(lines)
        edge = np.zeros(inside.shape, bool)
        edge[:, 1:] |= stripe[:, 1:] != stripe[:, :-1]
        edge[1:] |= stripe[1:] != stripe[:-1]
        colours[edge, :3] = 0.65 * colours[edge, :3] + 0.35
    colours[..., 3] = inside
    return png((colours * 255).round().astype(np.uint8)), highest


def mesh_data(mesh: Mesh) -> Json:
    """A mesh for the page's script: positions as 16-bit steps, little endian, in base64."""
    reach = float(np.abs(mesh.vertices_angst).max())
    step = reach / 32000
    positions = np.round(mesh.vertices_angst / step).astype("<i2")
    return {
        "step": step,
        "vertices": base64.b64encode(positions.tobytes()).decode("ascii"),
        "faces": base64.b64encode(mesh.faces.astype("<u4").tobytes()).decode("ascii"),
    }


def fsc_chart(curve: FscCurve) -> Json:
    """The FSC over spatial frequency with named thresholds, for plotly."""
    shells = np.arange(1, len(curve.values))
    frequency = shells / (curve.box * curve.pixel_size_angst)
    last = float(frequency[-1])
    ticks = np.linspace(0, last, 6)[1:]
    values = [float(value) for value in curve.values][1:]  # noqa: PD011
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": frequency.tolist(),
        "y": values,
        "customdata": (1 / frequency).tolist(),
        "hovertemplate": "%{customdata:.2f} A: FSC %{y:.3f}<extra></extra>",
        "line": {"color": _BLUE, "width": 2.5},
    }
    lowest = min(-0.1, min(values) - 0.05)
    shapes, notes = _thresholds()
    layout = {
        "xaxis": {
            "title": {"text": "resolution (A)"},
            "range": [0, last],
            "tickvals": ticks.tolist(),
            "ticktext": [f"{1 / tick:.3g}" for tick in ticks],
        },
        "yaxis": {"title": {"text": "Fourier shell correlation"}, "range": [lowest, 1.05]},
        "shapes": shapes,
        "annotations": notes,
    }
    return {"data": [line], "layout": layout}


def _thresholds() -> tuple[list[Json], list[Json]]:
    """Lines across a chart and their names."""
    shapes: list[Json] = []
    notes: list[Json] = []
    for threshold in THRESHOLDS:
        shapes.append(
            {
                "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": threshold, "y1": threshold,
                "line": {"color": "#888888", "width": 1, "dash": "dash"},
            }
        )  # fmt: skip
        notes.append(
            {
                "xref": "paper", "x": 0.01, "xanchor": "left", "y": threshold, "yanchor": "bottom",
                "text": _THRESHOLD_NAMES[threshold], "showarrow": False, "font": {"size": 12},
            }
        )  # fmt: skip
    return shapes, notes


def rounds_chart(rounds: pd.DataFrame) -> Json:
    """Change of poses by round, on a logarithmic axis, for plotly."""
    labels = rounds["cryoreconStage"] + " " + rounds["cryoreconRound"].astype(str)
    series = (
        ("cryoreconPoseChange", "rotation (degrees)", _BLUE, "circle"),
        ("cryoreconOffsetChangeAngst", "offset (A)", _ORANGE, "square"),
        ("cryoreconHalfMapResolution", "half maps agree to (A)", _GREEN, "diamond"),
    )
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": list(range(1, len(rounds) + 1)),
            # A logarithmic axis has no place for 0.
            "y": [v if 0 < v < math.inf else None for v in rounds[column].astype(float)],
            "customdata": labels.tolist(),
            "hovertemplate": f"%{{customdata}}: {name} %{{y:.3g}}<extra></extra>",
            "line": {"color": colour, "width": 2},
            "marker": {"symbol": symbol, "size": 8},
        }
        for column, name, colour, symbol in series
        if column in rounds
    ]
    layout = {
        "xaxis": {"title": {"text": "round"}, "dtick": max(1, len(rounds) // 12)},
        "yaxis": {"type": "log", "title": {"text": "change (median)"}},
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "margin": {"t": 84},
    }
    return {"data": data, "layout": layout}


def information_chart(information: pd.DataFrame) -> Json:
    """How far moments determine the map: expected FSC by resolution, for plotly."""
    angst = information["rlnAngstromResolution"].astype(float)
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": (1 / angst).tolist(),
        "y": information["cryoreconExpectedFsc"].astype(float).tolist(),
        "customdata": angst.tolist(),
        "hovertemplate": "%{customdata:.1f} A: %{y:.3f}<extra></extra>",
        "line": {"color": _BLUE, "width": 2.5},
    }
    places = angst.iloc[:: max(1, len(angst) // 6)]
    layout = {
        "xaxis": {
            "title": {"text": "resolution (A)"},
            "tickvals": (1 / places).tolist(),
            "ticktext": [f"{a:.3g}" for a in places],
        },
        "yaxis": {"title": {"text": "expected FSC"}, "range": [-0.05, 1.05]},
    }
    return {"data": [line], "layout": layout}
