"""Moments on disk: named arrays with units in one HDF5 file, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from cryorecon import __version__
from cryorecon.errors import CryoreconError, require_file
from cryorecon.io.files import replacing

FORMAT = "cryorecon-moments"
VERSION = 1

Attribute = str | int | float | bool


@dataclass(frozen=True)
class MomentsData:
    """What a moments file holds, without knowing what it means.

    Attributes
    ----------
    attributes : dict
        Text and numbers about the whole file.
    arrays : dict of arrays
        By path inside the file, such as ``sums/second`` or ``moments/second``.
    about : dict of str
        What each array is, with its unit; arrays without an entry are described by their name.
    """

    attributes: Mapping[str, Attribute]
    arrays: Mapping[str, NDArray[Any]]
    about: Mapping[str, str] = field(default_factory=dict)

    def group(self, name: str) -> dict[str, NDArray[Any]]:
        """Arrays below one path, by the rest of their name."""
        start = name + "/"
        return {k[len(start) :]: v for k, v in self.arrays.items() if k.startswith(start)}


def write_moments(path: str | Path, data: MomentsData) -> None:
    """Write a moments file under a temporary name and rename it.

    Raises
    ------
    CryoreconError
        If it cannot be written.
    """
    with replacing(path) as temporary, _written(temporary) as file:
        program = f"cryorecon {__version__}"
        own: dict[str, Attribute] = {"format": FORMAT, "version": VERSION, "program": program}
        for key, value in {**own, **data.attributes}.items():
            file.attrs[key] = _fixed(value)
        for name, array in data.arrays.items():
            dataset = file.create_dataset(name, data=array)
            dataset.attrs["about"] = _fixed(data.about.get(name, name))


@contextmanager
def _written(path: Path) -> Iterator[Any]:
    """An HDF5 file to fill; an error of the disk is raised once the library has closed it.

    Met by the library itself it would end the program, when it tries the same again at exit.
    """
    with _Sink(path, "w+") as sink:
        try:
            with h5py.File(sink, "w") as file:
                yield file
        finally:
            if sink.failed is not None:
                raise sink.failed


class _Sink(FileIO):
    """A file that says of all it is given that it was written, and remembers what failed."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        """All of `data`, unless something has failed before."""
        rest = memoryview(data).cast("B")
        length = len(rest)
        try:
            while len(rest) > 0 and self.failed is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failed = error
        return length

    def truncate(self, size: int | None = None) -> int:
        """To `size` bytes, unless something has failed before."""
        try:
            return super().truncate(size) if self.failed is None else size or 0
        except OSError as error:
            self.failed = error
            return size or 0


def read_moments_data(path: str | Path) -> MomentsData:
    """Read a moments file.

    Raises
    ------
    CryoreconError
        If it is no HDF5 file, is damaged, is not of this program or is of a newer version.
    """
    path = require_file(path, "moments file")
    remedy = "Give a file that `cryorecon moments estimate` wrote"
    try:
        with h5py.File(path, "r") as file:
            if _text(file.attrs.get("format")) != FORMAT:
                raise CryoreconError(f"{path} is an HDF5 file but holds no moments", remedy)
            version = int(file.attrs.get("version", 0))
            if version != VERSION:
                raise CryoreconError(
                    f"{path} is a moments file of version {version}; this program knows {VERSION}",
                    "Estimate the moments again or use the program that wrote it",
                )
            attributes = {key: _plain(value) for key, value in file.attrs.items()}
            arrays: dict[str, NDArray[Any]] = {}
            about: dict[str, str] = {}

            def visit(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset):
                    _require_inside(path, name, item)
                    arrays[name] = np.asarray(item[()])
                    about[name] = _text(item.attrs.get("about"))

            file.visititems(visit)
    except CryoreconError:
        raise
    except Exception as error:
        # Damage shows as exceptions of many kinds, with lines of the library's own.
        reason = (str(error).strip().splitlines() or ["damaged"])[0]
        raise CryoreconError(
            f"{path} cannot be read as a moments file ({reason})", remedy
        ) from error
    return MomentsData(attributes, arrays, about)


def _require_inside(path: Path, name: str, item: h5py.Dataset) -> None:
    """Refuse arrays that are no numbers, lie in other files, or are larger than this one."""
    elsewhere = bool(item.external) or item.is_virtual
    if elsewhere or item.dtype.kind not in "fciub" or item.nbytes > path.stat().st_size:
        raise CryoreconError(
            f"{path}: {name} is no array of numbers within the file",
            "Give a file that `cryorecon moments estimate` wrote, as it is",
        )


def _fixed(value: Attribute) -> Any:
    """Text of fixed length: in a damaged heap of other texts the library goes round in circles."""
    return np.bytes_(value.encode() or b"\0") if isinstance(value, str) else value


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> Attribute:
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, (int, float, bool)) else _text(value)
