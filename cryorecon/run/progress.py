"""The progress bar of a job's stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Update(Protocol):
    """How a stage tells the bar of its progress."""

    def __call__(self, done: int, note: str = "") -> None:
        """Images done, and a word on the state."""


def _draws(console: Console) -> bool:
    """Whether the output is a terminal, which FORCE_COLOR does not make it."""
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


@contextmanager
def stage_bar(console: Console, title: str, total: int, unit: str = "images") -> Iterator[Update]:
    """A bar with rate, time left and a note; nothing where the output is no terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not _draws(console)
    ) as progress:
        task = progress.add_task(title, total=total, rate="", note="")

        def update(done: int, note: str = "") -> None:
            seconds = progress.tasks[0].elapsed or 1e-9
            progress.update(task, completed=done, rate=f"{done / seconds:.0f} {unit}/s", note=note)

        yield update
