"""The reverse task: projections of the current map, whose poses are known, teach the encoder.

As in ACE-EM, with the CTFs and the noise of the images at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.engines.observations import Observations, taken_to
from cryorecon.engines.pose_reader import PoseReader
from cryorecon.physics.fourier import HalfPlane, shift_phases
from cryorecon.physics.projection import Transform, extract_slices
from cryorecon.physics.rotations import random_rotations

Drawn = tuple[Tensor, ...]


@dataclass
class ReverseTask:
    """What an encoder is asked of the map's own projections.

    Attributes
    ----------
    reader : PoseReader
    offset_range_px : float
        Unit of offsets in the loss.
    offset_spread_px : float
        Standard deviation of the offsets that are drawn.
    """

    reader: PoseReader
    offset_range_px: float
    offset_spread_px: float

    def draw(self, n: int, plane: HalfPlane, generator: torch.Generator) -> Drawn:
        """Chance in n projections of the map.

        Parameters
        ----------
        plane : HalfPlane of m coefficients
        generator : torch.Generator
            On the CPU.

        Returns
        -------
        rotations : Tensor, shape (n, 3, 3)
        offsets_px : Tensor, shape (n, 2)
        noise : Tensor, shape (n, m, 2)
            White, of unit variance.
        """
        rotations = random_rotations(n, generator, torch.float32)
        offsets = torch.randn(n, 2, generator=generator) * self.offset_spread_px
        return rotations, offsets, torch.randn(n, len(plane), 2, generator=generator)

    def loss(
        self, whole: Observations, transform: Transform, drawn: Drawn, band: float
    ) -> tuple[Tensor, Tensor]:
        """Distance of the best guess from known poses of the map's own noisy projections.

        Parameters
        ----------
        As of :meth:`projections`.

        Returns
        -------
        loss : Tensor, scalar
        median_deg : Tensor, scalar
            Of the rotations alone.
        """
        rotations, offsets, images = self.projections(whole, transform, drawn, band)
        guesses = self.reader.of_images(images)
        turn = (guesses.rotations - rotations[:, None]).square().sum((-2, -1))
        spread = max(self.offset_range_px, 1e-6)
        apart = turn + ((guesses.offsets_px - offsets[:, None]) / spread).square().sum(-1)
        nearest = apart.min(-1)
        # ||A - B||^2 = 8 sin^2(angle / 2).
        sine = turn.gather(1, nearest.indices[:, None]).detach().median().div(8).sqrt()
        angle = 2 * torch.rad2deg(torch.asin(sine.clamp(max=1)))
        return nearest.values.mean(), angle

    def projections(
        self, whole: Observations, transform: Transform, drawn: Drawn, band: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projections of the current map with the CTFs and the noise of a batch.

        Parameters
        ----------
        whole : Observations of b images
        transform : Transform
            Of the map, up to the band in use.
        drawn : tuple of Tensor
            From :meth:`draw`, for b images.
        band : float
            In use, in cycles per box.

        Returns
        -------
        rotations, offsets_px : Tensor, shape (b, 3, 3) and (b, 2)
        images : Tensor, shape (b, E, E)
            As the encoder sees them.
        """
        rotations, offsets, noise = (taken_to(values, whole.device) for values in drawn)
        with torch.no_grad():
            plane = whole.plane.within(band)
            slices = extract_slices(transform, rotations, plane)
            slices = slices * shift_phases(offsets, plane) * whole.ctf[:, : len(plane)]
            spectrum = whole.noise_power[:, whole.plane.shell][whole.group]
            values = torch.view_as_complex(noise) * (spectrum / 2).sqrt()
            values[:, : len(plane)] += slices.to(values.dtype)
        return rotations, offsets, self.reader.images(whole.with_coefficients(values))
