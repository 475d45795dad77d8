"""``cryorecon abinitio``: poses and map from scratch with either engine."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from cryorecon.cli.abinitio_amortized import abinitio_amortized_command
from cryorecon.cli.abinitio_options import (
    AssignAll,
    Config,
    Contrast,
    Diameter,
    Halves,
    Keep,
    Mask,
    OffsetRange,
    Output,
    Overwrite,
    Particles,
    Project,
    RefineAll,
    Seed,
    Settings,
    Subset,
    Symmetry,
)
from cryorecon.cli.abinitio_rmfn import abinitio_rmfn_command


class Method(StrEnum):
    """Ab initio engines."""

    RMFN = "rmfn"
    AMORTIZED = "amortized"


def abinitio_command(
    particles: Particles,
    output: Output,
    method: Annotated[Method, typer.Option(help="Engine.")] = Method.RMFN,
    diameter: Diameter = None,
    offset_range: OffsetRange = None,
    starts: Annotated[int | None, typer.Option(min=1, help="Searches; engine rmfn.")] = None,
    volume: Annotated[
        Literal["rmfn", "grid"] | None, typer.Option(help="Map of the search; engine rmfn.")
    ] = None,
    init_map: Annotated[
        Path | None, typer.Option(help="Map in place of the search; engine rmfn.")
    ] = None,
    halves: Halves = "shared",
    contrast: Contrast = "auto",
    symmetry: Symmetry = "C1",
    mask: Mask = None,
    images: Keep = "auto",
    subset: Subset = None,
    assign_all: AssignAll = True,
    refine_all: RefineAll = True,
    project: Project = None,
    seed: Seed = 0,
    settings: Settings = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Map and poses from scratch with the chosen engine.

    Each engine's own command, abinitio-METHOD, has more options.
    """
    own = {"starts": starts, "volume": volume, "init_map": init_map}
    given = {name: value for name, value in own.items() if value is not None}
    if given and method is not Method.RMFN:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"{names} belong to engine rmfn, not to {method.value}")
    commands: dict[Method, Callable[..., None]] = {
        Method.RMFN: abinitio_rmfn_command,
        Method.AMORTIZED: abinitio_amortized_command,
    }
    commands[method](
        particles,
        output,
        diameter=diameter,
        offset_range=offset_range,
        halves=halves,
        contrast=contrast,
        symmetry=symmetry,
        mask=mask,
        images=images,
        subset=subset,
        assign_all=assign_all,
        refine_all=refine_all,
        project=project,
        seed=seed,
        settings=settings,
        config=config,
        overwrite=overwrite,
        **given,
    )
