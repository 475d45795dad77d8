"""Images that no engine can work with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryorecon.errors import CryoreconError
from cryorecon.io.files import sha256_of
from cryorecon.io.mrc import StackReader
from cryorecon.io.particles import Particles

# Pixels along an edge of the corners that tell a masked image.
_CORNER = 3
# Images that tell whether stacks are the same.
_COMPARED = 16


def checksums(particles: Particles, **files: Path | None) -> dict[str, str]:
    """What tells a continued job that images, or files such as a mask, are no longer the same.

    Of images some that are spread over the stacks: reading all would take as long as a part of the
    job.
    """
    rows = np.unique(np.linspace(0, len(particles) - 1, _COMPARED).round().astype(np.int64))
    some = particles.read(rows, StackReader())
    found = {"images": hashlib.sha256(some.tobytes()).hexdigest()}
    return found | {name: sha256_of(path) for name, path in files.items() if path is not None}


def refuse_unfit(particles: Particles, rows: Tensor, images: Tensor) -> None:
    """Stop at images without contrast, or without noise around the particle.

    Parameters
    ----------
    rows : Tensor, int64, shape (b,)
    images : Tensor, shape (b, N, N)
        As they are on disk.

    Raises
    ------
    CryoreconError
        Naming the first such row, and how many there are.
    """
    ends = slice(None, _CORNER), slice(-_CORNER, None)
    corners = torch.cat([images[:, y, x].flatten(1) for y in ends for x in ends], 1)
    masked = torch.nonzero((corners == corners[:, :1]).all(-1))[:, 0]
    if len(masked) == 0:
        return
    flat = images[masked].flatten(1)
    blank = masked[(flat == flat[:, :1]).all(-1)]
    if len(blank):
        raise CryoreconError(
            f"{_named(particles, rows, blank)} blank", "Remove such rows from the STAR file"
        )
    raise CryoreconError(
        f"{_named(particles, rows, masked)} masked: its corners hold one value, and noise is "
        "measured outside the particle",
        "Extract the particles without a mask",
    )


def _named(particles: Particles, rows: Tensor, bad: Tensor) -> str:
    row = particles.rows[int(rows[bad[0]])] + 1
    others = f" (and {len(bad) - 1} more of {len(rows)} images read)" if len(bad) > 1 else ""
    return f"{particles.path}, row {row}{others}: the image is"
