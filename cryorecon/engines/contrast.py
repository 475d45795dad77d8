"""What images show at once: white particles or black ones, and much brighter things."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from cryorecon.engines.observations import ImageSet
from cryorecon.physics.fourier import HalfPlane, radius_grid, to_coefficients

Contrast = Literal["auto", "white", "black"]

# The contrast counts as told from this many standard errors on.
SURE = 4.0
# First zero of a solid ball's transform, in cycles per diameter. Beyond it a molecule's may have
# either sign, and there is most of what images with little amplitude contrast show.
FIRST_LOBE = 1.43
# Band of searches, in cycles per diameter.
COARSE = 3.2
# Images that are looked at together.
_AT_ONCE = 500
# Images count as outshining the others beyond so many standard deviations, of those without such.
_OUTSHINES, _USUAL = 15.0, 3.0
# And by this factor, at least: many rows may show one image.
_TIMES = 2.0


@dataclass(frozen=True)
class Coarse:
    """The coefficients that searches begin with.

    Attributes
    ----------
    plane : HalfPlane of m coefficients
    inside : Tensor, shape (m,)
        1 there, 0 elsewhere and at the origin, which is what levelling has made it.
    ball : Tensor, shape (m,), complex
        Projection of a solid ball of the particle's diameter.
    """

    plane: HalfPlane
    inside: Tensor
    ball: Tensor

    @staticmethod
    def of(plane: HalfPlane, diameter: float, device: torch.device, dtype: torch.dtype) -> Coarse:
        """For a particle's diameter as a fraction of the box side."""
        distance = radius_grid(plane.box, 2, device).to(dtype)
        shape = ((diameter / 2 * plane.box) ** 2 - distance**2).clamp(min=0).sqrt()
        shown = (plane.radius > 0) & (plane.radius * diameter < COARSE)
        return Coarse(plane, shown.to(device), to_coefficients(shape, plane))

    def seen(
        self, coefficients: Tensor, weight: Tensor, precision: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Power of images in units of the noise, and the share of it that their CTFs let through.

        Parameters
        ----------
        coefficients : Tensor, shape (b, m), complex
        weight : Tensor, shape (b, m)
            CTF squared over the noise's power.
        precision : Tensor, shape (b, m)
            One over the noise's power.

        Returns
        -------
        power : Tensor, shape (b,)
            Mean over the coefficients.
        share : Tensor, shape (b,)
            Of a signal that falls as a solid ball's, in any unit.
        """
        power = coefficients.abs().square() * precision
        share = weight * self.ball.abs().square() * self.inside
        mean = (power * self.inside).sum(-1) / self.inside.sum().clamp(min=1)
        return mean, share.sum(-1)


@dataclass(frozen=True)
class Usual:
    """What is usual of images, whatever their CTF.

    Attributes
    ----------
    signal : Tensor, scalar
        Power that the particle adds, over the share that the CTF lets through.
    middle, spread : Tensor, scalar
        Median of images' power relative to what is expected, and its standard deviation.
    """

    signal: Tensor
    middle: Tensor
    spread: Tensor

    @staticmethod
    def of(power: Tensor, shares: Tensor) -> Usual:
        """Of images whose power and shares, each of shape (n,), :class:`Coarse` has found."""
        signal = ((power - 1) / shares.clamp(min=1e-12)).median().clamp(min=0)
        power = power / (1 + signal * shares)
        middle = power.median()
        return Usual(signal, middle, 1.4826 * (power - middle).abs().median())

    def dimming(self, power: Tensor, shares: Tensor) -> Tensor:
        """Factor on each image, shape (n,): less than 1 where it outshines what is usual.

        Ice, carbon and aggregates may be ten times as bright as particles; a few of them would
        make the map. They are dimmed to what is usual of images with their CTF.
        """
        power = power / (1 + self.signal * shares)
        least = torch.maximum(self.middle + _OUTSHINES * self.spread, _TIMES * self.middle)
        usual = (self.middle + _USUAL * self.spread) / power.clamp(min=1e-12)
        return torch.where(power > least, usual.sqrt(), 1.0)


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
        coarse = Coarse.of(images.plane, diameter, images.device, images.gain.dtype)
        # The origin is what levelling has made it.
        radius = images.plane.radius
        lobe = ((radius > 0) & (radius * diameter < FIRST_LOBE)).to(images.device)
        ball = coarse.ball * lobe
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
            seen = coarse.seen(batch.coefficients, weight, batch.precision())
            power.append(seen[0])
            shares.append(seen[1])
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
        """Factor on each image, shape (n,): see :meth:`Usual.dimming`."""
        return Usual.of(self.power, self.shares).dimming(self.power, self.shares)


def contrast_score(images: ImageSet, diameter: float) -> float:
    """How surely particles are white (positive) or black (negative): see :class:`FirstLook`."""
    return FirstLook.at(images, diameter).score()
