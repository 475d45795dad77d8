"""``cryorecon moments reconstruct``: a map from moments, if they determine one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cryorecon.cli.abinitio_options import Ambiguous, Continue
from cryorecon.cli.command import COMPUTE, EXPERT, INPUT, examples
from cryorecon.cli.console import (
    messages,
    prepare_folder,
    print_job,
    print_json,
    usable_device,
    use_threads,
)
from cryorecon.cli.options import (
    Config,
    Contrast,
    Device,
    Job,
    Json,
    Overwrite,
    Seed,
    Settings,
    Threads,
    argument,
    option,
)

# As in MomentFitConfig, which takes seconds to load.
STARTS = 4

EXAMPLES = examples(
    ("a map from moments", "cryorecon moments reconstruct moments.h5 -o job001"),
    (
        "more starts, and the result turned onto a known map",
        "cryorecon moments reconstruct moments.h5 -o job002 --starts 12 --reference known.mrc",
    ),
    (
        "moments or search: what a fit from a known map holds, beside random starts",
        "cryorecon moments reconstruct moments.h5 -o job004 --start-map known.mrc",
    ),
    (
        "the best map even if the moments do not determine it",
        "cryorecon moments reconstruct moments.h5 -o job003 --allow-ambiguous",
    ),
)


def reconstruct_command(
    moments: Annotated[
        Path, argument("Moments (.h5) of moments estimate, either form.", "MOMENTS")
    ],
    output: Job,
    volume: Annotated[
        Literal["beads", "grid", "rmfn", "fouriernet"],
        option(EXPERT, "What holds the map: Gaussians, positive voxels or a network."),
    ] = "beads",
    views: Annotated[
        Literal["harmonics", "free", "encoder"],
        option(EXPERT, "Density of views: smooth, a weight for each, or a network of the moments."),
    ] = "harmonics",
    max_radius: Annotated[
        int,
        option(
            COMPUTE,
            "Largest Fourier radius fitted [cycles per 1.25 diameters].",
            metavar="N",
            min=3,
        ),
    ] = 8,
    starts: Annotated[
        int,
        option(COMPUTE, "Random starts, compared at the end; 2 or more.", metavar="N", min=0),
    ] = STARTS,
    reference: Annotated[
        Path | None,
        option(INPUT, "MRC map to turn the result onto; it plays no other part.", metavar="FILE"),
    ] = None,
    start_map: Annotated[
        Path | None,
        option(
            EXPERT,
            "MRC map to fit from as well, to tell moments from search; the result is as without.",
            metavar="FILE",
        ),
    ] = None,
    start_blur: Annotated[
        float,
        option(
            EXPERT,
            "Low-pass the start map to this resolution first [A]; 0: not.",
            metavar="A",
            min=0,
        ),
    ] = 0.0,
    allow_ambiguous: Ambiguous = False,
    device: Device = "cpu",
    seed: Seed = 0,
    threads: Threads = None,
    settings: Settings = None,
    config: Config = None,
    json: Json = False,
    overwrite: Overwrite = False,
    continue_job: Continue = None,
) -> None:
    """Fit a low-resolution map and a density of views to moments, from several starts.

    The map counts only as far as starts that fit the moments equally well agree. If they disagree
    within the radii that were fitted, no map is written and the status is 1. The hand is unknown.
    """
    del continue_job  # Then another function runs instead.
    # torch takes seconds to load: only when the command runs.
    from cryorecon.engines.moments.config import MomentFitConfig
    from cryorecon.ranks import joined
    from cryorecon.run.moments.reconstruct import MomentReconstructOptions, reconstruct_moments
    from cryorecon.run.moments.start_map import StartMap
    from cryorecon.run.settings import with_settings

    use_threads(threads)
    if starts == 1 or (starts == 0 and start_map is None):
        raise typer.BadParameter("give --starts 2 or more, or 0 with --start-map")
    if start_blur > 0 and start_map is None:
        raise typer.BadParameter("--start-blur needs --start-map")
    near = None if start_map is None else StartMap(start_map, start_blur)
    plain = MomentFitConfig(volume=volume, density=views, radius=max_radius, starts=starts)
    engine = with_settings(plain, config, settings or [])
    options = MomentReconstructOptions(
        engine, reference, near, allow_ambiguous, seed, usable_device(device)
    )
    with joined() as ranks:
        prepare_folder(output, overwrite, ranks)
        reconstruct_moments(moments, output, options, messages(json), ranks=ranks)
    print_job(output, json)


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
    threads: int | None,
    json: bool,
    starts: int = STARTS,
    device: str = "cpu",
    dry_run: bool = False,
) -> None:
    """Both steps, `moments estimate` and `moments reconstruct`, in one folder."""
    # torch takes seconds to load: only when the command runs.
    from cryorecon.engines.moments.config import MomentFitConfig
    from cryorecon.ranks import joined
    from cryorecon.run.dry_run import describe_moments
    from cryorecon.run.moments.estimate import MomentsOptions
    from cryorecon.run.moments.reconstruct import MomentReconstructOptions, abinitio_moments
    from cryorecon.run.settings import with_settings

    use_threads(threads)
    if starts < 2:
        raise typer.BadParameter("engine moments compares starts: give --starts 2 or more")
    engine = with_settings(MomentFitConfig(starts=starts), config, settings or [])
    place = usable_device(device)
    wanted = MomentsOptions(
        diameter_angst=diameter, contrast=contrast, project=project, device=place
    )
    options = MomentReconstructOptions(engine, None, None, allow_ambiguous, seed, place)
    if dry_run:
        prepare_folder(output, overwrite)
        estimate = describe_moments(particles, wanted, options, messages(json))
        if json:
            print_json({"engine": "moments", **estimate})
        return
    with joined() as ranks:
        prepare_folder(output, overwrite, ranks)
        abinitio_moments(particles, output, wanted, options, messages(json), ranks=ranks)
    print_job(output, json)
