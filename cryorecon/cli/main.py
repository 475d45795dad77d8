"""The ``cryorecon`` command: registers the subcommands and turns errors into two sentences."""

from __future__ import annotations

import os
import sys

import typer

from cryorecon import __version__
from cryorecon.cli.abinitio import abinitio_command
from cryorecon.cli.abinitio_amortized import abinitio_amortized_command
from cryorecon.cli.abinitio_rmfn import abinitio_rmfn_command
from cryorecon.cli.compare_poses import compare_poses
from cryorecon.cli.console import error_console
from cryorecon.cli.demo import demo_command
from cryorecon.cli.export import export_command
from cryorecon.cli.fit_image import fit_image_command
from cryorecon.cli.fsc import fsc
from cryorecon.cli.moments import moments_app
from cryorecon.cli.mra import mra_app
from cryorecon.cli.reconstruct import reconstruct_command
from cryorecon.cli.simulate import simulate_command
from cryorecon.errors import CryoreconError

app = typer.Typer(
    name="cryorecon",
    help="From a RELION particle stack to a first 3-D map: poses, half maps and an honest FSC.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("simulate")(simulate_command)
app.command("abinitio")(abinitio_command)
app.command("abinitio-rmfn")(abinitio_rmfn_command)
app.command("abinitio-amortized")(abinitio_amortized_command)
app.command("reconstruct")(reconstruct_command)
app.command("export")(export_command)
app.command("fsc")(fsc)
app.command("compare-poses")(compare_poses)
app.command("fit-image")(fit_image_command)
app.add_typer(moments_app, name="moments")
app.command("demo")(demo_command)
app.add_typer(mra_app)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"cryorecon {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True),
) -> None:
    pass


# Typer's exit status when a command is interrupted from the keyboard.
_INTERRUPTED = 130


def main() -> None:
    """Run the command line; user errors exit with status 1, interruption with 3."""
    # Threads of torch's OpenMP spin between loops: two jobs on one machine would hold each other
    # up for many times their own length. torch is not loaded before a command runs.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except CryoreconError as error:
        error_console.print(f"Error: {error}", style="bold red", markup=False)
        sys.exit(1)
    except OSError as error:
        error_console.print(
            f"Error: {error}. Check the disk and the folder's permissions.",
            style="bold red",
            markup=False,
        )
        sys.exit(1)
    except SystemExit as stop:
        if stop.code != _INTERRUPTED:
            raise
        error_console.print("Interrupted.", style="bold red")
        sys.exit(3)
