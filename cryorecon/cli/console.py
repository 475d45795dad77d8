"""What every command shows and checks alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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

console = Console(highlight=False, soft_wrap=True)
error_console = Console(stderr=True, highlight=False, soft_wrap=True)


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a file, and a folder that holds something, unless told to overwrite.

    Raises
    ------
    CryoreconError
        Naming the folder and the flag.
    """
    if folder.is_file():
        raise CryoreconError(f"{folder} is a file", "Give a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CryoreconError(f"{folder} is not empty", "Choose another folder or add --overwrite")


def usable_device(name: str) -> str:
    """A torch device by name; auto is a GPU where there is one.

    Raises
    ------
    CryoreconError
        If it cannot be used.
    """
    # torch takes seconds to load: only when a command runs.
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise CryoreconError(f"--device {name} cannot be used: {error}", "Give cpu") from error
    return name


@contextmanager
def count_progress(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar driven by calls of (done, total); nothing where the output is no terminal."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=error_console,
        disable=not error_console.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
