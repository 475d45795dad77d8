"""``cryorecon abinitio`` and ``cryorecon abinitio-rmfn``: poses and map from scratch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

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
Halves = Annotated[
    Literal["independent", "shared", "none"],
    typer.Option(help="Both half sets from scratch; half sets of one search; no half maps."),
]
Contrast = Annotated[
    Literal["auto", "white", "black"],
    typer.Option(help="Particles white on black, black on white, or as the images tell."),
]
Symmetry = Annotated[
    str, typer.Option(help="Point group: C1, Cn, Dn, T, O or I. The C1 map is kept as well.")
]
Mask = Annotated[
    Path | None,
    typer.Option(help="Map from 0 to 1 that holds in any orientation, such as a shell."),
]
InitMap = Annotated[
    Path | None,
    typer.Option(help="Start from this map, coarsely, instead of searching."),
]
Keep = Annotated[
    Literal["auto", "memory", "disk"],
    typer.Option("--images", help="Hold images in memory, or read them again when needed."),
]
Volume = Annotated[
    Literal["rmfn", "grid"],
    typer.Option(help="What holds the map in the search: the network or a plain grid."),
]
Init = Annotated[
    Literal["random", "perturbed"],
    typer.Option(help="Ab initio, or the published protocol, which starts near known poses."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a non-empty folder.")]


def abinitio_rmfn_command(
    particles: Particles,
    output: Output,
    init: Init = "random",
    diameter: Diameter = None,
    offset_range: OffsetRange = None,
    starts: Starts = 2,
    halves: Halves = "shared",
    contrast: Contrast = "auto",
    symmetry: Symmetry = "C1",
    mask: Mask = None,
    init_map: InitMap = None,
    images: Keep = "auto",
    volume: Volume = "rmfn",
    project: Project = None,
    seed: Seed = 0,
    settings: Settings = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Map and poses from random starts, with a residual multiplicative filter network.

    No pose column of the STAR file is read. Half sets (rlnRandomSubset) are honoured. --init
    perturbed runs the published protocol instead, which starts 45 to 90 degrees from the poses
    in the file; of the options it takes --diameter, --project, --seed, --set and --config.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.engines.rmfn import RmfnConfig
    from cryorecon.engines.rmfn_paper import PaperConfig
    from cryorecon.run.abinitio import AbinitioOptions, abinitio_rmfn
    from cryorecon.run.paper_protocol import PaperOptions, abinitio_perturbed
    from cryorecon.run.settings import with_settings

    if init == "perturbed":
        paper = with_settings(PaperConfig(), config, settings or [])
        prepare_folder(output, overwrite)
        paper_options = PaperOptions(diameter, project, seed, paper)
        abinitio_perturbed(particles, output, paper_options, console)
        return
    engine = with_settings(RmfnConfig(n_starts=starts, volume=volume), config, settings or [])
    prepare_folder(output, overwrite)
    options = AbinitioOptions(
        diameter,
        offset_range,
        project,
        seed,
        halves,
        contrast,
        symmetry,
        mask,
        init_map,
        images,
        engine,
    )
    abinitio_rmfn(particles, output, options, console)


def abinitio_command(
    particles: Particles,
    output: Output,
    method: Annotated[Method, typer.Option(help="Engine.")] = Method.RMFN,
    diameter: Diameter = None,
    offset_range: OffsetRange = None,
    starts: Starts = 2,
    halves: Halves = "shared",
    contrast: Contrast = "auto",
    symmetry: Symmetry = "C1",
    mask: Mask = None,
    init_map: InitMap = None,
    images: Keep = "auto",
    volume: Volume = "rmfn",
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
        "random",
        diameter,
        offset_range,
        starts,
        halves,
        contrast,
        symmetry,
        mask,
        init_map,
        images,
        volume,
        project,
        seed,
        settings,
        config,
        overwrite,
    )
