"""MRC maps and particle stacks: modes 0, 1, 2, 6 and 12, both byte orders, memory-mapped."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from numpy.typing import NDArray

from cryorecon.errors import CryoreconError, require_file
from cryorecon.io.files import replacing

_HEADER_BYTES = 1024
# Reading on is faster than beginning anew behind a gap of this size.
_GAP_BYTES = 1 << 16
_PIECE_BYTES = 1 << 18
# Far from where sums of squares overflow, and from any map.
_LARGEST_VOXEL = 1e12
# Far from what float32 holds, and from any image.
_LARGEST_SUM_OF_SQUARES = 1e30
_VOXEL_ANGST = (0.01, 1000.0)
_VOXEL_TOLERANCE = 0.01
_MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}


@dataclass(frozen=True)
class Map:
    """A density map.

    Attributes
    ----------
    data : array, shape (N, N, N), float32
        Indexed [z, y, x].
    pixel_size_angst : float
    """

    data: NDArray[np.float32]
    pixel_size_angst: float


@dataclass(frozen=True)
class Header:
    """What cryorecon needs of an MRC header.

    Attributes
    ----------
    shape : tuple of int
        (sections, rows, columns).
    dtype : numpy dtype with byte order
    offset : int
        Bytes before the data.
    pixel_size_angst : float
        Along x; 0 when the header does not say.
    voxel_angst : tuple of float
        Along x, y and z; 0 where the header does not say.
    axes : tuple of int
        Which of x, y, z (1, 2, 3) run along columns, rows and sections, as the header has them.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[np.generic]
    offset: int
    pixel_size_angst: float
    voxel_angst: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axes: tuple[int, int, int] = (1, 2, 3)


def read_header(path: str | Path) -> Header:
    """Read and check the header of an MRC file.

    RELION leaves version, mz and cella.z empty in stacks, so only what is used is checked.

    Raises
    ------
    CryoreconError
        If the file is missing, is no MRC file, or is shorter than its header says.
    """
    path = require_file(path, "MRC file")
    try:
        with path.open("rb") as file:
            raw = file.read(_HEADER_BYTES)
    except OSError as error:
        raise CryoreconError(
            f"{path} cannot be read: {error.strerror}", "Check its permissions"
        ) from error
    no_mrc = CryoreconError(
        f"{path} is not an MRC file that cryorecon can read",
        "Give an uncompressed MRC file of mode 0, 1, 2, 6 or 12",
    )
    if len(raw) < _HEADER_BYTES:
        raise no_mrc
    for order in ("<", ">"):
        header = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
        nx, ny, nz, mode = (int(header[k]) for k in ("nx", "ny", "nz", "mode"))
        extended = int(header["nsymbt"])
        if mode in _MODES and min(nx, ny, nz) > 0 and max(nx, ny) < 2**20 and extended >= 0:
            break
    else:
        raise no_mrc
    dtype = np.dtype(_MODES[mode]).newbyteorder(order)
    expected = _HEADER_BYTES + extended + nx * ny * nz * dtype.itemsize
    found = path.stat().st_size
    if found < expected:
        raise CryoreconError(
            f"{path} is truncated: its header promises {nz} sections of {nx} x {ny} "
            f"({expected} bytes) but the file has {found} bytes",
            "Copy or write the file again",
        )
    voxel = _voxel_angst(header)
    axes = int(header["mapc"]), int(header["mapr"]), int(header["maps"])
    return Header((nz, ny, nx), dtype, _HEADER_BYTES + extended, voxel[0], voxel, axes)


def _voxel_angst(header: np.void) -> tuple[float, float, float]:
    """Voxel sizes along x, y and z, whatever the order of axes; 0 where the header has none."""
    sizes = []
    for axis in "xyz":
        cell, samples = float(header["cella"][axis]), int(header[f"m{axis}"])
        known = samples > 0 and np.isfinite(cell) and cell > 0
        # The header holds single precision: more digits would be noise.
        sizes.append(float(f"{cell / samples:.7g}") if known else 0.0)
    # One section a cell is a stack of images, whose depth means nothing.
    return sizes[0], sizes[1], sizes[2] if int(header["mz"]) > 1 else 0.0


def open_stack(path: str | Path) -> NDArray[np.generic]:
    """Memory-map a particle stack or a single image; shape (n, y, x), the file's own type."""
    header = read_header(path)
    return np.memmap(path, header.dtype, "r", header.offset, header.shape)


