"""Tables with a row for each image, on disk where they are long."""

from __future__ import annotations

import math
import os
import tempfile

import numpy as np
import torch
from torch import Tensor

# Rows of a long table that are gone through at a time.
ROWS = 1 << 17
# Bytes beyond which a table is an unnamed file of the folder for temporary ones, mapped to memory.
_IN_MEMORY = 8_000_000


def image_table(*shape: int) -> Tensor:
    """Zeros, float32, in memory if they are few; else in a mapped file that vanishes with them.

    The kernel takes the memory of a mapped file back when it is needed for something else. Where
    the folder for temporary files (``TMPDIR``) has no room, the table is in memory however long.

    Parameters
    ----------
    shape : int
        The number of images first.
    """
    size = 4 * math.prod(shape)
    if size <= _IN_MEMORY:
        return torch.zeros(shape)
    try:
        with tempfile.TemporaryFile() as file:
            # Room is taken at once: writing to a mapped file on a full disk would end the process.
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))
    except OSError:
        return torch.zeros(shape)


def kept(values: Tensor) -> Tensor:
    """A copy, float32, in a table of its own.

    Parameters
    ----------
    values : Tensor, shape (n, ...)
        On the CPU.
    """
    table = image_table(*values.shape)
    return table.copy_(values)
