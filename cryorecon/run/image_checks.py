"""Images that no engine can work with."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryorecon.errors import CryoreconError
from cryorecon.io.files import sha256_of
from cryorecon.io.mrc import StackReader, holds_numbers
from cryorecon.io.particles import Particles
from cryorecon.ranks import Ranks

# Pixels along an edge of the corners that tell a masked image.
_CORNER = 3
# Images that tell whether stacks are the same.
_COMPARED = 16
# Kinds of images that cannot be worked with; 0 of others.
_BROKEN, _BLANK, _MASKED = 1, 2, 3
# Share of all that a job leaves out, at most.
MOST_LEFT_OUT = 0.05
# Rows that are named.
_NAMED = 5


def checksums(particles: Particles, **files: Path | None) -> dict[str, str]:
    """What tells a continued job that images, or files such as a mask, are no longer the same.

    Of images some that are spread over the stacks: reading all would take as long as a part of the
    job.
    """
    rows = np.unique(np.linspace(0, len(particles) - 1, _COMPARED).round().astype(np.int64))
    some = particles.read(rows, StackReader())
    found = {"images": hashlib.sha256(some.tobytes()).hexdigest()}
    return found | {name: sha256_of(path) for name, path in files.items() if path is not None}


def kinds_of_unfit(images: Tensor) -> Tensor:
    """Which images hold no numbers, no contrast, or no noise around the particle.

    Parameters
    ----------
    images : Tensor, shape (b, N, N)
        As they are on disk, on the CPU.

    Returns
    -------
    Tensor, shape (b,), uint8
        0 of those that can be worked with.
    """
    ends = slice(None, _CORNER), slice(-_CORNER, None)
    corners = torch.cat([images[:, y, x].flatten(1) for y in ends for x in ends], 1)
    kinds = _MASKED * (corners == corners[:, :1]).all(-1).to(torch.uint8)
    masked = torch.nonzero(kinds)[:, 0]
    flat = images[masked].flatten(1)
    kinds[masked[(flat == flat[:, :1]).all(-1)]] = _BLANK
    kinds[~torch.from_numpy(holds_numbers(images.numpy()))] = _BROKEN
    return kinds


def refuse_unfit(particles: Particles, rows: Tensor, images: Tensor) -> None:
    """Stop at images without numbers, without contrast, or without noise around the particle.

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
    particles.check(rows.numpy(), images.numpy())
    kinds = kinds_of_unfit(images)
    blank, masked = (torch.nonzero(kinds == kind)[:, 0] for kind in (_BLANK, _MASKED))
    if len(blank):
        raise CryoreconError(
            f"{_named(particles, rows, blank)} blank", "Remove such rows from the STAR file"
        )
    if len(masked):
        raise CryoreconError(
            f"{_named(particles, rows, masked)} masked: its corners hold one value, and noise is "
            "measured outside the particle",
            "Extract the particles without a mask",
        )


def _named(particles: Particles, rows: Tensor, bad: Tensor) -> str:
    row = particles.rows[int(rows[bad[0]])] + 1
    others = f" (and {len(bad) - 1} more of {len(rows)} images read)" if len(bad) > 1 else ""
    return f"{particles.path}, row {row}{others}: the image is"


class FitImages:
    """Which images can be worked with, as they are read; stops where many cannot.

    Parameters
    ----------
    particles : Particles
        Whose images these are.

    Attributes
    ----------
    fit : Tensor, shape (n,), bool
        True of those that have not been read yet.
    """

    def __init__(self, particles: Particles) -> None:
        self._particles = particles
        self.fit = torch.ones(len(particles), dtype=torch.bool)

    def emptied(self, rows: Tensor, images: Tensor) -> Tensor:
        """Images as on disk with 0 in those that cannot be worked with.

        Parameters
        ----------
        rows : Tensor, int64, shape (b,)
        images : Tensor, shape (b, N, N)

        Raises
        ------
        CryoreconError
            As :func:`refuse_unfit`, where a twentieth of all images are so.
        """
        bad = kinds_of_unfit(images) != 0
        if bool(bad.any()):
            self.fit[rows[bad]] = False
            if int((~self.fit).sum()) > MOST_LEFT_OUT * len(self.fit):
                refuse_unfit(self._particles, rows, images)
            images[bad] = 0
        return images

    def everywhere(self, ranks: Ranks) -> Tensor:
        """Rows that can be worked with, once all processes have read theirs; int64.

        Raises
        ------
        CryoreconError
            Where those of all processes together are too many.
        """
        unfit = (~self.fit).to(torch.float32)
        ranks.add_up(unfit)
        self.fit = unfit == 0
        bad = torch.nonzero(unfit)[:, 0]
        if len(bad) > MOST_LEFT_OUT * len(unfit):
            first = self._particles.rows[int(bad[0])] + 1
            raise CryoreconError(
                f"{self._particles.path}, row {first} and {len(bad) - 1} more of {len(unfit)}: the "
                "images are blank, masked, or with NaN or infinite pixels",
                "Remove such rows from the STAR file",
            )
        return torch.nonzero(self.fit)[:, 0]


def left_out_text(
    particles: Particles, kept: Tensor, where: str = "left out, of run_data.star, too"
) -> list[str]:
    """What the log says of particles that are not among some rows; a line or none."""
    left = np.setdiff1d(np.arange(len(particles)), kept.numpy())
    if len(left) == 0:
        return []
    rows = ", ".join(str(row + 1) for row in particles.rows[left[:_NAMED]].tolist())
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    return [
        f"{len(left)} of {len(particles)} images, blank, masked, or with NaN or infinite pixels, "
        f"cannot be used: {where} ({particles.path}, "
        f"row{'s' * (len(left) > 1)} {rows}{more})"
    ]
