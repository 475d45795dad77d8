"""``cryorecon abinitio``: a map from scratch, and poses, with any engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cryorecon.cli.abinitio_all import all_command
from cryorecon.cli.abinitio_amortized import abinitio_amortized_command
from cryorecon.cli.abinitio_options import (
    Ambiguous,
    AssignAll,
    Box,
    Continue,
    Halves,
    Keep,
    Mask,
    OffsetRange,
    RefineAll,
    Subset,
    Symmetry,
)
from cryorecon.cli.abinitio_rmfn import abinitio_rmfn_command
from cryorecon.cli.command import COMPUTE, EXPERT, INPUT, examples
from cryorecon.cli.moments_reconstruct import moments_command
from cryorecon.cli.options import (
    DEVICE_HELP,
    Config,
    Contrast,
    Diameter,
    DryRun,
    Job,
    Json,
    Overwrite,
    Particles,
    Project,
    Seed,
    Settings,
    Threads,
    option,
)

EXAMPLES = examples(
    ("a map of the particles of a RELION job", "cryorecon abinitio particles.star -o job001"),
    (
        "of a molecule 120 A wide with fourfold symmetry, half maps from two searches",
        "cryorecon abinitio particles.star -o job002 --diameter 120 --symmetry C4"
        " --halves independent",
    ),
    (
        "with another engine, and the resolution of the half maps for a script",
        "cryorecon abinitio particles.star -o job003 --method amortized --json",
    ),
    (
        "with every engine, and what they agree on",
        "cryorecon abinitio particles.star -o job004 --method all",
    ),
)


class Method(StrEnum):
    """Ab initio engines; all of them, compared."""

    RMFN = "rmfn"
    AMORTIZED = "amortized"
    MOMENTS = "moments"
    ALL = "all"


def abinitio_command(
    particles: Particles,
    output: Job,
    method: Annotated[
        Method,
        option(COMPUTE, "A search; an encoder that learns poses; moments, without poses; or all."),
    ] = Method.RMFN,
    diameter: Diameter = None,
    offset_range: OffsetRange = None,
    starts: Annotated[
        int | None,
        option(
            COMPUTE,
            "Random starts; the one that fits best goes on.",
            metavar="N",
            min=1,
            default="2, engine moments 4",
            hidden=True,
        ),
    ] = None,
    volume: Annotated[
        Literal["rmfn", "grid"] | None,
        option(
            EXPERT,
            "What holds the map in the search: the network or a plain grid.",
            default="rmfn",
            hidden=True,
        ),
    ] = None,
    init_map: Annotated[
        Path | None,
        option(
            INPUT,
            "MRC map to start from, low-passed, in place of the search.",
            metavar="FILE",
            hidden=True,
        ),
    ] = None,
    allow_ambiguous: Ambiguous = False,
    halves: Halves = "shared",
    contrast: Contrast = "auto",
    symmetry: Symmetry = "C1",
    mask: Mask = None,
    box: Box = None,
    images: Keep = "auto",
    subset: Subset = None,
    assign_all: AssignAll = True,
    refine_all: RefineAll = True,
    device: Annotated[
        str | None, option(COMPUTE, DEVICE_HELP, metavar="NAME", default="cpu, amortized auto")
    ] = None,
    project: Project = None,
    seed: Seed = 0,
    threads: Threads = None,
    settings: Settings = None,
    config: Config = None,
    json: Json = False,
    overwrite: Overwrite = False,
    continue_job: Continue = None,
    dry_run: DryRun = False,
) -> None:
    """Find a map and poses from scratch with the chosen engine; engine moments finds no poses.

    --method all runs every engine, a folder each, and writes what they agree on, as consensus.
    Poses in the file are not read. Each engine's own command, abinitio-METHOD or moments, has
    more options. In RELION: an External job with "cryorecon abinitio" as executable.
    """
    del continue_job  # Then another function runs instead.
    own = {"starts": starts, "volume": volume, "init_map": init_map}
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    taken: dict[str, Any] = {"particles": particles, "output": output, "diameter": diameter}
    taken |= {"contrast": contrast, "project": project, "seed": seed, "settings": settings}
    taken |= {"config": config, "overwrite": overwrite, "threads": threads, "json": json}
    taken |= {"dry_run": dry_run}
    taken |= {} if device is None else {"device": device}
    more: dict[str, Any] = {
        "offset_range": offset_range,
        "halves": halves,
        "symmetry": symmetry,
        "mask": mask,
    }
    more |= {"box": box, "images": images, "subset": subset}
    more |= {"assign_all": assign_all, "refine_all": refine_all}
    if method is Method.MOMENTS:
        starts_given = given.pop("starts", None)
        changed = {name: v for name, v in more.items() if v != _PLAIN.get(name)}
        _refuse({**given, **changed}, method)
        count = {} if starts_given is None else {"starts": starts_given}
        moments_command(**taken, **count, allow_ambiguous=allow_ambiguous)
        return
    if method is Method.ALL:
        _refuse({name: v for name, v in given.items() if name != "starts"}, method)
        all_command(taken, more, starts, allow_ambiguous=allow_ambiguous)
        return
    if allow_ambiguous:
        raise typer.BadParameter("--allow-ambiguous belongs to engine moments and to all")
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
