"""Particles: a RELION table, its optics groups, and images that are read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import Header, StackReader, holds_numbers
from cryorecon.io.optics import of_groups, optics_index, pixel_size_of, require_within
from cryorecon.io.particle_tables import particle_tables
from cryorecon.io.stacks import find_images
from cryorecon.io.star import Tables, integers, numbers, write_star
from cryorecon.io.text_table import TextTable
from cryorecon.physics.ctf import CtfParameters
from cryorecon.physics.resampling import downsample_images

_ROWS_AT_ONCE = 1_000_000
_ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
_SHARE, _LIKELIHOOD = "rlnMaxValueProbDistribution", "rlnLogLikeliContribution"
_MERIT = "rlnParticleFigureOfMerit"
# What programs say of poses, which is not true of others: priors too, and origins in either unit.
PRIORS_OF_ANGLES = {f"{name}Prior" for name in _ANGLES}
SAID_OF_ANGLES = {_SHARE, _LIKELIHOOD, *PRIORS_OF_ANGLES}
SAID_OF_ORIGINS = {
    f"rlnOrigin{axis}{kind}" for axis in "XY" for kind in ("", "Angst", "Prior", "PriorAngst")
}
_PER_PARTICLE_CTF = {
    "defocus_u_angst": "rlnDefocusU",
    "defocus_v_angst": "rlnDefocusV",
    "defocus_angle_deg": "rlnDefocusAngle",
}
_MICROSCOPE = {
    "voltage_kv": "rlnVoltage",
    "spherical_aberration_mm": "rlnSphericalAberration",
    "amplitude_contrast": "rlnAmplitudeContrast",
}
_OPTIONAL_CTF = {
    "phase_shift_deg": "rlnPhaseShift",
    "b_factor_angst2": "rlnCtfBfactor",
    "phase_flipped": "rlnCtfDataArePhaseFlipped",
}
_PREMULTIPLIED = "rlnCtfDataAreCtfPremultiplied"


@dataclass(frozen=True)
class Particles:
    """Rows of a RELION particle table and the images that they name.

    Attributes
    ----------
    path : Path
        The STAR or ``.cs`` file.
    table : TextTable
        Every column of every particle, as text, in the file's order.
    blocks : dict of DataFrame
        The file's other tables, `optics` among them from RELION 3.1 on.
    block_name : str
        Name of the particle table: ``particles``, or ``images`` or empty in RELION 3.0.
    stored_box : int
        Samples a side of the images on disk.
    stored_pixel_size_angst : float
        Of these.
    rows : array of int
        Row of each particle in the file, 0-based.
    headers : tuple of Header
        Of `stacks`.
    crop_box : int, optional
        Samples a side that images are Fourier cropped to when they are read.
    """

    path: Path
    table: TextTable
    blocks: Tables
    block_name: str
    stored_box: int
    stored_pixel_size_angst: float
    rows: NDArray[np.int32]
    _stack_of: NDArray[np.int32] = field(repr=False)
    _section: NDArray[np.int32] = field(repr=False)
    _stacks: tuple[Path, ...] = field(repr=False)
    headers: tuple[Header, ...] = field(repr=False)
    crop_box: int | None = None

    @property
    def box(self) -> int:
        """Samples a side of the images as they are worked on."""
        return self.stored_box if self.crop_box is None else self.crop_box

    @property
    def pixel_size_angst(self) -> float:
        """Of these; the width in angstrom is that of the images on disk."""
        if self.crop_box is None:
            return self.stored_pixel_size_angst
        return self.stored_pixel_size_angst * self.stored_box / self.crop_box

    def cropped(self, box: int) -> Particles:
        """The same particles, images larger than `box` Fourier cropped to it, smaller ones not."""
        return replace(self, crop_box=box if box < self.stored_box else None)

    def as_stored(self) -> Particles:
        """The same particles with images as they are on disk."""
        return replace(self, crop_box=None)

    @property
    def stacks(self) -> tuple[Path, ...]:
        """Files of the images."""
        return self._stacks

    def __len__(self) -> int:
        return len(self.table)

    @property
    def has_optics_table(self) -> bool:
        """Whether the file is of RELION 3.1 or later."""
        return "optics" in self.blocks

    def subset(self, rows: Sequence[int] | NDArray[np.int64]) -> Particles:
        """Some particles, in the given order."""
        index = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            table=self.table.subset(index),
            rows=self.rows[index],
            _stack_of=self._stack_of[index],
            _section=self._section[index],
        )

    def images(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Images of some rows, shape (b, box, box), read in file order, given in the order asked.

        Raises
        ------
        CryoreconError
            If a pixel is NaN or infinite, or so large that sums of squares would be.
        """
        index = np.asarray(rows, dtype=np.int64)
        images = self.read(index, StackReader())
        self.check(index, images)
        return downsample_images(torch.from_numpy(images), self.box).numpy()

    def read(self, rows: NDArray[np.int64], reader: StackReader) -> NDArray[np.float32]:
        """Images as they are on disk, whatever they hold; a reader may have read ahead."""
        stack_of, section = self._stack_of[rows], self._section[rows]
        images = np.empty((len(rows), self.stored_box, self.stored_box), np.float32)
        order = None if _ascending(stack_of, section) else np.lexsort((section, stack_of))
        if order is not None:
            stack_of, section = stack_of[order], section[order]
        for stack in np.unique(stack_of):
            first, end = np.searchsorted(stack_of, [stack, stack + 1])
            path, header = self._stacks[stack], self.headers[stack]
            reader.read(path, header, section[first:end], images[first:end])
        if order is not None:
            found, images = images, np.empty_like(images)
            images[order] = found
        return images

    def check(self, rows: NDArray[np.int64], images: NDArray[np.float32]) -> None:
        """Refuse images of some rows, as on disk, that :meth:`images` would not give."""
        bad = np.flatnonzero(~holds_numbers(images))
        if len(bad):
            row = rows[bad[0]]
            raise CryoreconError(
                f"{self.path}, row {self.rows[row] + 1}: image {self._section[row] + 1} of "
                f"{self._stacks[self._stack_of[row]]} holds NaN, infinite or huge pixels "
                f"({len(bad)} of {len(images)} images read)",
                "Remove these rows or write the stack again",
            )

    def first_with_image(self) -> NDArray[np.int64] | None:
        """First row that shows the same image, of each particle; None if all images differ."""
        image = self._stack_of.astype(np.int64) << 32 | self._section
        in_order = np.sort(image)
        if not (in_order[1:] == in_order[:-1]).any():
            return None
        _, first, which = np.unique(image, return_index=True, return_inverse=True)
        return first[which]

    def file_order(self) -> NDArray[np.int64]:
        """Rows in the order in which the stacks hold them."""
        return np.lexsort((self._section, self._stack_of))

    def place(self) -> NDArray[np.int32] | None:
        """Where each image lies among all, in file order; None if the rows are in that order."""
        if _ascending(self._stack_of, self._section):
            return None
        place = np.empty(len(self), np.int32)
        place[self.file_order()] = np.arange(len(self), dtype=np.int32)
        return place

    def in_file_order(self, size: int, start: int = 0) -> Iterator[NDArray[np.int64]]:
        """Rows in file order, some at a time.

        Parameters
        ----------
        start : int
            How many to leave out at the beginning.
        """
        order = None if _ascending(self._stack_of, self._section) else self.file_order()
        for first in range(start, len(self), size):
            here = np.arange(first, min(first + size, len(self)))
            yield here if order is None else order[here]

    def _column(self, name: str) -> NDArray[np.float64]:
        return numbers(self.path, self.table, name, rows=self.rows)

    def euler_deg(self) -> NDArray[np.float64]:
        """(rot, tilt, psi) in degrees, shape (n, 3)."""
        missing = [c for c in _ANGLES if c not in self.table]
        if missing:
            raise CryoreconError(
                f"{self.path} has no column {', '.join(missing)}",
                "Give a STAR file with poses, such as run_data.star of an abinitio job",
            )
        return np.stack([self._column(c) for c in _ANGLES], -1)

    def origins_angst(self) -> NDArray[np.float64]:
        """In-plane origins (x, y) in angstrom, shape (n, 2); zero where the file has none."""
        unit, scale = self.origin_unit()
        names = [f"rlnOrigin{axis}{unit}" for axis in "XY"]
        if not set(names) <= set(self.table):
            names, scale = ["rlnOriginX", "rlnOriginY"], self.stored_pixel_size_angst
        if not set(names) <= set(self.table):
            return np.zeros((len(self), 2))
        origins = [self._column(name) * scale for name in names]
        for name, values in zip(names, origins, strict=True):
            require_within(self.path, self.rows, name, values)
        return np.stack(origins, -1)

    def origin_unit(self) -> tuple[str, float]:
        """What the names of the origin columns end in, and their unit in angstrom."""
        if self.has_optics_table or "rlnOriginXAngst" in self.table:
            return "Angst", 1.0
        return "", self.stored_pixel_size_angst

    def random_subsets(self) -> NDArray[np.int64] | None:
        """Half set, 1 or 2, of each particle, or None when the file has none."""
        if "rlnRandomSubset" not in self.table:
            return None
        subsets = integers(self.path, self.table, "rlnRandomSubset", rows=self.rows)
        if not np.isin(subsets, (1, 2)).all():
            row = int(np.flatnonzero(~np.isin(subsets, (1, 2)))[0])
            raise CryoreconError(
                f"{self.path}, row {self.rows[row] + 1}: rlnRandomSubset is {subsets[row]}",
                "It must be 1 or 2; remove the column to draw new half sets",
            )
        return subsets

    def optics_index(self) -> NDArray[np.int64]:
        """Row of the optics table for each particle; zeros in RELION 3.0 files."""
        if not self.has_optics_table:
            return np.zeros(len(self), dtype=np.int64)
        return optics_index(self.path, self.table, self.blocks["optics"], self.rows)

    def ctf_parameters(self) -> CtfParameters:
        """CTF of each particle.

        Raises
        ------
        CryoreconError
            If a column is missing, or holds something that is no number or that no microscope has;
            or if it says that images have been corrected for their CTF.
        """
        optics = self.blocks.get("optics")
        index = self.optics_index()
        wanted = [*_PER_PARTICLE_CTF.values(), *_MICROSCOPE.values()]
        known = set(self.table) | (set(optics) if optics is not None else set())
        missing = [c for c in wanted if c not in known]
        if missing:
            raise CryoreconError(
                f"{self.path} lacks the CTF column{'s' * (len(missing) > 1)} {', '.join(missing)}",
                "Run CTF estimation first, or add the column to the particle or the optics table",
            )

        def values(column: str) -> torch.Tensor:
            return self._optics_column(column, index)

        if bool((values(_PREMULTIPLIED) != 0).any()):
            raise CryoreconError(
                f"{self.path}: {_PREMULTIPLIED} says that images are multiplied by their CTF",
                "Extract them again without that: noise is taken to be as it was recorded",
            )
        columns = {**_PER_PARTICLE_CTF, **_MICROSCOPE, **_OPTIONAL_CTF}
        found = {name: values(column) for name, column in columns.items()}
        for name, column in columns.items():
            require_within(self.path, self.rows, column, found[name].numpy())
        return CtfParameters(**found)

    def _optics_column(self, column: str, index: NDArray[np.int64]) -> torch.Tensor:
        """Of each particle: its own, its optics group's, or zero."""
        optics = self.blocks.get("optics")
        if column in self.table:
            found = self._column(column)
        elif optics is not None and column in optics:
            found = of_groups(self.path, optics, column, index)
        else:
            found = np.array([0.0])
        if (found == found[0]).all():  # Millions of equal numbers are one.
            return torch.tensor(found[0], dtype=torch.float64).expand(len(self))
        return torch.from_numpy(found)

    def write(
        self,
        path: str | Path,
        *,
        euler_deg: NDArray[np.floating] | None = None,
        origins_angst: NDArray[np.floating] | None = None,
        random_subsets: NDArray[np.integer] | None = None,
        class_number: int | None = None,
        pose_share: NDArray[np.floating] | None = None,
        log_likelihood: NDArray[np.floating] | None = None,
        merit: NDArray[np.floating] | None = None,
    ) -> None:
        """Write the table with new poses: every row and column, in order, in the file's dialect.

        What another program said of the poses that are replaced is left out, unless it is replaced.

        Parameters
        ----------
        euler_deg : array, shape (n, 3), optional
        origins_angst : array, shape (n, 2), optional
            Written as pixels to a RELION 3.0 file, unless it holds them in angstrom.
        random_subsets : array of 1 and 2, optional
        class_number : int, optional
        pose_share : array, shape (n,), optional
            How much of an image belongs to its pose, 0 to 1: RELION's largest probability.
        log_likelihood, merit : array, shape (n,), optional
            Of each image, against an empty one; 1, or less if it was dimmed.
        """
        new: dict[str, NDArray[np.generic]] = {}
        if euler_deg is not None:
            new |= zip(_ANGLES, np.asarray(euler_deg, np.float64).T, strict=True)
        if origins_angst is not None:
            unit, scale = self.origin_unit()
            for axis, values in zip("XY", np.asarray(origins_angst, np.float64).T, strict=True):
                new[f"rlnOrigin{axis}{unit}"] = values / scale
        if class_number is not None:
            new["rlnClassNumber"] = np.full(len(self), class_number)
        if random_subsets is not None:
            new["rlnRandomSubset"] = np.asarray(random_subsets)
        said = {_SHARE: pose_share, _LIKELIHOOD: log_likelihood, _MERIT: merit}
        new |= {name: np.asarray(v, np.float64) for name, v in said.items() if v is not None}
        stale = SAID_OF_ANGLES if euler_deg is not None else set()
        stale = stale | SAID_OF_ORIGINS if origins_angst is not None else stale
        rows = self.table.frames(new, stale - set(new))
        write_star(path, {**self.blocks, self.block_name: rows})


