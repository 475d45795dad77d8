"""``cryorecon moments``: first and second moments of a particle stack."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cryorecon.cli.abinitio_options import Contrast, Diameter, Project
from cryorecon.cli.console import console, count_progress, error_console, usable_device
from cryorecon.cli.moments_reconstruct import reconstruct_command
from cryorecon.errors import CryoreconError

if TYPE_CHECKING:
    from cryorecon.engines.moments import Moments

moments_app = typer.Typer(
    help="Moments of a particle stack: averages over all views, without poses.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
moments_app.command("reconstruct")(reconstruct_command)


@moments_app.command("estimate")
def estimate_command(
    particles: Annotated[
        Path, typer.Argument(help="Particle STAR file (RELION 3.0, 3.1, 5) or cryoSPARC .cs file.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write (.h5).")],
    form: Annotated[
        Literal["steerable", "full"],
        typer.Option(help="In-plane averaged blocks of angular order, or all Fourier pixels."),
    ] = "steerable",
    diameter: Diameter = None,
    max_radius: Annotated[
        int | None,
        typer.Option(min=1, help="Cycles per particle box (full: per image); default 16."),
    ] = None,
    resolution: Annotated[
        float | None, typer.Option(min=0.1, help="A, in place of --max-radius.")
    ] = None,
    max_order: Annotated[
        int | None, typer.Option(min=0, help="Angular order; default what the diameter needs.")
    ] = None,
    noise_std: Annotated[
        float | None,
        typer.Option(min=0, help="Of white noise, in the file's units; images as they are."),
    ] = None,
    ctf: Annotated[bool, typer.Option(help="Correct for the CTF.")] = True,
    contrast: Contrast = "auto",
    project: Project = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ... or auto.")] = "cpu",
    checkpoint: Annotated[
        int, typer.Option(min=1, help="Images between two states on disk.")
    ] = 20_000,
    resume: Annotated[
        bool, typer.Option("--continue", help="Go on after an interruption.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Moments of the Fourier images: noise subtracted, CTF divided out, errors beside them.

    One pass in file order; memory does not grow with the stack. Angles of the STAR file are not
    read; origins are, where it has them, and images are centred by them.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run.moments import MomentsOptions, StoppedError, estimate_moments

    _check_output(output, overwrite)
    options = MomentsOptions(
        form=form,
        diameter_angst=diameter,
        max_radius=max_radius,
        resolution_angst=resolution,
        max_order=max_order,
        noise_std=noise_std,
        ctf=ctf,
        contrast=contrast,
        project=project,
        device=usable_device(device),
        checkpoint_images=checkpoint,
    )
    try:
        with count_progress("Averaging", "images") as progress:
            result = estimate_moments(particles, output, options, resume, progress)
    except StoppedError as stop:
        again = shlex.join(["cryorecon", *(a for a in sys.argv[1:] if a != "--continue")])
        error_console.print(f"{stop}. Go on with:\n{again} --continue", markup=False)
        raise KeyboardInterrupt from stop
    _report(output, result)


@moments_app.command("merge")
def merge_command(
    first: Annotated[Path, typer.Argument(help="Moments (.h5).")],
    second: Annotated[Path, typer.Argument(help="Moments of other particles (.h5).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write (.h5).")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Moments of the images of two files together, as if estimated in one pass."""
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run.moments_store import merge_moments

    _check_output(output, overwrite)
    _report(output, merge_moments(first, second, output))


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix.lower() not in (".h5", ".hdf5"):
        raise CryoreconError(f"{output} is no name for an HDF5 file", "Let it end in .h5")
    if output.exists() and not overwrite:
        raise CryoreconError(f"{output} exists", "Choose another name or add --overwrite")
    if not output.parent.is_dir():
        raise CryoreconError(f"The folder {output.parent} does not exist", "Create it first")


def _report(output: Path, result: Moments) -> None:
    geometry = result.geometry
    side, radius = geometry.side_angst, geometry.max_radius
    console.print(f"[bold]{output}[/]  {result.n_images} images")
    what = f"orders 0 to {geometry.max_order}, " if geometry.form == "steerable" else ""
    console.print(
        f"{geometry.form}: {what}radii to {radius} cycles per {side:.1f} A ({side / radius:.1f} A)"
    )
    kept = result.measured
    power = float((result.second.abs() ** 2)[..., kept].sum())
    error = float((result.second_error**2)[..., kept].sum())
    console.print(
        f"error of the second moment: {(error / max(power, 1e-300)) ** 0.5:.3g} of its norm; "
        f"{100 * float((~kept).double().mean()):.0f} % of the pairs of radii not measured; "
        f"weights from 1 down to {float(result.conditioning.min()):.2g}"
    )
