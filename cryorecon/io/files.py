"""Writing files so that nothing half-written is ever seen under its final name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryorecon.errors import CryoreconError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` on success, else remove it.

    Raises
    ------
    CryoreconError
        If `path` is a directory, its folder is missing, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise CryoreconError(f"{path} is a directory", "Give the name of a file to write")
    if not path.parent.is_dir():
        raise CryoreconError(f"The folder {path.parent} does not exist", "Create it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise CryoreconError(
            f"{path} could not be written: {error.strerror or error}",
            "Free some space or choose another folder; nothing was left half-written",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
