"""Which table of a file is that of the particles, whatever program wrote it."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pandas as pd

from cryorecon.errors import CryoreconError
from cryorecon.io.cryodrgn_input import is_stack, read_stack_table
from cryorecon.io.cryosparc import is_cryosparc_file, read_cryosparc
from cryorecon.io.star import Tables, star_blocks
from cryorecon.io.text_table import TextTable


def particle_tables(
    path: Path, passthrough: str | Path | None, ctf: str | Path | None
) -> tuple[Tables, str, TextTable]:
    """The particles' table and its name, and the others, `optics` among them.

    Parameters
    ----------
    path : Path
        A STAR or ``.cs`` file, or with `ctf` a stack or a list of stacks.
    passthrough, ctf : path, optional
        As in :func:`cryorecon.io.particles.read_particles`.

    Raises
    ------
    CryoreconError
        If there is no table of particles, or it is empty.
    """
    blocks: Tables
    if ctf is not None or is_stack(path):
        optics, found = _stack_tables(path, ctf)
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
    return blocks, name, table


def _stack_tables(path: Path, ctf: str | Path | None) -> tuple[pd.DataFrame, TextTable]:
    if not is_stack(path):
        raise CryoreconError(
            f"{path} is no stack of images, which ctf.pkl belongs to",
            "Give an .mrcs file or a .txt list of them; other tables hold their CTF themselves",
        )
    if ctf is None:
        raise CryoreconError(
            f"{path} holds images, but neither their pixel size nor their CTF",
            "Give a STAR or .cs file of particles, or make one: cryorecon import "
            f"{path.name} --ctf-file ctf.pkl -o particles.star",
        )
    return read_stack_table(path, ctf)


def _read_blocks(path: Path) -> tuple[Tables, dict[str, TextTable]]:
    """Tables of the file, and apart from them those that name images."""
    blocks: Tables = {}
    tables: dict[str, TextTable] = {}
    for name, pieces in star_blocks(path):
        first = next(pieces)
        if name in tables or name in blocks:
            raise CryoreconError(
                f"{path} has two tables named data_{name}",
                "Join selections as RELION's JoinStar job does, not end to end",
            )
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
