"""``cryorecon report``: what a job found, as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryorecon.cli.console import console


def report_command(
    job: Annotated[
        Path,
        typer.Argument(metavar="JOB", help="Directory of an abinitio job, or a map (.mrc)."),
    ],
    particles: Annotated[
        Path | None,
        typer.Option(help="Particle STAR or .cs file that leads to the images, if they moved."),
    ] = None,
    project: Annotated[Path | None, typer.Option(help="Folder of the image paths.")] = None,
) -> None:
    """Write report.html, which opens offline, and logfile.pdf into a job directory.

    Every ab initio job ends with it; this makes it anew, or for an older job. A directory that
    holds no more than initial_model.mrc and run_data.star will do. Given a map, --particles names
    the STAR file with its poses, and the report is written beside the map.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run.report import write_map_report, write_report

    if job.suffix.lower() in (".mrc", ".map"):
        written = write_map_report(job, particles=particles, project=project)
    else:
        written = write_report(job, particles=particles, project=project)
    for path in written:
        console.print(str(path), markup=False)