def read_particles(
    path: str | Path,
    project: str | Path | None = None,
    *,
    passthrough: str | Path | None = None,
    ctf: str | Path | None = None,
) -> Particles:
    """Read particles of RELION 3.0, 3.1, 5 or cryoSPARC and check the stacks they name.

    Parameters
    ----------
    path : path of the STAR or ``.cs`` file
    project : path, optional
        Folder that image paths are relative to; tried before the current directory.
    passthrough : path, optional
        Second cryoSPARC file with further fields of the same particles.
    ctf : path, optional
        ``ctf.pkl`` of cryoDRGN; then `path` is its stack, or its list of stacks.

    Raises
    ------
    CryoreconError
        If a table, column, stack or section is missing or they contradict each other.
    """
    path = Path(path)
    blocks, name, table = particle_tables(path, passthrough, ctf)
    stack_of, section, stacks, headers = find_images(path, table, project)
    box = headers[0].shape[2]
    pixel_size = pixel_size_of(path, table, blocks.get("optics"), stacks[0], box)
    rows = np.arange(len(table), dtype=np.int32)
    files = tuple(stacks), headers
    return Particles(path, table, blocks, name, box, pixel_size, rows, stack_of, section, *files)


def _ascending(stack_of: NDArray[np.int32], section: NDArray[np.int32]) -> bool:
    """Whether images come as their stacks hold them, a million rows at a time."""
    for start in range(0, len(stack_of), _ROWS_AT_ONCE):
        here = slice(start, start + _ROWS_AT_ONCE + 1)
        stack, number = np.diff(stack_of[here]), np.diff(section[here])
        if not ((stack > 0) | ((stack == 0) & (number >= 0))).all():
            return False
    return True
