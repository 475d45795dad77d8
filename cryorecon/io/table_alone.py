"""Particles whose images may be elsewhere, for commands that need their table alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cryorecon.errors import MissingStacksError
from cryorecon.io.optics import optics_index, pixel_size_of
from cryorecon.io.particle_tables import particle_tables
from cryorecon.io.particles import Particles, read_particles
from cryorecon.io.stacks import parse_image_names
from cryorecon.io.star import integers


def read_with_or_without_images(
    path: str | Path, project: str | Path | None, passthrough: str | Path | None = None
) -> tuple[Particles, str]:
    """Particles, and where stacks are missing what to warn of, else nothing.

    Then only the table is read, and no image can be: its optics table must state the box.

    Raises
    ------
    CryoreconError
        As :func:`cryorecon.io.particles.read_particles`, of missing stacks where the box is told
        by them alone.
    """
    try:
        return read_particles(path, project, passthrough=passthrough), ""
    except MissingStacksError as error:
        alone = _table_alone(Path(path), passthrough)
        if alone is None:
            raise
        return alone, f"{error.problem}. The table alone was read; images were not checked"


def _table_alone(path: Path, passthrough: str | Path | None) -> Particles | None:
    blocks, name, table = particle_tables(path, passthrough, None)
    rows = np.arange(len(table), dtype=np.int32)
    optics = blocks.get("optics")
    if optics is None or "rlnImageSize" not in optics or len(optics) == 0:
        return None
    used = np.unique(optics_index(path, table, optics, rows))
    boxes = np.unique(integers(path, optics.iloc[used], "rlnImageSize", rows=used))
    if len(boxes) > 1 or boxes[0] < 1:
        return None
    named = parse_image_names(path, table)
    stacks = tuple(map(Path, named.stacks))
    box = int(boxes[0])
    pixel_size = pixel_size_of(path, table, optics, stacks[0], box)
    images = named.stack_of, named.section, stacks, ()
    return Particles(path, table, blocks, name, box, pixel_size, rows, *images)
