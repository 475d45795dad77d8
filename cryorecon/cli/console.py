"""What every command shows and checks alike."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cryorecon.errors import CryoreconError
from cryorecon.io.files import JOB_LOCK, METHODS_LOCK, locked

if TYPE_CHECKING:
    from cryorecon.ranks import Ranks

# What RELION itself puts into a job's folder before the command runs.
_RELION_FILES = frozenset(
    (
        *("job.star", "job_pipeline.star", "default_pipeline.star", "continue_job.star"),
        *("note.txt", "run.out", "run.err", "run.job", "run_submit.script"),
        "RELION_JOB_ABORT_NOW",
    )
)


class _Messages(Console):
    """Falls silent where nobody reads any more: what a command writes to files is not lost."""

    def on_broken_pipe(self) -> None:
        """Go on, where rich would end the program."""
        self.quiet = True
        let_go(self.file)


def let_go(stream: IO[str]) -> None:
    """What is still to be written goes nowhere, else Python complains at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def new_console(*, stderr: bool, kind: type[Console] = Console) -> Console:
    """Where messages go: plain text in pipes and with NO_COLOR."""
    # NO_COLOR means no escapes at all, neither colours nor bold.
    plain = bool(os.environ.get("NO_COLOR"))
    return kind(
        stderr=stderr,
        highlight=False,
        soft_wrap=True,
        color_system=None if plain else "auto",
        force_terminal=None,
    )


console = new_console(stderr=False)
error_console = new_console(stderr=True, kind=_Messages)
_messages = new_console(stderr=False, kind=_Messages)


def messages(json_wanted: bool) -> Console:
    """Where a command tells what it does: with ``--json`` stdout is kept for the object.

    Of the processes that share a job the first one tells. A command goes on when its messages
    find no reader any more.
    """
    if not is_first():
        return Console(quiet=True)
    return error_console if json_wanted else _messages


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on stdout; paths become words, NaN and infinity null.

    Of the processes that share a job the first one prints.
    """
    if not is_first():
        return
    sys.stdout.write(json.dumps(_plain(values), indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def print_job(folder: Path, json_wanted: bool) -> None:
    """The figures of a finished job, if they are asked for."""
    if json_wanted and is_first():
        from cryorecon.run.summary import job_summary

        print_json(job_summary(folder))


def process() -> int:
    """Number of this process among those that ``torchrun`` has started; 0 without it."""
    return int(os.environ["RANK"]) if in_several() else 0


def in_several() -> bool:
    """Whether ``torchrun`` has started other processes, too; clusters may set ``RANK`` alone."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process writes and tells."""
    return process() == 0


def use_threads(threads: int | None) -> None:
    """Give torch this many CPU threads; none given, as many as it takes by itself."""
    if threads is not None:
        # torch takes seconds to load: only when a command runs.
        import torch

        torch.set_num_threads(threads)


def _shows_bars(stream: TextIO) -> bool:
    """Whether a progress bar can be drawn: asked of the stream itself, whatever colours say."""
    try:
        return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    except ValueError:  # closed
        return False


def prepare_folder(folder: Path, overwrite: bool, ranks: Ranks | None = None) -> None:
    """Refuse a file, a folder in which a job works, and, unless told to overwrite, one not empty.

    What RELION puts into a new job's folder does not count. Of several processes the first one
    looks.

    Raises
    ------
    CryoreconError
        Naming the folder and the remedy.
    """
    if ranks is not None and not ranks.first:
        return
    if folder.is_file():
        raise CryoreconError(f"{folder} is a file", "Give a folder to write to")
    refuse_if_at_work(folder)
    if overwrite or not folder.is_dir():
        return
    if (folder / "job.yaml").exists() and (folder / "checkpoint.pt").exists():
        raise CryoreconError(
            f"{folder} holds a job that has not finished",
            f"Go on with `cryorecon abinitio --continue {folder}`, choose another folder or add "
            "--overwrite",
        )
    if _foreign(folder):
        raise CryoreconError(f"{folder} is not empty", "Choose another folder or add --overwrite")


def refuse_if_at_work(folder: Path) -> None:
    """Nothing of a folder may be touched while a job works there.

    Raises
    ------
    CryoreconError
        If one does.
    """
    for name in (JOB_LOCK, METHODS_LOCK):
        if (folder / name).exists():
            locked(folder, name).close()


def _foreign(folder: Path) -> bool:
    return any(path.name not in _RELION_FILES for path in folder.iterdir())


def usable_device(name: str) -> str:
    """A torch device by name; auto is a GPU where there is one.

    Raises
    ------
    CryoreconError
        If it cannot be used.
    """
    # torch takes seconds to load: only when a command runs.
    from cryorecon.run import device

    return device.usable_device(name)


class Count(Protocol):
    """How a command tells a bar of its progress; another stage may have a name and a unit."""

    def __call__(self, done: int, total: int, title: str = ..., unit: str = ...) -> None:
        """Things done, and all of them."""


@contextmanager
def count_progress(title: str, unit: str) -> Iterator[Count]:
    """A progress bar driven by calls of (done, total); nothing where the output is no terminal."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=error_console,
        disable=not (is_first() and _shows_bars(sys.stderr)),
    )
    with bar:
        task = bar.add_task(title, total=None, unit=unit)

        def update(done: int, total: int, title: str = title, unit: str = unit) -> None:
            bar.update(task, completed=done, total=total, description=title, unit=unit)

        yield update
