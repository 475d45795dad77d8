"""How wide particles are, as their images tell."""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.physics.ctf import ctf
from cryorecon.physics.fourier import half_plane, radius_grid, to_coefficients, to_images
from cryorecon.run.sample import Sample

# Detail that is looked at, in cycles per box; more of it is noise.
_BAND = 12.0
# Share of the largest variance that a ring of the particle has at least, and standard errors; how
# many of these the largest must have, or a particle's rim would be lost in the noise.
_EDGE, _SURE, _SEEN = 0.03, 4.0, 40.0
# Beyond this share of the box, in its corners, there is no particle.
_CORNER = 0.5
# Widths that can be told, as shares of the box.
_NARROWEST, _WIDEST = 0.15, 0.95


def particle_extent(sample: Sample) -> float | None:
    """Diameter of the circle that the particles lie in, as a share of the box.

    Images times their CTF vary more where there is a particle than in the corners of the box: the
    last ring whose variance, averaged over images, exceeds that of the corners by 3 % of what the
    strongest one does. Being off centre and a large defocus make particles look wider.

    Returns
    -------
    float, or None
        If the images show no particle, or it does not end within the box.
    """
    small = sample.particles
    plane = half_plane(small.box)
    optics = small.ctf_parameters()
    gain = ctf(plane.frequencies, optics, small.box, small.pixel_size_angst).float()
    return extent_of(sample.images, gain)


def extent_of(images: Tensor, gain: Tensor) -> float | None:
    """The same of images at hand.

    Parameters
    ----------
    images : Tensor, shape (n, N, N), real
    gain : Tensor, shape (n, m), real
        Their CTF at the coefficients of ``half_plane(N)``.
    """
    box = images.shape[-1]
    plane = half_plane(box)
    level = images - images.mean((-1, -2), keepdim=True)
    level = level / level.flatten(1).std(-1).clamp(min=1e-20)[:, None, None]
    soft = (1 - (plane.radius / min(_BAND, box / 2)) ** 2).clamp(min=0).float()
    seen = to_images(to_coefficients(level, plane) * gain * soft, plane).square()
    ring = (radius_grid(box, 2) + 0.5).long().flatten()
    count = torch.bincount(ring).clamp(min=1)
    sums = torch.zeros(len(images), len(count)).index_add_(1, ring, seen.flatten(1))
    corner = len(count) - 1 - int(_CORNER * box)
    inside = sums[:, : box // 2] / count[: box // 2]
    outside = sums[:, -corner:].sum(-1) / count[-corner:].sum()
    excess = inside - outside[:, None]
    mean, error = excess.mean(0), excess.std(0) / len(images) ** 0.5
    peak = float(mean.max())
    if not peak > _SEEN * float(error.median()):
        return None
    signal = mean > torch.maximum(_SURE * error, mean.new_tensor(_EDGE * peak))
    if not bool(signal.any()):
        return None
    width = 2 * (int(signal.nonzero().max()) + 1) / box
    return width if _NARROWEST <= width <= _WIDEST else None
