"""``cryorecon moments``: first, second and third moments of a particle stack."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cryorecon.cli.command import COMPUTE, INPUT, MOLECULE, Command, Group, examples
from cryorecon.cli.console import (
    count_progress,
    error_console,
    is_first,
    messages,
    print_json,
    usable_device,
    use_threads,
)
from cryorecon.cli.moments_reconstruct import EXAMPLES as RECONSTRUCT_EXAMPLES
from cryorecon.cli.moments_reconstruct import reconstruct_command
from cryorecon.cli.options import (
    DIAMETER_HELP,
    Contrast,
    Device,
    DryRun,
    Json,
    NoiseStd,
    Overwrite,
    Particles,
    Project,
    Threads,
    argument,
    option,
    output,
)
from cryorecon.errors import CryoreconError
from cryorecon.io.files import refuse_to_replace, require_folders

if TYPE_CHECKING:
    from cryorecon.engines.moments.forms import Moments

MomentsFile = Annotated[Path, output("Moments file to write (.h5).", "FILE")]

moments_app = typer.Typer(
    cls=Group,
    help="Average particles over all views, without poses, and find maps from the averages.",
    short_help="Averages over all views, and maps from them",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ESTIMATE_EXAMPLES = examples(
    ("moments of a stack", "cryorecon moments estimate particles.star -o moments.h5"),
    (
        "to 15 A, of a molecule 120 A wide",
        "cryorecon moments estimate p.star -o m.h5 --diameter 120 --resolution 15",
    ),
    (
        "go on after an interruption",
        "cryorecon moments estimate particles.star -o moments.h5 --continue",
    ),
)


def estimate_command(
    particles: Particles,
    output: MomentsFile,
    form: Annotated[
        Literal["steerable", "full"],
        option(COMPUTE, "Averaged over in-plane rotations, or all pairs of Fourier pixels."),
    ] = "steerable",
    diameter: Annotated[
        float | None, option(MOLECULE, DIAMETER_HELP, metavar="A", default="80 % of the box")
    ] = None,
    max_radius: Annotated[
        int | None,
        option(
            COMPUTE,
            "Largest Fourier radius [cycles per 1.25 diameters; full form: per image].",
            metavar="N",
            min=1,
            default="16",
        ),
    ] = None,
    resolution: Annotated[
        float | None,
        option(COMPUTE, "Finest resolution [A], in place of --max-radius.", metavar="A", min=0.1),
    ] = None,
    max_order: Annotated[
        int | None,
        option(
            COMPUTE,
            "Largest angular order.",
            metavar="N",
            min=0,
            default="what the diameter needs",
            hidden=True,
        ),
    ] = None,
    third: Annotated[
        int | None,
        option(
            COMPUTE,
            "Third moments as well, of radii to N; 0: none.",
            metavar="N",
            min=0,
            max=8,
            default="6; 0 with --form full",
        ),
    ] = None,
    noise_std: NoiseStd = None,
    ctf: Annotated[bool, option(INPUT, "Correct for the CTF.")] = True,
    contrast: Contrast = "auto",
    project: Project = None,
    device: Device = "cpu",
    threads: Threads = None,
    checkpoint: Annotated[
        int,
        option(COMPUTE, "Images between two states on disk.", metavar="N", min=1, hidden=True),
    ] = 20_000,
    resume: Annotated[bool, option(INPUT, "Go on after an interruption.", "--continue")] = False,
    json: Json = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Average first, second and third moments of the images: noise and CTF out.

    One pass in file order; memory does not grow with the stack. Angles of the STAR file are not
    read; origins are, where it has them, and images are centred by them.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.ranks import ALONE, joined
    from cryorecon.run.dry_run import describe_moments
    from cryorecon.run.job import program_command
    from cryorecon.run.moments.estimate import MomentsOptions, estimate_moments, state_path
    from cryorecon.run.stopping import StoppedError

    use_threads(threads)
    if is_first():
        # What an earlier run finished is kept, and told again.
        _check_output(output, overwrite=overwrite or (resume and not state_path(output).exists()))
    options = MomentsOptions(
        form=form,
        diameter_angst=diameter,
        max_radius=max_radius,
        resolution_angst=resolution,
        max_order=max_order,
        third_radius=third,
        noise_std=noise_std,
        ctf=ctf,
        contrast=contrast,
        project=project,
        device=usable_device(device),
        checkpoint_images=checkpoint,
    )
    if dry_run:
        estimate = describe_moments(particles, options, None, messages(json))
        if json:
            print_json(estimate)
        return
    together = ALONE
    try:
        with joined() as ranks, count_progress("Averaging", "images") as progress:
            together = ranks
            finishing = partial(progress, title="Subtracting the noise", unit="shells")
            # By the console that draws the bar.
            say = partial(error_console.print, markup=False) if ranks.first else None
            result = estimate_moments(
                particles, output, options, resume, progress, finishing, ranks, say
            )
    except StoppedError as stop:
        if is_first():
            words = [word for word in sys.argv[1:] if word != "--continue"]
            again = program_command([*words, "--continue"], together)
            error_console.print(f"{stop}. Go on with:\n{again}", markup=False)
        raise KeyboardInterrupt from stop
    if is_first():
        _report(output, result, json)


MERGE_EXAMPLES = examples(
    ("of two halves of a data set", "cryorecon moments merge a.h5 b.h5 -o both.h5"),
    (
        "of a third, and over an older file",
        "cryorecon moments merge both.h5 c.h5 -o all.h5 --overwrite",
    ),
    ("how many images there are now", "cryorecon moments merge a.h5 b.h5 -o ab.h5 --json"),
)


def merge_command(
    first: Annotated[Path, argument("Moments (.h5).", "A.h5")],
    second: Annotated[Path, argument("Moments of other particles (.h5).", "B.h5")],
    output: MomentsFile,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Add the moments of two files, as if all images were averaged in one pass."""
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run.moments.store import merge_moments

    _check_output(output, first, second, overwrite=overwrite)
    _report(output, merge_moments(first, second, output), json)


