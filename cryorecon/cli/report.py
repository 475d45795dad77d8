"""``cryorecon report``: what a job found, as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cryorecon.cli.command import INPUT, examples
from cryorecon.cli.console import messages, print_json
from cryorecon.cli.options import Json, Project, argument, option

EXAMPLES = examples(
    ("a job's page made anew", "cryorecon report job001"),
    (
        "after the images moved",
        "cryorecon report job001 --particles elsewhere/particles.star",
    ),
    (
        "a map of any program, with the poses it was made from",
        "cryorecon report run_it025_class001.mrc --particles run_it025_data.star",
    ),
    ("which warnings fire, for a script", "cryorecon report job001 --json"),
)


def report_command(
    job: Annotated[Path, argument("Directory of an ab initio job, or an MRC map.", "JOB")],
    particles: Annotated[
        Path | None,
        option(
            INPUT,
            "STAR or .cs file that leads to the images.",
            metavar="FILE",
            default="run_data.star, else the job's input",
        ),
    ] = None,
    project: Project = None,
    json: Json = False,
) -> None:
    """Write report.html, which opens offline, and logfile.pdf into a job directory.

    Every ab initio job ends with it; this makes it anew, or for an older job. A directory that
    holds no more than initial_model.mrc and run_data.star will do. Given a map, --particles names
    the file with its poses, and the report is written beside the map.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run.report.written import write_map_report, write_report

    if job.suffix.lower() in (".mrc", ".map"):
        written = write_map_report(job, particles=particles, project=project)
    else:
        written = write_report(job, particles=particles, project=project)
    for path in written.files:
        messages(json).print(str(path), markup=False)
    for finding in written.findings:
        if finding.fires:
            text = f"WARNING: {finding.problem} {finding.remedy}"
            messages(json).print(text, markup=False, highlight=False)
    if json:
        names = ("name", "score", "threshold", "side", "fires")
        checks = [{name: getattr(found, name) for name in names} for found in written.findings]
        print_json({"files": written.files, "checks": checks})
