"""``cryorecon moments reconstruct``: a map from moments, if they determine one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from cryorecon.cli.abinitio_options import Config, Contrast, Overwrite, Seed, Settings
from cryorecon.cli.console import (
    console,
    error_console,
    prepare_folder,
    usable_device,
)

VolumeOption = Annotated[
    Literal["beads", "grid", "rmfn", "fouriernet"],
    typer.Option(help="Gaussians, positive voxels, residual MFN, or the paper's network."),
]
ViewsOption = Annotated[
    Literal["harmonics", "free"],
    typer.Option(help="Density of viewing directions: smooth, or a weight for each."),
]
Radius = Annotated[int, typer.Option(min=3, help="Largest radius fitted, cycles per particle box.")]
Starts = Annotated[int, typer.Option(min=2, help="Random starts, compared at the end.")]
Reference = Annotated[
    Path | None, typer.Option(help="Map to align the result to; it plays no other part.")
]
Ambiguous = Annotated[
    bool, typer.Option("--allow-ambiguous", help="Write the best map even if starts disagree.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ... or auto.")]


def reconstruct_command(
    moments: Annotated[Path, typer.Argument(help="From `moments estimate` (.h5), steerable.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Job folder.")],
    volume: VolumeOption = "beads",
    views: ViewsOption = "harmonics",
    radius: Radius = 8,
    starts: Starts = 6,
    reference: Reference = None,
    allow_ambiguous: Ambiguous = False,
    device: Device = "cpu",
    seed: Seed = 0,
    settings: Settings = None,
    config: Config = None,
    overwrite: Overwrite = False,
) -> None:
    """Fit a map and a density of views to the moments, from several random starts.

    The map counts only as far as starts that fit the moments equally well agree. If they disagree
    within the radii that were fitted, no map is written and the status is 1. The hand is unknown.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.engines.moment_fit import MomentFitConfig
    from cryorecon.run.moment_reconstruct import MomentReconstructOptions, reconstruct_moments
    from cryorecon.run.settings import with_settings

    plain = MomentFitConfig(volume=volume, density=views, radius=radius, starts=starts)
    engine = with_settings(plain, config, settings or [])
    options = MomentReconstructOptions(
        engine, reference, allow_ambiguous, seed, usable_device(device)
    )
    prepare_folder(output, overwrite)
    reconstruct_moments(moments, output, options, console)


def moments_command(
    particles: Path,
    output: Path,
    *,
    diameter: float | None,
    contrast: Contrast,
    project: Path | None,
    seed: int,
    settings: list[str] | None,
    config: Path | None,
    overwrite: bool,
    allow_ambiguous: bool,
    starts: int = 6,
) -> None:
    """Both steps, `moments estimate` and `moments reconstruct`, in one folder."""
    # torch takes seconds to load: only when the command runs.
    from cryorecon.engines.moment_fit import MomentFitConfig
    from cryorecon.run.moment_reconstruct import MomentReconstructOptions, abinitio_moments
    from cryorecon.run.moments import MomentsOptions, StoppedError
    from cryorecon.run.settings import with_settings

    if starts < 2:
        raise typer.BadParameter("engine moments compares starts: give --starts 2 or more")
    engine = with_settings(MomentFitConfig(starts=starts), config, settings or [])
    prepare_folder(output, overwrite)
    wanted = MomentsOptions(diameter_angst=diameter, contrast=contrast, project=project)
    options = MomentReconstructOptions(engine, None, allow_ambiguous, seed)
    try:
        abinitio_moments(particles, output, wanted, options, console)
    except StoppedError as stop:
        words = ["cryorecon", "moments", "estimate", particles, "-o", output / "moments.h5"]
        words += [] if diameter is None else ["--diameter", diameter]
        words += [] if project is None else ["--project", project]
        first = shlex.join(map(str, [*words, "--contrast", contrast, "--continue"]))
        words = ["cryorecon", "moments", "reconstruct", output / "moments.h5", "-o", output]
        words += [f"--set={pair}" for pair in settings or []]
        words += ["--allow-ambiguous"] if allow_ambiguous else []
        words += ["--starts", starts, "--seed", seed, "--overwrite"]
        second = shlex.join(map(str, words))
        error_console.print(f"{stop}. Go on with:\n{first}\n{second}", markup=False)
        raise KeyboardInterrupt from stop