moments_app.command(
    "estimate", cls=Command, epilog=ESTIMATE_EXAMPLES, short_help="Moments of a particle stack"
)(estimate_command)
moments_app.command(
    "merge", cls=Command, epilog=MERGE_EXAMPLES, short_help="Moments of two files together"
)(merge_command)
moments_app.command(
    "reconstruct",
    cls=Command,
    epilog=RECONSTRUCT_EXAMPLES,
    short_help="A low-resolution map from moments, if they determine one",
)(reconstruct_command)


def _check_output(output: Path, *inputs: Path, overwrite: bool) -> None:
    if output.suffix.lower() not in (".h5", ".hdf5"):
        raise CryoreconError(f"{output} is no name for an HDF5 file", "Let it end in .h5")
    require_folders([output])
    refuse_to_replace([output], inputs, overwrite=overwrite)


def _report(output: Path, result: Moments, json: bool) -> None:
    told = _figures(output, result)
    if json:
        print_json(told)
        return
    out = messages(json)
    geometry = result.geometry
    source = f"{result.n_images} images" if result.n_images else "exact moments"
    out.print(f"[bold]{output}[/]  {source}")
    what = f"orders 0 to {geometry.max_order}, " if geometry.form == "steerable" else ""
    out.print(
        f"{geometry.form}: {what}radii to {geometry.max_radius} cycles per "
        f"{geometry.side_angst:.1f} A ({told['resolution_angst']:.1f} A)"
    )
    out.print(
        f"error of the second moment: {told['second_relative_error']:.3g} of its norm; "
        f"{100 * told['unmeasured_fraction']:.0f} % of the pairs of radii not measured; "
        f"weights from 1 down to {told['smallest_weight']:.2g}"
    )


def _figures(output: Path, result: Moments) -> dict[str, Any]:
    geometry, kept = result.geometry, result.measured
    power = float((result.second.abs() ** 2)[..., kept].sum())
    error = float((result.second_error**2)[..., kept].sum())
    return {
        "moments": output,
        "images": result.n_images,
        "form": geometry.form,
        "max_order": geometry.max_order,
        "max_radius": geometry.max_radius,
        "side_angst": geometry.side_angst,
        "resolution_angst": geometry.side_angst / geometry.max_radius,
        "second_relative_error": (error / max(power, 1e-300)) ** 0.5,
        "unmeasured_fraction": float((~kept).double().mean()),
        "smallest_weight": float(result.conditioning.min()),
    }
