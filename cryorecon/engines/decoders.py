"""What an amortized run holds its map in: explicit grids and networks, behind one interface.

A decoder gives the map's oversampled transform up to a band, for reading many slices at once, and
the slices that gradients go through. Grids read both from the transform; networks in Fourier
space are evaluated at the slices' own frequencies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cryorecon.networks.mfn import MfnConfig, ResidualMfn, grid_points, paper_bands, smallest_grid
from cryorecon.networks.siren import FourierKind, HermitianField, fourier_network
from cryorecon.physics.fourier import (
    HalfPlane,
    crop_or_pad_centred,
    ifft_centred,
    lowpass,
    radius_grid,
)
from cryorecon.physics.masks import Support
from cryorecon.physics.projection import (
    Transform,
    extract_slices,
    gridding_correction,
    padded_transform,
)
from cryorecon.physics.resampling import resample_sums

DecoderKind = Literal["grid", "log-grid", "rmfn", "fouriernet", "siren", "positional"]

_PADDING = 2
# Noise of a fresh map relative to its smooth ball, and its band in cycles per box.
_ROUGHNESS = 0.3
_ROUGH_BAND = 4.0


class Decoder(nn.Module, ABC):
    """A map with trainable parameters.

    Parameters
    ----------
    box : int
        Side of the images in pixels.
    support : Support
        Where the map may have density.
    """

    def __init__(self, box: int, support: Support) -> None:
        super().__init__()
        self.box, self.support = box, support
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    @abstractmethod
    def transform(self, band: float) -> Transform:
        """The map's transform up to `band` cycles per box."""

    def slices(self, transform: Transform, rotations: Tensor, plane: HalfPlane) -> Tensor:
        """Central slices with gradients for the map and the rotations.

        Parameters
        ----------
        transform : Transform
            From :meth:`transform`, under the same parameters.
        rotations : Tensor, shape (b, 3, 3)
        plane : HalfPlane of m coefficients

        Returns
        -------
        Tensor, shape (b, m), complex
        """
        return extract_slices(transform, rotations, plane)

    @abstractmethod
    def volume(self, band: float) -> Tensor:
        """The map up to `band` cycles per box on the images' grid, within its support."""


class _RealSpace(Decoder):
    """Decoders whose parameters give density."""

    @abstractmethod
    def density(self, band: float) -> Tensor:
        """The map on a grid that holds the band, shape (M, M, M); voxel sums."""

    def transform(self, band: float) -> Transform:
        """The map's transform up to `band` cycles per box."""
        return padded_transform(self.density(band), _PADDING, band)

    def volume(self, band: float) -> Tensor:
        """The map up to `band` cycles per box on the images' grid, within its support."""
        return lowpass(resample_sums(self.density(band), self.box), band, 3)


class GridDecoder(_RealSpace):
    """Density on the voxels of the smallest box that holds the largest band.

    Parameters
    ----------
    reach : int
        Largest band in cycles per box.
    generator : torch.Generator
        Draws the roughness of a fresh map, a smooth ball otherwise.
    """

    def __init__(self, box: int, support: Support, reach: int, generator: torch.Generator) -> None:
        super().__init__(box, support)
        size = min(box, smallest_grid(reach + 1))
        noise = torch.randn(size, size, size, generator=generator)
        rough = lowpass(noise, min(_ROUGH_BAND, reach), 3)
        ball = torch.exp(-((radius_grid(size, 3) / (0.3 * support.radius * 2 * size)) ** 2) / 2)
        mask = support.on(size)
        ball, rough = ball.float() * mask, rough * mask
        start = ball / ball.norm() + _ROUGHNESS * rough / rough.norm()
        self.voxels = nn.Parameter(start / start.std())
        self.mask: Tensor
        self.register_buffer("mask", mask)

    def density(self, band: float) -> Tensor:
        """The map on a grid that holds the band, shape (M, M, M); voxel sums."""
        del band
        return self.voxels * self.mask * self.scale


class LogGridDecoder(Decoder):
    """Fourier coefficients as a mantissa times an exponential, point by point (CryoSPIN)."""

    def __init__(self, box: int, support: Support, reach: int, generator: torch.Generator) -> None:
        super().__init__(box, support)
        size = 2 * (_PADDING * reach + 2)
        shape = (size, size, size, 2)
        self.mantissa = nn.Parameter(torch.randn(shape, generator=generator))
        self.exponent = nn.Parameter(torch.zeros(shape))

    def transform(self, band: float) -> Transform:
        """The map's transform up to `band` cycles per box."""
        values = torch.view_as_complex(self.mantissa * self.exponent.exp())[1:, 1:, 1:]
        values = torch.nn.functional.pad((values + values.flip(0, 1, 2).conj()) / 2, (1, 0) * 3)
        return Transform(values * self.scale, _PADDING).within(band)

    def volume(self, band: float) -> Tensor:
        """The map up to `band` cycles per box on the images' grid, within its support."""
        # Interpolating the grid multiplies the map by the fall-off of the interpolation.
        fall_off = gridding_correction(self.box, _PADDING, torch.float32, self.scale.device)
        return _real_map(self, band) * fall_off


