"""Reading poses off images: what an encoder sees, and what its guesses mean for the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.engines.observations import Observations
from cryorecon.networks.encoders import PoseEncoder
from cryorecon.physics.fourier import half_plane, to_images
from cryorecon.physics.masks import soft_ball


@dataclass(frozen=True)
class Guesses:
    """Poses that the encoder offers.

    Attributes
    ----------
    rotations : Tensor, shape (b, c, 3, 3)
    offsets_px : Tensor, shape (b, c, 2)
        Of the images' own grid.
    """

    rotations: Tensor
    offsets_px: Tensor

    def chosen(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """One of each image's guesses: rotations (b, 3, 3) and offsets (b, 2)."""
        rows = torch.arange(len(index), device=index.device)
        return self.rotations[rows, index], self.offsets_px[rows, index]


def turned(images: Tensor) -> Tensor:
    """Images turned by pi about their origin, pixel ``N // 2``; shape (..., N, N)."""
    flipped = torch.flip(images, (-2, -1))
    return flipped if images.shape[-1] % 2 else torch.roll(flipped, (1, 1), (-2, -1))


class PoseReader:
    """An encoder with the way from an observation to it and from its outputs to poses.

    Parameters
    ----------
    encoder : PoseEncoder
    diameter : float
        Of the circular mask, as a fraction of the box side.
    pixel_size_angst : float
        Of the images, not of what the encoder sees.
    symmetric : bool
        Whether the image turned by pi is read as well: twice as many guesses.
    reweighted : bool
        Whether images are multiplied by their CTF first.
    """

    def __init__(
        self,
        encoder: PoseEncoder,
        diameter: float,
        pixel_size_angst: float,
        *,
        symmetric: bool,
        reweighted: bool,
    ) -> None:
        self.encoder, self.pixel_size_angst = encoder, pixel_size_angst
        self.symmetric, self.reweighted = symmetric, reweighted
        size = encoder.config.input_size
        device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        self.plane = half_plane(size).to(device)
        self.disc = soft_ball(size, diameter / 2 * size, 0.07 * size, 2, device=device)

    def __call__(self, whole: Observations) -> Guesses:
        """Guesses for observations up to the highest frequency."""
        return self.of_images(self.images(whole))

    def images(self, whole: Observations) -> Tensor:
        """Images as the encoder sees them: cropped to its size, masked; shape (b, E, E)."""
        coefficients = whole.coefficients
        if self.reweighted:
            coefficients = coefficients * whole.ctf
        count = min(len(self.plane), len(whole.plane))
        plane = self.plane.within(float(whole.plane.radius[count - 1]))
        images = to_images(coefficients[:, : len(plane)], plane)
        return images * self.disc.to(images)

    def of_images(self, images: Tensor) -> Guesses:
        """Poses for images as the encoder sees them; those of the turned path turned back."""
        if not self.symmetric:
            rotations, shifts = self.encoder(images)
            return Guesses(rotations, shifts / self.pixel_size_angst)
        rotations, shifts = self.encoder(torch.cat([images, turned(images)]))
        one, two = rotations.chunk(2)
        # A half turn in the image's plane, without numbers that a device would be waited for.
        half_turned = torch.cat([-two[..., :2, :], two[..., 2:, :]], -2)
        offsets = torch.cat([shifts[: len(images)], -shifts[len(images) :]], 1)
        both = torch.cat([one, half_turned], 1)
        return Guesses(both, offsets / self.pixel_size_angst)
