"""Whether particles are white on black, as the image model has them, or black on white."""

from __future__ import annotations

from typing import Literal

import torch

from cryorecon.engines.observations import ImageSet
from cryorecon.physics.fourier import radius_grid, to_coefficients

Contrast = Literal["auto", "white", "black"]

# The contrast counts as told from this many standard errors on.
SURE = 4.0
# First zero of a solid ball's transform, in cycles per diameter. Beyond it a molecule's may have
# either sign, and there is most of what images with little amplitude contrast show.
FIRST_LOBE = 1.43


def contrast_score(images: ImageSet, diameter: float) -> float:
    """How surely particles are white (positive) or black (negative), in standard errors.

    Every image is correlated with the CTF-modulated, whitened projection of a solid ball of the
    particle's diameter, its coarsest part; the score is the mean over the images divided by its
    standard error.

    Parameters
    ----------
    images : ImageSet of n images
    diameter : float
        Of the particle, as a fraction of the box side.
    """
    plane = images.plane
    radius = diameter / 2 * plane.box
    distance = radius_grid(plane.box, 2, images.device).to(images.gain.dtype)
    ball = to_coefficients((radius**2 - distance**2).clamp(min=0).sqrt(), plane)
    # The origin is what levelling has made it.
    ball = ball * ((plane.radius > 0) & (plane.radius * diameter < FIRST_LOBE)).to(images.device)
    scores = []
    everyone = torch.arange(len(images))
    for rows in images.mine(everyone).split(500):
        matched, weight = images.select(rows).matched()
        fit = (matched * ball.conj()).real.sum(-1)
        # Nothing, where the images show nothing.
        scores.append(fit / (weight * ball.abs() ** 2).sum(-1).sqrt().clamp(min=1e-12))
    (values,) = images.everyones(everyone, torch.cat(scores).double())
    return float(values.mean() / (values.std() / len(values) ** 0.5).clamp(min=1e-12))
