"""Some images of a table, that are looked at before a job begins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryorecon.io.mrc import StackReader
from cryorecon.io.particles import Particles
from cryorecon.physics.resampling import downsample_images
from cryorecon.run.image_checks import kinds_of_unfit

# Images that are looked at, spread over the table; that are read at once; pixels a side, at most.
_LOOKED_AT, _AT_ONCE, _BOX = 1000, 50, 64


@dataclass(frozen=True)
class Sample:
    """Some particles and their images, in a small box.

    Attributes
    ----------
    particles : Particles
        Those of the sample, cropped.
    images : Tensor, shape (n, N, N), float32
    """

    particles: Particles
    images: Tensor

    def __len__(self) -> int:
        return len(self.images)


def sample_of(particles: Particles) -> Sample:
    """A thousand images, spread over the table; those that no engine can work with left out."""
    small = particles.cropped(_BOX)
    rows = np.unique(np.linspace(0, len(small) - 1, _LOOKED_AT).round().astype(np.int64))
    # Some at a time: they may be large on disk.
    reader, kept, images = StackReader(), [], []
    for part in np.array_split(rows, -(-len(rows) // _AT_ONCE)):
        whole = torch.from_numpy(small.read(part, reader))
        fit = kinds_of_unfit(whole) == 0
        kept.append(part[fit.numpy()])
        images.append(downsample_images(whole[fit], small.box))
    return Sample(small.subset(np.concatenate(kept)), torch.cat(images))
