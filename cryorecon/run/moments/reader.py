"""Blocks of images with what the sums of moments need to know of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryorecon.engines.contrast import COARSE, Coarse, Usual
from cryorecon.engines.moments.forms import MomentsGeometry
from cryorecon.engines.moments.sums import MomentBatch
from cryorecon.engines.observations import taken_to
from cryorecon.errors import CryoreconError
from cryorecon.io.particles import Particles
from cryorecon.io.read_ahead import ReadAhead
from cryorecon.physics.ctf import CtfParameters, ctf
from cryorecon.physics.fourier import HalfPlane, half_plane, to_coefficients
from cryorecon.physics.imaging import noise_powers_outside, noise_unmixing
from cryorecon.physics.masks import soft_ball
from cryorecon.run.image_checks import FitImages
from cryorecon.run.load import levelled, normalised, with_next

# Images that tell what is usual: spread over the stack.
_SOME = 2_000
_BLOCK = 128
# By this factor noise of images that are little but noise may seem to exceed all of them.
_MOST_NOISE = 1.3


@dataclass(frozen=True)
class Brightness:
    """What is usual of a stack's images.

    Attributes
    ----------
    coarse : Coarse
    noise_power : Tensor, shape (n_shells,)
        Of most images.
    usual : Usual
    """

    coarse: Coarse
    noise_power: Tensor
    usual: Usual

    @staticmethod
    def at(coarse: Coarse, coefficients: Tensor, gain: Tensor, noise_powers: Tensor) -> Brightness:
        """As some images, as many as rows, tell; see :meth:`outshining`."""
        # Noise where something bright reaches beyond the particle is no noise: hence the median.
        level = noise_powers.median(0).values
        noise = torch.maximum(level, 1e-3 * level.mean())
        precision = (1 / noise)[coarse.plane.shell].expand_as(gain)
        return Brightness(
            coarse, noise, Usual.of(*coarse.seen(coefficients, gain**2 * precision, precision))
        )

    def outshining(self, coefficients: Tensor, gain: Tensor) -> Tensor:
        """Which images are much brighter than is usual, shape (b,), bool.

        Parameters
        ----------
        coefficients : Tensor, shape (b, m), complex
            Of the coarse plane.
        gain : Tensor, shape (b, m)
            Their CTF there.
        """
        precision = (1 / self.noise_power)[self.coarse.plane.shell].expand_as(gain)
        seen = self.coarse.seen(coefficients, gain**2 * precision, precision)
        return self.usual.dimming(*seen) < 1


@dataclass(frozen=True)
class Reader:
    """Blocks of images, on the device of the plane, without those that no sum should hold.

    Those cannot be worked with (:class:`FitImages`), or outshine the others.

    Attributes
    ----------
    images : ReadAhead
    fit : FitImages
    geometry : MomentsGeometry
    optics : CtfParameters, optional
        None where the CTF is not corrected for.
    offsets_px : Tensor, shape (n, 2)
    plane : HalfPlane
    outside : Tensor, shape (N, N)
        1 outside the particle.
    unmixing : Tensor, shape (n_shells, n_shells)
        See :func:`noise_unmixing`.
    brightness : Brightness, optional
        None while it is not known.
    """

    images: ReadAhead
    fit: FitImages
    geometry: MomentsGeometry
    optics: CtfParameters | None
    offsets_px: Tensor
    plane: HalfPlane
    outside: Tensor
    unmixing: Tensor
    brightness: Brightness | None = None

    @staticmethod
    def of(particles: Particles, geometry: MomentsGeometry, device: torch.device | str) -> Reader:
        """A reader that has looked at some of the images."""
        origins = torch.from_numpy(particles.origins_angst() / particles.pixel_size_angst)
        radius_px, plane = geometry.diameter / 2 * geometry.box, half_plane(geometry.box)
        reader = Reader(
            ReadAhead(particles),
            FitImages(particles),
            geometry,
            particles.ctf_parameters() if geometry.ctf else None,
            origins,
            plane.to(device),
            (1 - soft_ball(geometry.box, radius_px, 2.0, 2)).to(device),
            noise_unmixing(radius_px, plane).to(device),
        )
        return replace(reader, brightness=reader._brightness())

    def read(self, rows: Tensor, frequencies: Tensor, following: Tensor) -> MomentBatch:
        """Images of some rows, centred, then normalised, with CTF and noise.

        What lies outside a particle is told once it is in the middle. The following images are
        read while these are worked on.
        """
        self.images.expect(following.numpy())
        rows, images = self._fit(rows)
        if len(rows) == 0:
            return MomentBatch(images, None, None, images.new_empty(0, self.plane.n_shells))
        images, rest, power = self._prepared(rows, images)
        if self.brightness is not None:
            bright = self.brightness.outshining(*self._seen(rows, images, self.brightness.coarse))
            if bool(bright.any()):
                kept = torch.nonzero(~bright)[:, 0]
                images, power, kept = images[kept], power[kept], kept.cpu()
                rows, rest = rows[kept], None if rest is None else rest[kept]
        return MomentBatch(images, rest, self._ctf(rows, frequencies), power)

    def _fit(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Those rows that can be worked with, and their images as they are on disk."""
        images = self.fit.emptied(rows, torch.from_numpy(self.images.images(rows.numpy())))
        fit = self.fit.fit[rows]
        return rows[fit], images[fit]

    def _prepared(self, rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images, the rest of their origins and the power of their noise."""
        geometry, device = self.geometry, self.outside.device
        images, rest = centred_images(taken_to(images, device), self.offsets_px[rows])
        if not geometry.normalised:
            images = levelled(images, self.outside)
            _refuse_more_noise_than_images(geometry.noise_std, images)
            level = (geometry.noise_std * geometry.box) ** 2
            power = torch.full((len(rows), self.plane.n_shells), level, device=device)
            return images, rest, power
        images = normalised(images, self.outside)
        radius_px = geometry.diameter / 2 * geometry.box
        return images, rest, noise_powers_outside(images, radius_px, self.plane, self.unmixing)

    def _ctf(self, rows: Tensor, frequencies: Tensor) -> Tensor | None:
        if self.optics is None:
            return None
        device, geometry = self.outside.device, self.geometry
        optics = self.optics[rows].to(device)
        return ctf(frequencies.to(device), optics, geometry.box, geometry.pixel_size_angst)

    def _seen(self, rows: Tensor, images: Tensor, coarse: Coarse) -> tuple[Tensor, Tensor]:
        """Coefficients of the coarse plane, and the CTF there."""
        found, gain = (
            to_coefficients(images, coarse.plane),
            self._ctf(rows, coarse.plane.frequencies),
        )
        return found, torch.ones_like(found.real) if gain is None else gain.float()

    def _brightness(self) -> Brightness | None:
        particles, diameter = self.images.particles, self.geometry.diameter
        plane = self.plane.within(COARSE / diameter)
        coarse = Coarse.of(plane, diameter, self.outside.device, torch.float32)
        stride = -(-len(particles) // _SOME)
        blocks = particles.in_file_order(_BLOCK * stride)
        parts = []
        for rows, following in with_next(torch.from_numpy(block[::stride]) for block in blocks):
            self.images.expect(following.numpy())
            rows, images = self._fit(rows)
            if len(rows) == 0:
                continue
            images, _, power = self._prepared(rows, images)
            parts.append((*self._seen(rows, images, coarse), power))
        if not parts:
            return None
        return Brightness.at(coarse, *(torch.cat(part) for part in zip(*parts, strict=True)))


def _refuse_more_noise_than_images(noise_std: float, images: Tensor) -> None:
    """Of a block: what is left of them would be no power but less than nothing."""
    found = float(images.square().mean()) ** 0.5
    if noise_std > _MOST_NOISE * found:
        raise CryoreconError(
            f"--noise-std {noise_std:g} is more than all that images show, of standard deviation "
            f"{found:.3g}",
            "Give it in the units of the file, or leave it out: it is then measured",
        )


def centred_images(images: Tensor, offsets_px: Tensor) -> tuple[Tensor, Tensor | None]:
    """Move particles to the centre by whole pixels, around the borders; and what is left.

    Moving by whole pixels keeps white noise white over the whole box.

    Parameters
    ----------
    images : Tensor, shape (b, N, N)
    offsets_px : Tensor, shape (b, 2)
        (ox, oy): content lies at minus the origin.

    Returns
    -------
    images : Tensor, shape (b, N, N)
    rest : Tensor, shape (b, 2), or None where nothing is left
    """
    if not bool(offsets_px.any()):
        return images, None
    whole = offsets_px.round().long()
    moved = [
        image.roll((int(y), int(x)), (0, 1)) for image, (x, y) in zip(images, whole, strict=True)
    ]
    return torch.stack(moved), offsets_px - whole
