"""What images show at once: white particles or black ones, and much brighter things."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from cryorecon.engines.observations import ImageSet
from cryorecon.physics.fourier import radius_grid, to_coefficients

Contrast = Literal["auto", "white", "black"]

# The contrast counts as told from this many standard errors on.
SURE = 4.0
# First zero of a solid ball's transform, in cycles per diameter. Beyond it a molecule's may have
# either sign, and there is most of what images with little amplitude contrast show.
FIRST_LOBE = 1.43
# Band of searches, in cycles per diameter.
_COARSE = 3.2


# Images that are looked at together.
_AT_ONCE = 500
# Images count as outshining the others beyond so many standard deviations, of those without such.
_OUTSHINES, _USUAL = 15.0, 3.0
# And by this factor, at least: many rows may show one image.
_TIMES = 2.0


@dataclass(frozen=True)
class FirstLook:
    """What images show at once.

    Attributes
    ----------
    scores : Tensor, shape (n,), float64
        Of each image, how well a white solid ball of the particle's diameter fits it.
    power, shares : Tensor, shape (n,), float64
        In units of the noise, mean of the coefficients that searches begin with; of a signal that
        falls as a solid ball's, the share that its CTF lets through, in any unit.
    """

    scores: Tensor
    power: Tensor
    shares: Tensor

    @staticmethod
    def at(images: ImageSet, diameter: float) -> FirstLook:
        """Look at all images.

        Every image is correlated with the CTF-modulated, whitened projection of a solid ball of
        the particle's diameter, its coarsest part.

        Parameters
        ----------
        images : ImageSet of n images
        diameter : float
            Of the particle, as a fraction of the box side.
        """
        plane = images.plane
        radius = diameter / 2 * plane.box
        distance = radius_grid(plane.box, 2, images.device).to(images.gain.dtype)
        whole = to_coefficients((radius**2 - distance**2).clamp(min=0).sqrt(), plane)
        # The origin is what levelling has made it.
        shown = plane.radius > 0
        ball = whole * (shown & (plane.radius * diameter < FIRST_LOBE)).to(images.device)
        coarse = (shown & (plane.radius * diameter < _COARSE)).to(images.device)
        power_of_ball = whole.abs() ** 2 * coarse
        scores, power, shares = [], [], []
        everyone = torch.arange(len(images))
        mine = images.mine(everyone)
        for rows, following in pairwise([*mine.split(_AT_ONCE), mine[:0]]):
            images.expect(following)
            batch = images.select(rows)
            matched, weight = batch.matched()
            fit = (matched * ball.conj()).real.sum(-1)
            # Nothing, where the images show nothing.
            scores.append(fit / (weight * ball.abs() ** 2).sum(-1).sqrt().clamp(min=1e-12))
            seen = batch.coefficients.abs().square() * batch.precision()
            power.append((seen * coarse).sum(-1) / coarse.sum().clamp(min=1))
            shares.append((weight * power_of_ball).sum(-1))
        found = (torch.cat(parts).double().cpu() for parts in (scores, power, shares))
        return FirstLook(*images.everyones(everyone, *found))

    def score(self, rows: Tensor | None = None) -> float:
        """How surely particles are white (positive) or black (negative), in standard errors.

        Mean of all images, or of some, divided by its standard error.
        """
        values = self.scores if rows is None else self.scores[rows]
        return float(values.mean() / (values.std() / len(values) ** 0.5).clamp(min=1e-12))

    def sure_groups(self, group: Tensor) -> tuple[list[int], list[int]]:
        """Groups of images, of those numbered by `group`, that are surely white, and black."""
        members = {int(k): group == k for k in group.unique()}
        scores = {k: self.score(rows) for k, rows in members.items() if int(rows.sum()) > 1}
        white = [k for k, score in scores.items() if score >= SURE]
        return white, [k for k, score in scores.items() if score <= -SURE]

    def dimming(self) -> Tensor:
        """Factor on each image, shape (n,): less than 1 where it outshines the others.

        Ice, carbon and aggregates may be ten times as bright as particles; a few of them would
        make the map. They are dimmed to what is usual of images with their CTF.
        """
        signal = ((self.power - 1) / self.shares.clamp(min=1e-12)).median().clamp(min=0)
        power = self.power / (1 + signal * self.shares)
        middle = power.median()
        spread = 1.4826 * (power - middle).abs().median()
        bright = power > torch.maximum(middle + _OUTSHINES * spread, _TIMES * middle)
        usual = (middle + _USUAL * spread) / power.clamp(min=1e-12)
        return torch.where(bright, usual.sqrt(), 1.0)


def contrast_score(images: ImageSet, diameter: float) -> float:
    """How surely particles are white (positive) or black (negative): see :class:`FirstLook`."""
    return FirstLook.at(images, diameter).score()
