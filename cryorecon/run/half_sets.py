"""Which half set each particle belongs to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryorecon.io.particles import Particles
from cryorecon.run.repeats import Repeats

# A half set with fewer images, or a smaller share of all, hardly makes a map.
_LEAST, _LEAST_SHARE = 20, 0.1


def half_sets(
    particles: Particles,
    generator: torch.Generator,
    same: Repeats,
    say: Callable[[str], None] | None = None,
) -> Tensor:
    """Half set of each particle, 0 or 1: the STAR file's, or drawn at random.

    Particles that are the same share a half set that is drawn: half maps with one image in both
    would agree in its noise.

    Parameters
    ----------
    same : Repeats
        Of these particles.
    say : callable, optional
        Told what users would not expect.
    """
    tell = say or (lambda _: None)
    given, first = particles.random_subsets(), same.first
    for text in same.texts():
        tell(f"WARNING: {text}")
    if given is not None and len(np.unique(given)) == 2:
        _doubt(given, None if first is None else first.numpy(), tell)
        return torch.from_numpy(given) - 1
    if given is not None:
        tell(f"all particles are of half set {given[0]}: new half sets are drawn")
    half = torch.randperm(len(particles), generator=generator) % 2
    return half if first is None else half[first]


def _doubt(
    given: NDArray[np.int64], first: NDArray[np.int64] | None, tell: Callable[[str], None]
) -> None:
    """Say what is wrong with the STAR file's half sets."""
    counts = np.bincount(given, minlength=3)[1:]
    small = int(counts.argmin())
    remedy = "as rlnRandomSubset says; remove the column to have them drawn"
    if counts[small] < max(_LEAST, _LEAST_SHARE * len(given)):
        tell(f"WARNING: half set {small + 1} has {counts[small]} of {len(given)} images, {remedy}")
    if first is not None and (given != given[first]).any():
        tell(f"WARNING: half sets share particles, so that their maps agree too well, {remedy}")
