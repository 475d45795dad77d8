"""Writing files: nothing half-written under its final name, one program at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from cryorecon.errors import CryoreconError


def sha256_of(path: Path) -> str:
    """SHA-256 of a file of any length, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises
    ------
    CryoreconError
        If that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CryoreconError(
            f"The folder {folder} cannot be made: {_reason(error)}", "Choose another folder"
        ) from error


# Links that lead from one to the next, at most.
_MOST_LINKS = 40
# What a job, or all engines in turn, hold while they work in a folder.
JOB_LOCK, METHODS_LOCK = "run.log", "methods.lock"
# What every engine of `--method all` was told.
METHODS_PLAN = "methods.yaml"


def locked(folder: Path, name: str) -> TextIO:
    """A file, open to add to, which one process holds: two would write into each other's files.

    Raises
    ------
    CryoreconError
        If another one holds it.
    """
    make_folder(folder)
    file = (folder / name).open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise CryoreconError(
            f"Another job is at work in {folder}", "Wait for it or choose another folder"
        ) from error
    except OSError:
        pass  # Some network disks cannot lock.
    return file


def _reason(error: OSError) -> str:
    # HDF5 fills its text with lines of its own.
    return os.strerror(error.errno) if error.errno else str(error).splitlines()[0]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` on success, else remove it.

    What was written is on the disk before it takes the name, so that a power cut leaves either the
    old file or the new one. A link stays, and what it points to is replaced; a pipe or a device
    gets what was written.

    Raises
    ------
    CryoreconError
        If `path` is a directory, its folder is missing, or the disk is full.
    """
    if _is_special(Path(path)):
        yield from _poured(Path(path))
        return
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise CryoreconError(f"{path} is a directory", "Give the name of a file to write")
    if not path.parent.is_dir():
        raise CryoreconError(
            f"The folder {path.parent} does not exist",
            "Create it first; a job whose folder was moved goes on with --continue",
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _on_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Free some space or choose another folder" if full else "Choose another folder"
        raise CryoreconError(
            f"{path} could not be written: {_reason(error)}",
            f"{remedy}; nothing was left half-written",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """Whether a pipe, a device, or what this process has open, has this name."""
    other = path.exists() and not path.is_file() and not path.is_dir()
    return other or _descriptor(path) is not None


def _descriptor(path: Path) -> int | None:
    """The open stream that a name such as /dev/stdout or /dev/fd/9 leads to, if any."""
    own = f"/proc/{os.getpid()}/fd"
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(path.parent)
        if folder == own and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(folder) / path.readlink()
    return None


def _poured(path: Path) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        temporary = Path(folder) / path.name
        yield temporary
        stream = _descriptor(path)
        try:
            # What was printed before comes first, and what will be goes on behind it.
            sys.stdout.flush()
            place = path if stream is None else os.dup(stream)
            with temporary.open("rb") as source, open(place, "wb") as sink:
                shutil.copyfileobj(source, sink)
        except OSError as error:
            raise CryoreconError(
                f"{path} could not be written: {_reason(error)}", "Give the name of a file"
            ) from error


def require_folders(outputs: Iterable[Path | None]) -> None:
    """Stop a command before it works for files that it has no folder to put into.

    Raises
    ------
    CryoreconError
    """
    for output in outputs:
        if output is None or _is_special(output):
            continue
        if not output.parent.is_dir():
            raise CryoreconError(f"The folder {output.parent} does not exist", "Create it first")
        if not os.access(output.parent, os.W_OK):
            raise CryoreconError(
                f"The folder {output.parent} cannot be written to", "Choose another folder"
            )


def refuse_to_replace(
    outputs: Iterable[Path | None], inputs: Iterable[Path | None], *, overwrite: bool = True
) -> None:
    """Stop a command before it writes over what it reads, whatever the two are called.

    And two things into one file, and over what else is there, unless that was asked for.

    Raises
    ------
    CryoreconError
    """
    read = [path for path in inputs if path is not None and path.exists()]
    taken: set[str] = set()
    for output in outputs:
        if output is None:
            continue
        place = os.path.realpath(output)
        if place in taken and not _is_special(output):
            raise CryoreconError(f"{output} is named for two outputs", "Give each its own name")
        taken.add(place)
        if not output.exists():
            continue
        if any(output.samefile(path) for path in read):
            raise CryoreconError(
                f"{output} is what this command reads, and would be written over",
                "Choose another name",
            )
        if not overwrite and not _is_special(output):
            raise CryoreconError(f"{output} exists", "Choose another name or add --overwrite")


def _on_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path, names: str = "*") -> None:
    """Remove what processes that were killed had written of files that nobody else writes now.

    Parameters
    ----------
    names : str
        Pattern of the files' own names.
    """
    for left in folder.glob(f".{names}.[0-9]*.tmp"):
        left.unlink(missing_ok=True)