class StackReader:
    """Reads sections of stacks; the stack that was read last stays open.

    Of a file that stays open the kernel reads on, ahead of what it is asked for.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: RawIOBase | None = None

    def read(
        self, path: Path, header: Header, sections: NDArray[np.integer], images: NDArray[np.float32]
    ) -> None:
        """Read sections into memory, each run of neighbours at once, small gaps included.

        Nothing is mapped: reading in file order is as fast as the disk, and what was read is not
        counted as the process's memory.

        Parameters
        ----------
        path : Path
        header : Header
            Of this file.
        sections : array of int, shape (b,)
            Ascending.
        images : array, shape (b, N, N), contiguous
            Is filled.

        Raises
        ------
        CryoreconError
            If the file is gone, or has become shorter than its header said.
        """
        size = header.shape[1] * header.shape[2] * header.dtype.itemsize
        bounds = np.flatnonzero(np.diff(sections) > 1 + _GAP_BYTES // size) + 1
        try:
            file = self._opened(path)
            for start, end in pairwise([0, *bounds.tolist(), len(sections)]):
                first, last = int(sections[start]), int(sections[end - 1])
                alone = bool((np.diff(sections[start:end]) == 1).all())
                direct = alone and header.dtype == np.dtype(np.float32)
                shape = (last - first + 1, *header.shape[1:])
                raw = images[start:end] if direct else np.empty(shape, header.dtype)
                _fill(file, raw, header.offset + first * size)
                if not direct:
                    images[start:end] = raw if alone else raw[sections[start:end] - first]
        except (OSError, EOFError) as error:
            raise CryoreconError(
                f"{path} can no longer be read as it was: {error}",
                "Leave stacks alone during a job",
            ) from error

    def _opened(self, path: Path) -> RawIOBase:
        if self._file is None or path != self._path:
            self.close()
            self._path, self._file = path, open(path, "rb", buffering=0)  # noqa: SIM115
        return self._file

    def close(self) -> None:
        """Close the stack that was read last."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def __del__(self) -> None:
        self.close()


def _fill(file: RawIOBase, raw: NDArray[np.generic], offset: int) -> None:
    view, done = raw.reshape(-1).view(np.uint8).data, 0
    file.seek(offset)
    while done < len(view):
        # Asked for much at once, the kernel does not read on while it is copied.
        count = file.readinto(view[done : done + _PIECE_BYTES])
        if not count:
            raise EOFError(f"it ends {len(view) - done} bytes early")
        done += count


def _order_of_axes(path: str | Path, axes: tuple[int, int, int]) -> list[int]:
    """Which dimensions of the file, (sections, rows, columns), are z, y and x."""
    if axes == (0, 0, 0):
        axes = (1, 2, 3)
    if sorted(axes) != [1, 2, 3]:
        raise CryoreconError(
            f"{path} states axes {', '.join(map(str, axes))} of columns, rows and sections, which "
            "are not x, y and z in some order",
            "Set mapc, mapr and maps in the header, to 1, 2, 3 where columns run along x",
        )
    return [2 - axes.index(axis) for axis in (3, 2, 1)]


def _check_voxels(path: str | Path, voxel_angst: tuple[float, float, float]) -> None:
    pixel_size = voxel_angst[0]
    if pixel_size <= 0:
        raise CryoreconError(
            f"{path} does not state its voxel size", "Set the cell size in the header, in angstrom"
        )
    low, high = _VOXEL_ANGST
    if not low <= pixel_size <= high:
        raise CryoreconError(
            f"{path} states voxels of {pixel_size:g} A, not of {low:g} to {high:g} A",
            "Set the cell size in the header, in angstrom",
        )
    if any(s > 0 and abs(s / pixel_size - 1) > _VOXEL_TOLERANCE for s in voxel_angst):
        told = " x ".join(f"{s:g}" if s > 0 else "?" for s in voxel_angst)
        raise CryoreconError(
            f"{path} has voxels of {told} A (x, y, z), which are not cubes",
            "Resample it to cubic voxels, or correct the cell size in the header",
        )


def read_map(path: str | Path) -> Map:
    """Read a cubic density map, its axes in whatever order the header states.

    Raises
    ------
    CryoreconError
        If the map or its voxels are not cubic, its axes are not x, y and z, or it holds NaN,
        infinite or huge values, or names no voxel size or an impossible one.
    """
    header = read_header(path)
    order = _order_of_axes(path, header.axes)
    nz, ny, nx = (header.shape[k] for k in order)
    if not nx == ny == nz:
        raise CryoreconError(
            f"{path} is not a cubic map: it has {nx} x {ny} x {nz} voxels (x, y, z)",
            "Pad or crop it to a cube, and check that it is a map and not a particle stack",
        )
    _check_voxels(path, header.voxel_angst)
    data = np.array(open_stack(path).transpose(order), dtype=np.float32, order="C")
    bad = int((~(np.abs(data) < _LARGEST_VOXEL)).sum())
    if bad:
        raise CryoreconError(
            f"{path} holds {bad} voxels that are NaN, infinite or beyond {_LARGEST_VOXEL:g}",
            "Replace or mask them first",
        )
    return Map(data, header.pixel_size_angst)


