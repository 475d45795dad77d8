"""A report's files, beside what they are of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cryorecon.io.files import replacing
from cryorecon.io.particles import Particles
from cryorecon.run.job import Job, add_output_node
from cryorecon.run.report.contents import Report
from cryorecon.run.report.doubts import Finding
from cryorecon.run.report.inputs import read_job, read_single_map
from cryorecon.run.report.page import render_page
from cryorecon.run.report.pdf import write_pdf

# RELION's number for a node of this kind.
_PDF_LOGFILE = 13


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
