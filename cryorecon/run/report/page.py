"""``report.html`` and ``logfile.pdf``: what a job found, what to doubt, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from cryorecon import __version__
from cryorecon.engines.rivals import SURE
from cryorecon.errors import CryoreconError
from cryorecon.io.files import replacing
from cryorecon.io.particles import Particles
from cryorecon.run.curves import THRESHOLDS
from cryorecon.run.job import Job, add_output_node
from cryorecon.run.plots import view_density
from cryorecon.run.report.charts import (
    fsc_chart,
    information_chart,
    likelihood_chart,
    mesh_data,
    rounds_chart,
)
from cryorecon.run.report.doubts import AT_LIMIT, Finding, findings, said_in_log
from cryorecon.run.report.inputs import ReportInputs, read_job, read_single_map
from cryorecon.run.report.particles import Examples, example_particles
from cryorecon.run.report.pdf import write_pdf
from cryorecon.run.report.pictures import (
    Picture,
    map_pictures,
    particle_pictures,
    png,
    sphere_picture,
)
from cryorecon.run.report.surface import surface_mesh
from cryorecon.run.report.tables import table_of

_PDF_LOGFILE = 13
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


@dataclass(frozen=True)
class Report:
    """Everything that both files show, worked out once when it is first asked for."""

    inputs: ReportInputs

    @property
    def title(self) -> str:
        """Of the page."""
        return f"{self.inputs.folder.resolve().name}: {self.inputs.map_name}"

    @cached_property
    def findings(self) -> list[Finding]:
        """All checks."""
        return findings(self.inputs)

    @cached_property
    def logged(self) -> list[str]:
        """Warnings of the run itself, less what a check says as well."""
        said = said_in_log(self.inputs.log)
        limited = any(f.name == "Offsets at the limit" and f.fires for f in self.findings)
        return [line for line in said if not (limited and AT_LIMIT in line)]

    @cached_property
    def _examples(self) -> tuple[Examples | None, str]:
        try:
            return example_particles(self.inputs), self.inputs.no_particles
        except CryoreconError as error:
            return None, str(error)

    @property
    def examples(self) -> Examples | None:
        """A few particles, where the images can be read."""
        return self._examples[0]

    @property
    def no_examples(self) -> str:
        """Why there are none."""
        return f"No images to show: {self._examples[1] or 'there is no map'}"

    @cached_property
    def density(self) -> NDArray[np.floating] | None:
        """Of viewing directions over uniform, in HEALPix cells."""
        if self.inputs.poses is not None:
            return view_density(self.inputs.poses.rotations)
        if self.inputs.view_density is not None:
            return self.inputs.view_density["cryoreconViewDensity"].to_numpy(np.float64)
        return None

    @cached_property
    def pictures(self) -> list[Picture]:
        """Of the map."""
        return [] if self.inputs.map is None else map_pictures(self.inputs.map.data)

    @cached_property
    def sphere(self) -> tuple[NDArray[np.uint8], float] | None:
        """Picture of the viewing directions, and the density of its highest colour."""
        return None if self.density is None else sphere_picture(self.density)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The headline figures."""
        inputs, facts = self.inputs, []
        if inputs.fsc is not None:
            what = "Half maps" if inputs.poses is not None else "Starts"
            threshold = 0.143 if inputs.poses is not None else 0.5
            facts.append((f"{what} agree", inputs.fsc.resolution_text(threshold)))
        if inputs.poses is not None:
            n, share = len(inputs.poses.rotations), inputs.poses.share
            facts.append(("Particles", f"{n:,}"))
            # Of finer poses, in another program's table, none is ever sure.
            if share is not None and "program" in inputs.settings:
                doubtful = int((share < SURE).sum())
                facts.append(("Another pose is likely", f"{doubtful:,} ({doubtful / n:.0%})"))
        elif "input_rows" in inputs.settings:
            facts.append(("Particles", f"{inputs.settings['input_rows']:,}"))
        if inputs.map is not None:
            box, pixel = len(inputs.map.data), inputs.map.pixel_size_angst
            facts.append(("Map", f"{box} px at {pixel:.3g} A"))
            if inputs.diameter is not None:
                facts.append(("Particle diameter", f"{inputs.diameter * inputs.side_angst:.0f} A"))
        facts.append(("Job", inputs.outcome))
        return facts

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """Of ``job.yaml``, nested names joined by points."""
        return _flat(self.inputs.settings)


def _flat(settings: Json, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in settings.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", str(value)))
    return rows


@dataclass(frozen=True)
class Written:
    """The files of a report, and what its checks found."""

    files: list[Path]
    findings: list[Finding]


def write_report(
    folder: Path,
    *,
    particles: Path | None = None,
    project: Path | None = None,
    images: Particles | None = None,
    outcome: str | None = None,
) -> Written:
    """Write ``report.html`` and ``logfile.pdf`` into a job directory.

    Parameters
    ----------
    folder : Path
        Of a job of any engine, or with a map and a pose table of these names.
    particles, project : Path, optional
        As in :func:`cryorecon.run.report.inputs.read_job`.
    images : Particles, optional
        The job's own, already read.
    outcome : str, optional
        Of the job, before its marker is there.

    Returns
    -------
    Written

    Raises
    ------
    CryoreconError
        If the directory has nothing to show or contradicts itself.
    """
    inputs = read_job(folder, particles, project, images)
    report = Report(inputs if outcome is None else replace(inputs, outcome=outcome))
    written = _write(report, folder / "report.html", folder / "logfile.pdf")
    add_output_node(folder, "logfile.pdf", _PDF_LOGFILE)
    return written


def write_map_report(
    path: Path, *, particles: Path | None = None, project: Path | None = None
) -> Written:
    """The same for a map of any program, beside it: ``NAME_report.html`` and ``.pdf``.

    Parameters
    ----------
    path : Path
        Map.
    particles : Path, optional
        STAR file with the poses of its particles.

    Raises
    ------
    CryoreconError
    """
    report = Report(read_single_map(path, particles, project))
    return _write(
        report, *(path.with_name(f"{path.stem}_report.{kind}") for kind in ("html", "pdf"))
    )


def _write(report: Report, page: Path, pdf: Path) -> Written:
    with replacing(page) as temporary:
        temporary.write_text(render_page(report), "utf-8")
    write_pdf(pdf, report)
    return Written([page, pdf], report.findings)


def report_at_end(job: Job, images: Particles | None = None) -> None:
    """Write a finished job's report; a failure is told, and is not the job's."""
    try:
        written = write_report(job.folder, images=images, outcome="done")
        for path in written.files:
            job.say(f"{path}")
        fired = [found.name for found in written.findings if found.fires]
        if fired:
            job.say(f"the report warns of {', '.join(fired)}")
    except Exception as error:
        job.say(f"WARNING: the report could not be written: {type(error).__name__}: {error}")
        job.say(f"WARNING: the job itself is done; try cryorecon report {job.folder}")


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
