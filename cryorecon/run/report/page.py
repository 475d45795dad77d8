"""``report.html``: what a job found, what to doubt, and what to do about it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex

from cryorecon import __version__
from cryorecon.run.curves import THRESHOLDS
from cryorecon.run.report.charts import (
    fsc_chart,
    information_chart,
    likelihood_chart,
    mesh_data,
    rounds_chart,
)
from cryorecon.run.report.contents import Report
from cryorecon.run.report.pictures import particle_pictures, png
from cryorecon.run.report.surface import surface_mesh
from cryorecon.run.report.tables import table_of

_SECTIONS = (
    ("Warnings", "warnings"),
    ("Map", "map"),
    ("Slices", "slices"),
    ("FSC", "fsc"),
    ("Views", "views"),
    ("Starts", "starts"),
    ("Information", "information"),
    ("Rounds", "rounds"),
    ("Particles", "particles"),
    ("Parameters", "parameters"),
)
Json = dict[str, Any]


def render_page(report: Report) -> str:
    """The page, with all it needs inside."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        (files("cryorecon.run.report") / "templates" / "report.html").read_text("utf-8")
    )
    content = _content(report)
    optional = {"starts": "starts", "information": "information", "slices": "map"}
    shown = [
        (name, place)
        for name, place in _SECTIONS
        if place not in optional or content[optional[place]]
    ]
    return template.render(plotly=get_plotlyjs(), sections=shown, **content)


def _content(report: Report) -> Json:
    inputs = report.inputs
    charts, mesh, shown_map = _charts(report), None, None
    if inputs.map is not None:
        mesh = surface_mesh(inputs.map.data, inputs.map.pixel_size_angst)
        shown_map = _map(report, mesh.level if mesh else None, mesh.voxels if mesh else 0)
    ramp = [to_hex(mpl.colormaps["viridis"](share)) for share in np.linspace(0, 1, 9)]
    return {
        "title": report.title,
        "subtitle": f"Report of cryorecon {__version__} on {inputs.folder.resolve()}",
        "colours": ", ".join(ramp),
        "facts": report.facts,
        "findings": report.findings,
        "fired": any(f.fires for f in report.findings),
        "logged": report.logged,
        "map": shown_map,
        "fsc_title": "FSC of half maps" if inputs.starts is None else "FSC of starts",
        "fsc": _fsc(report),
        "views": _views(report),
        "starts": table_of(inputs.starts),
        "information": inputs.information is not None,
        "rounds": table_of(inputs.rounds),
        "no_rounds": "This job has no rounds of refinement on record.",
        "particles": _particles(report),
        "likelihood": inputs.log_likelihood is not None,
        "no_particles": report.no_examples,
        "parameters": report.parameters,
        "settings_text": inputs.settings_text,
        "log": "\n".join(inputs.log),
        "charts": _script_json(charts),
        "mesh": _script_json(mesh_data(mesh) if mesh else None),
    }


def _charts(report: Report) -> Json:
    inputs, charts = report.inputs, {}
    if inputs.fsc is not None:
        charts["fsc-plot"] = fsc_chart(inputs.fsc)
    if inputs.rounds is not None and len(inputs.rounds):
        charts["rounds-plot"] = rounds_chart(inputs.rounds)
    if inputs.information is not None:
        charts["information-plot"] = information_chart(inputs.information)
    if inputs.log_likelihood is not None:
        charts["likelihood-plot"] = likelihood_chart(inputs.log_likelihood)
    return charts


def _map(report: Report, level: float | None, voxels: int) -> Json:
    found = report.inputs.map
    assert found is not None
    caption = "The map has no surface to draw."
    if level is not None:
        spread = (level - found.data.mean()) / max(float(found.data.std()), 1e-30)
        caption = f"Surface at {level:.3g} ({spread:.1f} standard deviations above the mean)"
        caption += "." if voxels == len(found.data) else f", on a grid of {voxels} px."
    return {
        "caption": caption,
        "pictures": report.pictures,
        "side": f"{report.inputs.side_angst:.0f} A",
    }


def _fsc(report: Report) -> Json | None:
    curve = report.inputs.fsc
    if curve is None:
        return None
    crossings = [curve.resolution_text(threshold) for threshold in THRESHOLDS]
    maps = curve.maps[:1].upper() + curve.maps[1:]
    return {"maps": maps, "conditions": curve.conditions, "crossings": crossings}


def _views(report: Report) -> Json | None:
    if report.sphere is None:
        return None
    pixels, highest = report.sphere
    poses = report.inputs.poses
    caption = "As the moments tell." if poses is None else f"{len(poses.rotations):,} images."
    return {"uri": png(pixels), "highest": highest, "caption": caption}


def _particles(report: Report) -> Json | None:
    found = report.examples
    if found is None:
        return None
    caption = (
        f"Spread over the table. All low-passed to {found.resolution_angst:.1f} A, where noise "
        "lets the eye see something; the residual should look like noise. The predictions are the "
        f"map's projections, moved and with the CTF, times {found.scale:.2f}, which is fitted to "
        "all that are shown."
    )
    if found.scale < 0:
        caption += " It is negative: the particles are black on white."
    rows = [
        {"name": name, "correlation": correlation, "uris": [png(pixels) for pixels in three]}
        for name, correlation, three in zip(
            found.names, found.correlations, particle_pictures(found), strict=True
        )
    ]
    return {"rows": rows, "caption": caption}


def _script_json(value: object) -> str:
    """JSON that cannot end the script it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
