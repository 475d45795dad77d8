"""The ``cryorecon`` command: registers the subcommands and turns errors into two sentences."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from cryorecon import __version__
from cryorecon.cli import (
    abinitio,
    abinitio_amortized,
    abinitio_rmfn,
    compare_poses,
    consensus,
    demo,
    export,
    fit_image,
    fsc,
    import_particles,
    reconstruct,
    report,
    simulate,
)
from cryorecon.cli.command import (
    CONVERT,
    INSPECT,
    METHODS,
    SOLVE,
    START,
    Command,
    Group,
    write_commands,
)
from cryorecon.cli.console import (
    error_console,
    in_several,
    is_first,
    let_go,
    process,
    refuse_if_at_work,
)
from cryorecon.cli.moments import moments_app
from cryorecon.cli.mra import mra_app
from cryorecon.errors import CryoreconError, LostRankError

ABOUT = "From a RELION particle stack to a first 3-D map: poses, half maps and an honest FSC."

app = typer.Typer(
    name="cryorecon",
    cls=Group,
    help=ABOUT,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _add(panel: str, name: str, short: str, function: Callable[..., None], examples: str) -> None:
    """Register a command in its group of the overview."""
    more: dict[str, Any] = {"epilog": examples, "short_help": short, "rich_help_panel": panel}
    app.command(name, cls=Command, **more)(function)


_add(
    START, "demo", "A simulated protein, its map, and how true it is",
    demo.demo_command, demo.EXAMPLES,
)  # fmt: skip
_add(
    START, "simulate", "Particles of a PDB, mmCIF or MRC file, with known poses",
    simulate.simulate_command, simulate.EXAMPLES,
)  # fmt: skip
_add(
    SOLVE, "abinitio", "A map and poses of your particles, with any engine",
    abinitio.abinitio_command, abinitio.EXAMPLES,
)  # fmt: skip
_add(
    SOLVE, "abinitio-rmfn", "The same by search and refinement (the default)",
    abinitio_rmfn.abinitio_rmfn_command, abinitio_rmfn.EXAMPLES,
)  # fmt: skip
_add(
    SOLVE, "abinitio-amortized", "The same by an encoder that learns to read poses",
    abinitio_amortized.abinitio_amortized_command, abinitio_amortized.EXAMPLES,
)  # fmt: skip
_add(
    INSPECT, "report", "What a job found and what to doubt, as a page to look at",
    report.report_command, report.EXAMPLES,
)  # fmt: skip
_add(
    INSPECT, "fsc", "How far two maps agree, and to which resolution",
    fsc.fsc, fsc.EXAMPLES,
)  # fmt: skip
_add(
    INSPECT, "compare-poses", "How far the poses of two files agree",
    compare_poses.compare_poses, compare_poses.EXAMPLES,
)  # fmt: skip
_add(
    INSPECT, "consensus", "On what several jobs, or all engines, agree",
    consensus.consensus_command, consensus.EXAMPLES,
)  # fmt: skip
_add(
    CONVERT, "reconstruct", "A map from particles with known poses",
    reconstruct.reconstruct_command, reconstruct.EXAMPLES,
)  # fmt: skip
_add(
    CONVERT, "export", "To RELION, cryoSPARC, cryoDRGN, ChimeraX; edits of maps",
    export.export_command, export.EXAMPLES,
)  # fmt: skip
_add(
    CONVERT, "import", "Stacks with the pickles of cryoDRGN; its poses into STAR files",
    import_particles.import_command, import_particles.EXAMPLES,
)  # fmt: skip
app.add_typer(moments_app, name="moments", rich_help_panel=METHODS)
app.add_typer(mra_app, name="mra", rich_help_panel=METHODS)
_add(
    METHODS, "fit-image", "Filter networks on pictures, coarse to fine",
    fit_image.fit_image_command, fit_image.EXAMPLES,
)  # fmt: skip


def _version(show: bool) -> None:
    if show:
        typer.echo(f"cryorecon {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[  # noqa: ARG001
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(_overview(ctx))


def _overview(ctx: Any) -> str:
    """What there is to do, on one screen."""
    formatter = ctx.make_formatter()
    formatter.write(f"cryorecon {__version__}\n{ABOUT}\n")
    write_commands(ctx.command, ctx, formatter)
    formatter.write_paragraph()
    formatter.write(
        "cryorecon abinitio particles.star -o job001   a first map of your particles\n"
        "cryorecon COMMAND --help                      options and examples\n"
    )
    return str(formatter.getvalue().rstrip("\n"))


# Typer's exit status when a command is interrupted from the keyboard.
# What torch says where memory ends.
_NO_MEMORY = ("allocate memory", "out of memory")
_INTERRUPTED = 130
# How long other processes wait with an error of theirs.
_AFTER_THE_FIRST_S = 2.0
_RELION_MARKERS = {
    1: "RELION_JOB_EXIT_FAILURE",
    2: "RELION_JOB_EXIT_FAILURE",
    3: "RELION_JOB_EXIT_ABORTED",
}


def main() -> None:
    """Run the command line; exit status 0 done, 1 failed, 2 wrong usage, 3 interrupted."""
    # Threads of torch's OpenMP spin between loops: two jobs on one machine would hold each other
    # up for many times their own length. torch is not loaded before a command runs.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Where the caller has closed them, as some daemons do, there are none.
    streams = (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in streams)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A path that the terminal's encoding lacks is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with _ending_well():
        status = _run(sys.argv[1:])
    _tell_relion(sys.argv[1:], status)
    if status == 0 and "torch.distributed" in sys.modules and in_several():
        # Threads of torch's that outlive the group would abort a process whose work is done.
        _flushed()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def _ending_well() -> Iterator[None]:
    """Take SIGTERM, by which batch queues end jobs, as Ctrl-C: what was begun is cleared away."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    free = threading.current_thread() is threading.main_thread()
    if not free or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# What several processes may share.