def holds_numbers(images: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which images (b, y, x) hold no pixel that is NaN or infinite, nor too large to be squared."""
    flat = images.reshape(len(images), 1, math.prod(images.shape[1:]))
    with np.errstate(invalid="ignore", over="ignore"):
        squares = (flat @ flat.transpose(0, 2, 1))[:, 0, 0]
    return squares < _LARGEST_SUM_OF_SQUARES


def _header_bytes(
    shape: tuple[int, int, int],
    pixel_size_angst: float,
    is_volume: bool,
    stats: NDArray[np.float64],
) -> bytes:
    header = np.zeros((), HEADER_DTYPE)
    nz, ny, nx = shape
    header["nx"], header["ny"], header["nz"], header["mode"] = nx, ny, nz, 2
    header["mx"], header["my"], header["mz"] = nx, ny, nz if is_volume else 1
    depth = nz if is_volume else 1
    header["cella"] = (nx * pixel_size_angst, ny * pixel_size_angst, depth * pixel_size_angst)
    header["cellb"] = (90, 90, 90)
    header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
    header["dmin"], header["dmax"], header["dmean"], header["rms"] = stats
    header["ispg"] = 1 if is_volume else 0
    header["nversion"] = 20140
    header["map"] = b"MAP "
    header["machst"] = (0x44, 0x44, 0, 0)
    header["nlabl"] = 1
    header["label"][0] = b"cryorecon"
    return header.astype(HEADER_DTYPE.newbyteorder("<")).tobytes()


def write_map(path: str | Path, volume: NDArray[np.floating], pixel_size_angst: float) -> None:
    """Write a map as float32 with its voxel size, origin 0 and nstart 0.

    Parameters
    ----------
    volume : array, shape (N, N, N)
        Indexed [z, y, x].
    """
    data = np.ascontiguousarray(volume, dtype="<f4")
    stats = np.array([data.min(), data.max(), data.mean(), data.std()], dtype=np.float64)
    nz, ny, nx = data.shape
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(_header_bytes((nz, ny, nx), pixel_size_angst, True, stats))
        file.write(data.tobytes())


class StackWriter:
    """Writes images block by block; made by :func:`stack_writer`."""

    def __init__(self, file: BinaryIO, box: int, pixel_size_angst: float) -> None:
        self._file, self._box, self._pixel_size = file, box, pixel_size_angst
        self.n_images = 0
        self._low, self._high, self._sum, self._squares = np.inf, -np.inf, 0.0, 0.0
        file.write(bytes(_HEADER_BYTES))

    def append(self, images: NDArray[np.floating]) -> None:
        """Add images of shape (b, N, N)."""
        data = np.ascontiguousarray(images, dtype="<f4")
        if data.shape[1:] != (self._box, self._box):
            raise ValueError(f"images are {data.shape[1:]}, the stack's box is {self._box}")
        self._file.write(data.tobytes())
        self.n_images += len(data)
        self._low, self._high = min(self._low, data.min()), max(self._high, data.max())
        self._sum += float(data.sum(dtype=np.float64))
        self._squares += float(np.square(data, dtype=np.float64).sum())

    def finish(self) -> None:
        """Write the header, now that the number of images is known."""
        count = max(self.n_images * self._box**2, 1)
        mean = self._sum / count
        rms = max(self._squares / count - mean**2, 0.0) ** 0.5
        stats = np.array([self._low, self._high, mean, rms], dtype=np.float64)
        self._file.seek(0)
        shape = (self.n_images, self._box, self._box)
        self._file.write(_header_bytes(shape, self._pixel_size, False, stats))


@contextmanager
def stack_writer(path: str | Path, box: int, pixel_size_angst: float) -> Iterator[StackWriter]:
    """Write a float32 stack larger than memory; the file appears when the block ends well.

    Yields
    ------
    StackWriter
        Call ``append(images)`` on it.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        writer = StackWriter(file, box, pixel_size_angst)
        yield writer
        writer.finish()
        file.flush()
        os.fsync(file.fileno())
