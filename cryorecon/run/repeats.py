"""Particles that were picked twice: the same image, or the same place of a micrograph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree
from torch import Tensor

from cryorecon.engines.reconstruction import RefineConfig
from cryorecon.errors import CryoreconError
from cryorecon.io.optics import of_groups
from cryorecon.io.particles import Particles
from cryorecon.io.star import numbers

_WHERE = ("rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY")
# Of micrographs, before particles were extracted in larger pixels.
_MICROGRAPH_PIXEL = "rlnMicrographOriginalPixelSize"
# Pieces of a filament overlap as they should.
_FILAMENT = "rlnHelicalTubeID"
# Centres of two particles are farther apart than this share of their diameter, but for those of
# needles side by side.
_NEAR = 0.15
# Tables of fewer places than this share of their particles do not state them.
_PLACES = 0.5


@dataclass(frozen=True)
class Repeats:
    """Which particles are the same.

    Attributes
    ----------
    first : Tensor, shape (n,), int64, optional
        Row of the first one that is the same, of each particle; None if all differ.
    n, n_images, n_places : int
        Particles; how many show the image of an earlier one, and how many others lie at its place.
    near_angst : float
        What counts as one place.
    """

    first: Tensor | None
    n: int
    n_images: int
    n_places: int
    near_angst: float

    def texts(self) -> list[str]:
        """What users are told, a line for each kind."""
        found, every = [], f"of {self.n} particles"
        if self.n_images:
            found.append(f"{self.n_images} {every} show an image that another one shows")
        if self.n_places:
            found.append(
                f"{self.n_places} {every} lie within {self.near_angst:.0f} A of "
                "another one of their micrograph: picked twice, they count twice; remove duplicates"
            )
        return found


def repeats(particles: Particles, diameter: float = RefineConfig.diameter) -> Repeats:
    """Particles that are the same as others.

    Parameters
    ----------
    diameter : float
        Of the particle, as a fraction of the box side.
    """
    near_angst = _NEAR * diameter * particles.box * particles.pixel_size_angst
    one_image, every = particles.first_with_image(), np.arange(len(particles))
    first = every if one_image is None else one_image
    n_images = int((first != every).sum())
    pairs = _near_pairs(particles, near_angst)
    if len(pairs):
        pairs = np.concatenate([pairs, np.stack([every, first], -1)])
        links = coo_array((np.ones(len(pairs), bool), pairs.T), shape=(len(every),) * 2)
        which = connected_components(links, directed=False)[1]
        _, start, back = np.unique(which, return_index=True, return_inverse=True)
        first = start[back]
    n = int((first != every).sum())
    same = torch.from_numpy(first) if n else None
    return Repeats(same, len(every), n_images, n - n_images, near_angst)


def _near_pairs(particles: Particles, near_angst: float) -> NDArray[np.int64]:
    """Rows of particles whose centres are near each other in one micrograph, shape (pairs, 2)."""
    table, none = particles.table, np.zeros((0, 2), np.int64)
    if not set(_WHERE) <= set(table) or _FILAMENT in table:
        return none
    try:
        pixel = _micrograph_pixels_angst(particles)
        place = [numbers(particles.path, table, name, finite=False) for name in _WHERE[1:]]
    except CryoreconError:  # Nothing else reads these.
        return none
    micrograph = np.unique(np.asarray(table[_WHERE[0]], dtype=str), return_inverse=True)[1]
    # Micrographs lie one above the other, farther apart than what is near.
    at = np.stack([place[0] * pixel, place[1] * pixel, 2.0 * near_angst * micrograph], -1)
    if not np.isfinite(at).all() or len(np.unique(at, axis=0)) < _PLACES * len(at):
        return none
    return KDTree(at).query_pairs(near_angst, output_type="ndarray").astype(np.int64)


def _micrograph_pixels_angst(particles: Particles) -> NDArray[np.float64] | float:
    """Of each particle's micrograph; where it is not stated, that of the images."""
    optics = particles.blocks.get("optics")
    if optics is None or _MICROGRAPH_PIXEL not in optics:
        return particles.stored_pixel_size_angst
    return of_groups(particles.path, optics, _MICROGRAPH_PIXEL, particles.optics_index())