_SHARED = (
    *(["abinitio"], ["abinitio-rmfn"], ["abinitio-amortized"]),
    *(["moments", "estimate"], ["moments", "reconstruct"]),
)


def _refuse_in_several(words: list[str]) -> None:
    """Commands of one process, as ``torchrun`` begins them."""
    if not in_several():
        return
    shared = any(words[: len(names)] == names for names in _SHARED)
    # RELION spells options with underscores.
    plain = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    pairs = {*plain, *map("=".join, pairwise(plain))}
    if not shared or pairs & {"--dry-run", "--method=all", "--init=perturbed"}:
        raise CryoreconError(
            f"cryorecon {shlex.join(words)} runs in one process", "Leave torchrun out"
        )


def _run(words: list[str]) -> int:
    try:
        _refuse_in_several(words)
        app(prog_name="cryorecon")
        sys.stdout.flush()
    except LostRankError as error:
        # At once: torchrun ends those that are left.
        _say_error(f"Error: {error}", after_s=0.0)
        return 1
    except CryoreconError as error:
        _say_error(f"Error: {error}")
        return 1
    except BrokenPipeError:
        return _reader_left()
    except (MemoryError, RuntimeError) as error:
        # torch has no type of its own for it on the CPU; a GPU's says what it tried to allocate.
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in _NO_MEMORY):
            raise
        _say_error(
            "Error: There is not enough memory. Use a smaller box or a larger machine; after "
            "--device cuda, --device cpu."
        )
        return 1
    except OSError as error:
        _say_error(f"Error: {error}. Check the disk and the folder's permissions.")
        return 1
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            return _interrupted()
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return code if _flushed() else _reader_left()
    return 0


def _interrupted() -> int:
    if is_first():
        error_console.print("Interrupted.", style="bold red")
    return 3


def _say_error(words: str, after_s: float = _AFTER_THE_FIRST_S) -> None:
    if not is_first():
        # What the first process meets as well it says; torchrun then ends the others.
        try:
            time.sleep(after_s)
        except KeyboardInterrupt:
            return
        words = f"rank {process()}: {words}"
    error_console.print(words, style="bold red", markup=False)


def _flushed() -> bool:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return False
    return True


def _reader_left() -> int:
    """Whoever read the output, such as ``head``, has stopped: end without a word."""
    let_go(sys.stdout)
    return 1


def _tell_relion(words: list[str], status: int) -> None:
    """Leave RELION's marker for a job that failed before it began; RELION would wait for ever."""
    if status not in _RELION_MARKERS or "--o" not in words[:-1]:
        return
    folder = Path(words[words.index("--o") + 1])
    if not folder.is_dir() or any(folder.glob("RELION_JOB_EXIT_*")):
        return
    try:
        refuse_if_at_work(folder)
    except CryoreconError:
        return  # RELION waits for the job that works there.
    except OSError:
        pass  # Nobody knows; if it is a full disk, there is no room for a marker either.
    with contextlib.suppress(OSError):
        (folder / _RELION_MARKERS[status]).touch()
