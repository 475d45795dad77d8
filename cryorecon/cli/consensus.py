"""``cryorecon consensus``: on what several jobs agree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryorecon.cli.abinitio_options import Ambiguous
from cryorecon.cli.command import COMPUTE, MOLECULE, examples
from cryorecon.cli.console import messages, prepare_folder, print_job, use_threads
from cryorecon.cli.options import (
    DIAMETER_HELP,
    Job,
    Json,
    Overwrite,
    Seed,
    Threads,
    argument,
    option,
)

EXAMPLES = examples(
    (
        "do two engines find the same map, and to which resolution",
        "cryorecon consensus job001 job002 -o job003",
    ),
    (
        "with the map of another program as a third voice; they must agree to 12 A",
        "cryorecon consensus job001 job002 known.mrc -o job003 --agree-to 12",
    ),
    (
        "which jobs agree, for a script",
        "cryorecon consensus job001 job002 job003 -o job004 --json | jq '.consensus.jobs'",
    ),
)


def consensus_command(
    jobs: Annotated[
        list[Path],
        argument("Two jobs of the same particles or more, or MRC maps.", "JOB"),
    ],
    output: Job,
    diameter: Annotated[
        float | None,
        option(MOLECULE, DIAMETER_HELP, metavar="A", default="the first job's"),
    ] = None,
    symmetry: Annotated[
        str,
        option(MOLECULE, "Point group, if the jobs ran with it: C1, C4, D2, ...", metavar="GROUP"),
    ] = "C1",
    agree_to: Annotated[
        float | None,
        option(
            COMPUTE,
            "Resolution that agreement must reach [A].",
            metavar="A",
            min=0,
            default="a quarter of the diameter",
        ),
    ] = None,
    within: Annotated[
        float, option(COMPUTE, "Poses that agree differ by no more [deg].", metavar="DEG")
    ] = 5.0,
    seed: Seed = 0,
    threads: Threads = None,
    allow_ambiguous: Ambiguous = False,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """How far several reconstructions of the same particles agree, and the map they agree on.

    Maps are aligned, both hands, and compared half set against half set where the jobs have the
    same half sets. If no majority agrees as far as --agree-to, the status is 1 and no map is
    written. All jobs see the same images: agreement speaks for the poses, not for the data.
    """
    if len(jobs) < 2:
        raise typer.BadParameter("give two jobs or more")
    if agree_to == 0:
        raise typer.BadParameter("--agree-to 0: give a resolution, or leave it out")
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run.consensus.compare import ConsensusOptions, consensus

    use_threads(threads)
    prepare_folder(output, overwrite)
    options = ConsensusOptions(
        diameter_angst=diameter,
        agree_to_angst=agree_to or 0.0,
        within_deg=within,
        symmetry=symmetry,
        allow_ambiguous=allow_ambiguous,
        seed=seed,
    )
    consensus(jobs, output, options, messages(json))
    print_job(output, json)
