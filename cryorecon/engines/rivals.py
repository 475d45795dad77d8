"""Images that may have one pose or another: each of these poses gets its share of the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.engines.observations import taken_to
from cryorecon.image_table import ROWS, image_table, kept
from cryorecon.physics.rotations import geodesic_distance_deg
from cryorecon.physics.symmetry import commonest_turn

# Rivals of an image that are kept. Log-likelihoods count for less by this factor, since the map
# that they are found in has noise of its own; smaller shares are not worth the work.
N_RIVALS, _TEMPERATURE, _LEAST_SHARE = 3, 1.5, 0.02
# Poses this near each other are the same, for the rounds of refinement that follow.
SAME_DEG = 5.0
# An image is in doubt where less of it than this belongs to its pose.
SURE = 0.9
# Of right maps, also from images that hardly tell their poses, up to 0.56 of the images are; of
# wrong ones 0.65 to 1.
MOST_IN_DOUBT = 0.6
# Another pose takes the place of an image's own if it is surely likelier.
_LIKELIER = 1.0

# Rivals that are asked for the turn they lie away, at most.
_RIVALS_ASKED = 5000

PosePair = tuple[Tensor, Tensor]


@dataclass
class Rivals:
    """Poses that images may have instead of their own, k each.

    A map is then the mean over what is not known, as in expectation maximisation, and right poses
    that are not the likeliest yet are part of it. Rivals stay as they were found, in a map that
    does not hold their images' noise.

    Attributes
    ----------
    rotations : Tensor, shape (n, k, 3, 3)
        On the CPU, as are the others (:mod:`cryorecon.image_table`).
    offsets_px : Tensor, shape (n, k, 2)
    share : Tensor, shape (n, k)
        Of the image, 0 to 1; what is left belongs to its own pose.
    """

    rotations: Tensor
    offsets_px: Tensor
    share: Tensor

    @staticmethod
    def none(n_images: int) -> Rivals:
        """Of images that have no other pose yet."""
        shape = n_images, N_RIVALS
        return Rivals(image_table(*shape, 3, 3), image_table(*shape, 2), image_table(*shape))

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three of them."""
        return self.rotations, self.offsets_px, self.share

    def copied(self) -> Rivals:
        """The same in tables of their own."""
        return Rivals(*(kept(table) for table in self.tables()))

    def own_share(self) -> Tensor:
        """How much of every image belongs to its own pose, shape (n,)."""
        return _left(self.share)

    def in_doubt(self) -> float:
        """Share of the images that may have another pose."""
        return float((self.own_share() < SURE).double().mean())

    def commonest_turn(self, own: Tensor) -> tuple[float, float]:
        """The turn of the map that most rivals lie away from their images' own poses.

        Copies in a symmetric particle are a turn apart that is the same for all images; rivals of
        other particles lie anywhere, and many beside their image's own pose, which is no turn.

        Parameters
        ----------
        own : Tensor, shape (n, 3, 3)

        Returns
        -------
        share : float
            Of the rivals, 0 where there is none.
        angle_deg : float
        """
        image, rival = torch.nonzero(self.share, as_tuple=True)
        asked = slice(None, None, max(1, len(image) // _RIVALS_ASKED))
        image, rival = image[asked], rival[asked]
        return commonest_turn(own[image].mT @ self.rotations[image, rival])

    def put(self, rows: Tensor, others: Rivals) -> None:
        """Take those of some images from others'."""
        for table, new in zip(self.tables(), others.tables(), strict=True):
            table[rows] = new

    def move(self, move: Callable[[Tensor, Tensor], PosePair]) -> None:
        """Change all poses, as rotations (m, 3, 3) and offsets (m, 2), the way own poses change."""
        pairs = zip(self.rotations.split(ROWS), self.offsets_px.split(ROWS), strict=True)
        for rotations, offsets_px in pairs:
            turned, shifted = move(rotations.flatten(0, 1), offsets_px.flatten(0, 1))
            rotations.copy_(turned.view_as(rotations))
            offsets_px.copy_(shifted.view_as(offsets_px))

    def fold(self, own: Tensor, group: Tensor) -> None:
        """Give poses that a symmetric map cannot tell from an image's own one back to it.

        Parameters
        ----------
        own : Tensor, shape (n, 3, 3)
        group : Tensor, shape (g, 3, 3)
            Rotations that leave the map as it is: A and A g are one pose.
        """
        for rotation in group.to(own):
            apart = geodesic_distance_deg(self.rotations, (own @ rotation)[:, None])
            self.share[apart < SAME_DEG] = 0

    def of(self, rows: Tensor, device: torch.device) -> Doubt:
        """What of some images belongs to which other poses, on a device."""
        share = self.share[rows]
        image, rival = torch.nonzero(share, as_tuple=True)
        at = rows[image], rival
        found = _left(share), image, self.rotations[at], self.offsets_px[at], share[image, rival]
        return Doubt(*(taken_to(values, device) for values in found))


@dataclass(frozen=True)
class Doubt:
    """Other poses that some images, b in all, may have: m, one after the other.

    Attributes
    ----------
    own : Tensor, shape (b,)
        Share of an image's own pose.
    image : Tensor, shape (m,), int64
        Which of the b each belongs to.
    rotations : Tensor, shape (m, 3, 3)
    offsets_px : Tensor, shape (m, 2)
    share : Tensor, shape (m,)
    """

    own: Tensor
    image: Tensor
    rotations: Tensor
    offsets_px: Tensor
    share: Tensor


def _left(share: Tensor) -> Tensor:
    return (1 - share.sum(1)).clamp(min=0.0)


def weighed(gain: Tensor, held: PosePair, others: PosePair) -> tuple[Tensor, PosePair, Rivals]:
    """An image's pose, and its rivals with their shares, from likelihoods.

    Parameters
    ----------
    gain : Tensor, shape (b, k)
        Log-likelihoods of other poses, beyond the own one's; descending, -inf for none.
    held : tuple of Tensor, shapes (b, 3, 3) and (b, 2)
        Own poses.
    others : tuple of Tensor, shapes (b, k, 3, 3) and (b, k, 2)

    Returns
    -------
    moved : Tensor, shape (b,), bool
        Whether the first of the others has taken the own one's place.
    held : tuple of Tensor
        The poses that images have from now on.
    rivals : Rivals
    """
    gain = torch.cat([torch.zeros_like(gain[:, :1]), gain], 1)
    share = torch.softmax(gain / _TEMPERATURE, 1)
    share = share.where(share > _LEAST_SHARE, 0.0)
    share = share / share.sum(1, keepdim=True)
    moved = gain[:, 1] > _LIKELIER
    order = torch.arange(gain.shape[1]).repeat(len(gain), 1)
    order[moved, :2] = torch.tensor([1, 0])
    rows = torch.arange(len(gain))[:, None]
    poses = [torch.cat([own[:, None], new], 1) for own, new in zip(held, others, strict=True)]
    rotations, offsets_px, share = (table[rows, order] for table in (*poses, share))
    rivals = Rivals(rotations[:, 1:], offsets_px[:, 1:], share[:, 1:])
    return moved, (rotations[:, 0], offsets_px[:, 0]), rivals
