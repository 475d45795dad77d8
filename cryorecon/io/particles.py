"""Particles: a RELION table, its optics groups, and images that are read when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cryorecon.errors import CryoreconError
from cryorecon.io.cryodrgn_input import is_stack, read_stack_table
from cryorecon.io.cryosparc import is_cryosparc_file, read_cryosparc
from cryorecon.io.mrc import open_stack
from cryorecon.io.stacks import check_stacks, parse_image_names, resolve_stacks
from cryorecon.io.star import Tables, integers, numbers, star_blocks, write_star
from cryorecon.io.text_table import TextTable
from cryorecon.physics.ctf import CtfParameters

# Far from what float32 holds, and from any image.
_LARGEST_SUM_OF_SQUARES = 1e30
_ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
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
    box : int
        Samples a side.
    pixel_size_angst : float
    rows : array of int
        Row of each particle in the file, 0-based.
    """

    path: Path
    table: TextTable
    blocks: Tables
    block_name: str
    box: int
    pixel_size_angst: float
    rows: NDArray[np.int32]
    _stack_of: NDArray[np.int32] = field(repr=False)
    _section: NDArray[np.int32] = field(repr=False)
    _stacks: tuple[Path, ...] = field(repr=False)

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
        """Images of some rows, shape (b, N, N), read in file order, returned in the order asked.

        Raises
        ------
        CryoreconError
            If a pixel is NaN or infinite, or so large that sums of squares would be.
        """
        index = np.asarray(rows, dtype=np.int64)
        images = np.empty((len(index), self.box, self.box), np.float32)
        order = np.lexsort((self._section[index], self._stack_of[index]))
        for stack in np.unique(self._stack_of[index]):
            chosen = order[self._stack_of[index][order] == stack]
            data = open_stack(self._stacks[stack])
            images[chosen] = data[self._section[index[chosen]]]
        with np.errstate(invalid="ignore"):
            squares = np.einsum("byx,byx->b", images, images, dtype=np.float64)
        bad = np.flatnonzero(~(squares < _LARGEST_SUM_OF_SQUARES))
        if len(bad):
            row = index[bad[0]]
            raise CryoreconError(
                f"{self.path}, row {self.rows[row] + 1}: image {self._section[row] + 1} of "
                f"{self._stacks[self._stack_of[row]]} holds NaN, infinite or huge pixels "
                f"({len(bad)} of {len(index)} images read)",
                "Remove these rows or write the stack again",
            )
        return images

    def file_order(self) -> NDArray[np.int64]:
        """Rows in the order in which the stacks hold them."""
        return np.lexsort((self._section, self._stack_of))

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
        if {"rlnOriginXAngst", "rlnOriginYAngst"} <= set(self.table):
            return np.stack([self._column(f"rlnOrigin{a}Angst") for a in "XY"], -1)
        if {"rlnOriginX", "rlnOriginY"} <= set(self.table):
            pixels = np.stack([self._column(f"rlnOrigin{a}") for a in "XY"], -1)
            return pixels * self.pixel_size_angst
        return np.zeros((len(self), 2))

    def origin_unit(self) -> tuple[str, float]:
        """What the names of the origin columns end in, and their unit in angstrom."""
        if self.has_optics_table or "rlnOriginXAngst" in self.table:
            return "Angst", 1.0
        return "", self.pixel_size_angst

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
        return _optics_index(self.path, self.table, self.blocks["optics"], self.rows)

    def ctf_parameters(self) -> CtfParameters:
        """CTF of each particle.

        Raises
        ------
        CryoreconError
            If a column is missing or holds something that is not a number.
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

        def values(column: str, default: float = 0.0) -> torch.Tensor:
            if column in self.table:
                found = self._column(column)
            elif optics is not None and column in optics:
                found = numbers(self.path, optics, column)[index]
            else:
                found = np.array([default])
            if (found == found[0]).all():  # Millions of equal numbers are one.
                return torch.tensor(found[0], dtype=torch.float64).expand(len(self))
            return torch.from_numpy(found)

        columns = {**_PER_PARTICLE_CTF, **_MICROSCOPE}
        return CtfParameters(
            **{name: values(column) for name, column in columns.items()},
            phase_shift_deg=values("rlnPhaseShift", 0.0),
            b_factor_angst2=values("rlnCtfBfactor", 0.0),
        )

    def write(
        self,
        path: str | Path,
        *,
        euler_deg: NDArray[np.floating] | None = None,
        origins_angst: NDArray[np.floating] | None = None,
        random_subsets: NDArray[np.integer] | None = None,
        class_number: int | None = None,
    ) -> None:
        """Write the table with new poses: every row and column, in order, in the file's dialect.

        Parameters
        ----------
        euler_deg : array, shape (n, 3), optional
        origins_angst : array, shape (n, 2), optional
            Written as pixels to a RELION 3.0 file, unless it holds them in angstrom.
        random_subsets : array of 1 and 2, optional
        class_number : int, optional
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
        write_star(path, {**self.blocks, self.block_name: self.table.frames(new)})


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
        Folder that image paths are relative to; tried after the current directory.
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
    blocks: Tables
    if ctf is not None or is_stack(path):
        optics, found = _read_stack(path, ctf)
        blocks, tables = {"optics": optics}, {"particles": found}
    elif is_cryosparc_file(path):
        optics, found = read_cryosparc(path, passthrough)
        blocks, tables = {"optics": optics}, {"particles": found}
    else:
        blocks, tables = _read_blocks(path)
    name = _particle_block(path, blocks, tables)
    table = tables.pop(name)
    blocks |= {other: pd.concat(list(rest.frames())) for other, rest in tables.items()}
    if len(table) == 0:
        raise CryoreconError(f"{path} holds no particles: its table is empty", "Select some first")
    stack_of, section, names = parse_image_names(path, table)
    stacks = resolve_stacks(path, names, project)
    box = check_stacks(path, stacks, stack_of, section)
    pixel_size = _pixel_size(path, table, blocks.get("optics"), stacks[0], box)
    rows = np.arange(len(table), dtype=np.int32)
    return Particles(
        path, table, blocks, name, box, pixel_size, rows, stack_of, section, tuple(stacks)
    )


