"""The numbers of a report's charts, as plotly and the page's script take them."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from cryorecon.run.curves import THRESHOLDS, FscCurve
from cryorecon.run.report.surface import Mesh

Json = dict[str, Any]
# What the field uses each threshold for.
THRESHOLD_NAMES = {0.5: "0.5 (against a known map)", 0.143: "0.143 (between half maps)"}
LIKELIHOOD_AXIS = "log-likelihood of an image (0: as likely as an empty one)"
_BINS = 60
# Wong's palette (2011), told apart by the colour-blind on light and dark ground.
BLUE, ORANGE, GREEN = "#3d8fd1", "#d9782d", "#1f9e77"
# Column of rounds.star, name, colour, symbol for plotly and for matplotlib.
ROUND_SERIES = (
    ("cryoreconPoseChange", "rotation (degrees)", BLUE, "circle", "o"),
    ("cryoreconOffsetChangeAngst", "offset (A)", ORANGE, "square", "s"),
    ("cryoreconHalfMapResolution", "half maps agree to (A)", GREEN, "diamond", "D"),
)


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
        "line": {"color": BLUE, "width": 2.5},
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
                "text": THRESHOLD_NAMES[threshold], "showarrow": False, "font": {"size": 12},
            }
        )  # fmt: skip
    return shapes, notes


def rounds_chart(rounds: pd.DataFrame) -> Json:
    """Change of poses by round, on a logarithmic axis, for plotly."""
    labels = rounds["cryoreconStage"] + " " + rounds["cryoreconRound"].astype(str)
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
        for column, name, colour, symbol, _ in ROUND_SERIES
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


def likelihood_histogram(log_likelihood: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Counts and edges of bins that hold all but one image of a thousand at either end.

    The few beyond are counted in the outermost bins.
    """
    values = log_likelihood.numpy()
    low, high = np.percentile(values, [0.1, 99.9])
    edges = np.linspace(min(low, 0.0), max(high, low + 1e-6, 1e-6), _BINS + 1)
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    return counts, edges


def likelihood_chart(log_likelihood: Tensor) -> Json:
    """How many images fit the map how well, for plotly."""
    counts, edges = likelihood_histogram(log_likelihood)
    bars = {
        "type": "bar",
        "x": ((edges[1:] + edges[:-1]) / 2).tolist(),
        "y": counts.tolist(),
        "width": float(edges[1] - edges[0]),
        "hovertemplate": "%{x:.4g}: %{y} images<extra></extra>",
        "marker": {"color": BLUE},
    }
    empty = {
        "type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1,
        "line": {"color": "#888888", "width": 1, "dash": "dash"},
    }  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": LIKELIHOOD_AXIS}},
        "yaxis": {"title": {"text": "images"}},
        "shapes": [empty],
    }
    return {"data": [bars], "layout": layout}


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
        "line": {"color": BLUE, "width": 2.5},
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
