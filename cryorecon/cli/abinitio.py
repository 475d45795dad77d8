"""``cryorecon abinitio``: a map from scratch, and poses, with any engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

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
from cryorecon.cli.moments_reconstruct import Ambiguous, moments_command


class Method(StrEnum):
    """Ab initio engines."""

    RMFN = "rmfn"
    AMORTIZED = "amortized"
    MOMENTS = "moments"


def abinitio_command(
    particles: Particles,
    output: Output,
    method: Annotated[Method, typer.Option(help="Engine.")] = Method.RMFN,
    diameter: Diameter = None,
    offset_range: OffsetRange = None,
    starts: Annotated[
        int | None, typer.Option(min=1, help="Random starts; engines rmfn and moments.")
    ] = None,
    volume: Annotated[
        Literal["rmfn", "grid"] | None, typer.Option(help="Map of the search; engine rmfn.")
    ] = None,
    init_map: Annotated[
        Path | None, typer.Option(help="Map in place of the search; engine rmfn.")
    ] = None,
    allow_ambiguous: Ambiguous = False,
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
    """Map and poses from scratch with the chosen engine; engine moments gives no poses.

    Each engine's own commands, abinitio-METHOD or moments, have more options.
    """
    own = {"starts": starts, "volume": volume, "init_map": init_map}
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    taken: dict[str, Any] = {"particles": particles, "output": output, "diameter": diameter}
    taken |= {"contrast": contrast, "project": project, "seed": seed, "settings": settings}
    taken |= {"config": config, "overwrite": overwrite}
    more: dict[str, Any] = {
        "offset_range": offset_range,
        "halves": halves,
        "symmetry": symmetry,
        "mask": mask,
    }
    more |= {"images": images, "subset": subset}
    more |= {"assign_all": assign_all, "refine_all": refine_all}
    if method is Method.MOMENTS:
        starts_given = given.pop("starts", None)
        changed = {name: v for name, v in more.items() if v != _PLAIN.get(name)}
        _refuse({**given, **changed}, method)
        count = {} if starts_given is None else {"starts": starts_given}
        moments_command(**taken, **count, allow_ambiguous=allow_ambiguous)
        return
    if allow_ambiguous:
        raise typer.BadParameter("--allow-ambiguous belongs to engine moments")
    if method is not Method.RMFN:
        _refuse(given, method)
    commands: dict[Method, Callable[..., None]] = {
        Method.RMFN: abinitio_rmfn_command,
        Method.AMORTIZED: abinitio_amortized_command,
    }
    commands[method](**taken, **more, **given)


# What options that engine moments does not have are when they are not given.
_PLAIN = {
    "halves": "shared",
    "symmetry": "C1",
    "images": "auto",
    "assign_all": True,
    "refine_all": True,
}


def _refuse(given: Mapping[str, object], method: Method) -> None:
    if given:
        names = ", ".join(
            f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            for name, value in given.items()
        )
        raise typer.BadParameter(f"engine {method.value} has no {names}")