def _read_stack(path: Path, ctf: str | Path | None) -> tuple[pd.DataFrame, TextTable]:
    if not is_stack(path):
        raise CryoreconError(
            f"{path} is no stack of images, which ctf.pkl belongs to",
            "Give an .mrcs file or a .txt list of them; other tables hold their CTF themselves",
        )
    if ctf is None:
        raise CryoreconError(
            f"{path} holds images, but neither their pixel size nor their CTF",
            "Give a STAR or .cs file of particles, or make one: cryorecon import "
            f"{path.name} --ctf ctf.pkl -o particles.star",
        )
    return read_stack_table(path, ctf)


def _read_blocks(path: Path) -> tuple[Tables, dict[str, TextTable]]:
    """Tables of the file, and apart from them those that name images."""
    blocks: Tables = {}
    tables: dict[str, TextTable] = {}
    for name, pieces in star_blocks(path):
        first = next(pieces)
        if "rlnImageName" in first:
            tables[name] = TextTable.gather(chain([first], pieces))
        else:
            blocks[name] = pd.concat([first, *pieces], ignore_index=True)
    return blocks, tables


def _particle_block(path: Path, blocks: Tables, tables: dict[str, TextTable]) -> str:
    usual = ("particles", "images", "")
    for name in (*usual, *tables):
        if name in tables:
            return name
    if any(name in blocks and len(blocks[name]) == 0 for name in usual):
        raise CryoreconError(f"{path} holds no particles: its table is empty", "Select some first")
    raise CryoreconError(
        f"{path} has no table with a column rlnImageName (blocks: {', '.join(blocks) or 'none'})",
        "Give a particle STAR file, not one of micrographs or jobs",
    )


def _optics_index(
    path: Path, table: TextTable, optics: pd.DataFrame, rows: NDArray[np.int32]
) -> NDArray[np.int64]:
    if len(optics) == 1 and "rlnOpticsGroup" not in table:
        return np.zeros(len(table), dtype=np.int64)
    if "rlnOpticsGroup" not in table or "rlnOpticsGroup" not in optics:
        raise CryoreconError(
            f"{path} has an optics table but no rlnOpticsGroup to join it by",
            "Add the column rlnOpticsGroup to both tables",
        )
    groups = integers(path, optics, "rlnOpticsGroup")
    wanted = integers(path, table, "rlnOpticsGroup", rows=rows)
    if len(np.unique(groups)) < len(groups):
        twice = next(g for k, g in enumerate(groups) if g in groups[:k])
        raise CryoreconError(
            f"{path}: optics group {twice} occurs twice in the optics table", "Remove one of them"
        )
    position = pd.Index(groups).get_indexer(pd.Index(wanted))
    if (position < 0).any():
        row = int(np.flatnonzero(position < 0)[0])
        raise CryoreconError(
            f"{path}, row {rows[row] + 1}: optics group {wanted[row]} is not in the optics table",
            f"Its groups are {', '.join(map(str, groups))}; correct the row or add the group",
        )
    return position.astype(np.int64)


def _pixel_size(
    path: Path, table: TextTable, optics: pd.DataFrame | None, stack: Path, box: int
) -> float:
    if optics is not None and len(optics) == 0:
        raise CryoreconError(f"{path}: its optics table is empty", "Add a row for each group")
    source = optics if optics is not None else table
    if optics is not None and "rlnImageSize" in optics:
        sizes = integers(path, optics, "rlnImageSize")
        if (sizes != box).any():
            raise CryoreconError(
                f"{path}: the optics table says {sizes[sizes != box][0]} px boxes, "
                f"{stack} has {box} px",
                "Correct rlnImageSize or give the stack it was written for",
            )
    for table_ in (source, table):
        if "rlnImagePixelSize" in table_:
            found = numbers(path, table_, "rlnImagePixelSize")
            break
    else:
        if {"rlnDetectorPixelSize", "rlnMagnification"} <= set(table):
            detector_um = numbers(path, table, "rlnDetectorPixelSize")
            found = detector_um * 1e4 / numbers(path, table, "rlnMagnification")
        elif {"rlnPixelSize"} <= set(table):
            found = numbers(path, table, "rlnPixelSize")
        else:
            raise CryoreconError(
                f"{path} does not state the pixel size",
                "Add rlnImagePixelSize to the optics table (3.1) or rlnDetectorPixelSize and "
                "rlnMagnification to the particles (3.0)",
            )
    sizes_angst = np.unique(np.round(found, 6))
    if len(sizes_angst) > 1:
        listed = ", ".join(f"{s:g}" for s in sizes_angst[:4])
        raise CryoreconError(
            f"{path} mixes pixel sizes ({listed} A)", "Rescale all particles to one pixel size"
        )
    if sizes_angst[0] <= 0:
        raise CryoreconError(f"{path} states a pixel size of {sizes_angst[0]:g} A", "Correct it")
    return float(found[0])
