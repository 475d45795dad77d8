"""``cryorecon abinitio`` and ``cryorecon abinitio-rmfn``: poses and map from scratch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cryorecon.cli.console import console, prepare_folder


class Method(StrEnum):
    """Ab initio engines."""

    RMFN = "rmfn"


Particles = Annotated[Path, typer.Argument(help="Particle STAR file (RELION 3.0, 3.1 or 5).")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Job directory.")]
Diameter = Annotated[float | None, typer.Option(help="Of the particle, A; default 0.8 of the box.")]
OffsetRange = Annotated[
    float | None, typer.Option(help="Largest in-plane offset, A; default a tenth of the box.")
]
Starts = Annotated[
    int, typer.Option(min=1, help="Searches from different random poses; the likeliest goes on.")
]
Project = Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")]
Seed = Annotated[int, typer.Option(help="One seed gives one result on one machine.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Rarely needed engine settings, as key=value; repeatable."),
]
Config = Annotated[Path | None, typer.Option(help="YAML file of engine settings.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a non-empty folder.")]


def abinitio_rmfn_command(
    particles: Particles,
    output: Output,
    diameter: Diameter = None,
    offset_range: OffsetRange = None,
    starts: Starts = 2,
    project: Project = None,
    seed: Seed = 0,
    settings: Settings = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Map and poses from random starts, with a residual multiplicative filter network.

    No pose column of the STAR file is read. Half sets (rlnRandomSubset) are honoured.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.engines.rmfn import RmfnConfig
    from cryorecon.run.abinitio import AbinitioOptions, abinitio_rmfn
    from cryorecon.run.settings import with_settings

    engine = with_settings(RmfnConfig(n_starts=starts), config, settings or [])
    prepare_folder(output, overwrite)
    options = AbinitioOptions(diameter, offset_range, project, seed, engine)
    abinitio_rmfn(particles, output, options, console)


def abinitio_command(
    particles: Particles,
    output: Output,
    method: Annotated[Method, typer.Option(help="Engine.")] = Method.RMFN,
    diameter: Diameter = None,
    offset_range: OffsetRange = None,
    starts: Starts = 2,
    project: Project = None,
    seed: Seed = 0,
    settings: Settings = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Map and poses from scratch with the chosen engine."""
    run = {Method.RMFN: abinitio_rmfn_command}[method]
    run(
        particles,
        output,
        diameter,
        offset_range,
        starts,
        project,
        seed,
        settings,
        config,
        overwrite,
    )
