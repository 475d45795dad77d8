"""Maps and masks that a user gives, which must be of the images' box and pixel size."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map


class Grid(Protocol):
    """Whatever says how large images are."""

    @property
    def box(self) -> int:
        """Samples a side."""

    @property
    def pixel_size_angst(self) -> float:
        """Of the images."""


def map_like(path: Path, images: Grid, what: str) -> Tensor:
    """A map that must have the images' box and pixel size, shape (N, N, N), float32.

    Raises
    ------
    CryoreconError
        If it has others.
    """
    found = read_map(path)
    box, pixel = images.box, images.pixel_size_angst
    if len(found.data) != box or abs(found.pixel_size_angst / pixel - 1) > 0.01:
        raise CryoreconError(
            f"The {what} {path} has {len(found.data)} px at {found.pixel_size_angst:g} A, the "
            f"particles {box} px at {pixel:g} A",
            f"Resample the {what} to the particles' box and pixel size",
        )
    return torch.from_numpy(found.data).float()