class MfnDecoder(_RealSpace):
    """The residual multiplicative filter network of engine rmfn: its finest scale up to a band."""

    def __init__(
        self, box: int, support: Support, reach: int, width: int, generator: torch.Generator
    ) -> None:
        super().__init__(box, support)
        self.network = ResidualMfn(MfnConfig(paper_bands(reach), width), generator)

    def density(self, band: float) -> Tensor:
        """The map on a grid that holds the band, shape (M, M, M); voxel sums."""
        bands = self.network.config.bands
        scale = next((i for i, b in enumerate(bands) if b >= band), len(bands) - 1)
        size = smallest_grid(bands[scale] + 2)
        phases = self.network.phases
        points = grid_points(size, 3, phases.dtype, phases.device)
        density = self.network(points, scale + 1)[-1].reshape(size, size, size)
        mask = self.support.on(size, density.dtype, density.device)
        return density * mask * (self.scale / size**3)


class FourierDecoder(Decoder):
    """A network from frequencies to the map's transform.

    Parameters
    ----------
    kind : "fouriernet", "siren" or "positional"
    width : int
    reach : int
        Largest band in cycles per box.
    """

    def __init__(
        self,
        box: int,
        support: Support,
        kind: FourierKind,
        width: int,
        reach: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(box, support)
        self.field = HermitianField(fourier_network(kind, width, reach, generator), reach + 1)

    def transform(self, band: float) -> Transform:
        """The network on one half of the grid; the other follows from it. No gradients."""
        size = 2 * (int(band * _PADDING) + 2)
        axis = torch.arange(size, device=self.scale.device) - size // 2
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        inside = (x**2 + y**2 + z**2 <= (band * _PADDING + 2) ** 2) & (x >= 0)
        points = torch.stack([x[inside], y[inside], z[inside]], -1).to(self.scale) / _PADDING
        values = torch.zeros(size, size, size, dtype=torch.complex64, device=self.scale.device)
        with torch.no_grad():
            found = torch.cat([self.field(part) for part in points.split(100_000)])
        values[inside] = found * self.scale
        opposite = torch.zeros_like(values)
        opposite[1:, 1:, 1:] = values[1:, 1:, 1:].flip(0, 1, 2).conj()
        return Transform(torch.where(x >= 0, values, opposite), _PADDING)

    def slices(self, transform: Transform, rotations: Tensor, plane: HalfPlane) -> Tensor:
        """The network at the slices' own frequencies; shape (b, m), complex."""
        del transform
        points = plane.frequencies.to(rotations) @ rotations[..., :2, :]
        return self.field(points) * self.scale

    def volume(self, band: float) -> Tensor:
        """The map up to `band` cycles per box on the images' grid, within its support."""
        return _real_map(self, band)


def _real_map(decoder: Decoder, band: float) -> Tensor:
    """Inverse transform of a decoder's grid, low-passed and within the support."""
    box = decoder.box
    values = crop_or_pad_centred(decoder.transform(band).values, box * _PADDING, 3)
    volume = crop_or_pad_centred(ifft_centred(values, 3).real, box, 3)
    volume = lowpass(volume, band, 3)
    return volume * decoder.support.on(box, volume.dtype, volume.device)


def new_decoder(
    kind: DecoderKind,
    box: int,
    reach: int,
    support: Support,
    width: int,
    generator: torch.Generator,
) -> Decoder:
    """An untrained decoder.

    Parameters
    ----------
    box : int
        Side of the images in pixels.
    reach : int
        Largest band in cycles per box.
    width : int
        Hidden units of networks; grids have none.
    """
    if kind == "grid":
        return GridDecoder(box, support, reach, generator)
    if kind == "log-grid":
        return LogGridDecoder(box, support, reach, generator)
    if kind == "rmfn":
        return MfnDecoder(box, support, reach, width, generator)
    if kind not in get_args(FourierKind):
        raise ValueError(f"unknown decoder {kind}")
    return FourierDecoder(box, support, kind, width, reach, generator)
