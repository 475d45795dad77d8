"""Projection and backprojection: an adjoint pair between a map and slices of its transform.

By the Fourier slice theorem the transform of an image is a central slice of the map's transform.
The map is zero-padded, transformed, and read by trilinear interpolation; dividing the map by the
interpolation kernel's own transform beforehand (gridding correction) removes the kernel's
fall-off. ``insert_slices`` and ``backproject`` are the exact adjoints of ``extract_slices`` and
``project`` under the inner product ``Re sum conj(a) b``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cryorecon.physics import points
from cryorecon.physics.fourier import (
    HalfPlane,
    centred_frequencies,
    crop_or_pad_centred,
    fft_padded,
    ifft_cropped,
)


@dataclass(frozen=True)
class Transform:
    """A map's centred Fourier transform on an oversampled grid.

    Attributes
    ----------
    values : Tensor, shape (P, P, P), complex
        Indexed [kz, ky, kx], origin at ``P // 2``, steps of ``1 / padding`` cycles per box.
    padding : int
        Oversampling factor.
    """

    values: Tensor
    padding: int

    def within(self, band: float) -> Transform:
        """The part that slices up to radius `band` (cycles per box) read: a smaller cube."""
        size = reach(band, self.padding)
        if size >= self.values.shape[-1]:
            return self
        return Transform(crop_or_pad_centred(self.values, size, 3), self.padding)


def reach(band: float, padding: int) -> int:
    """Points a side of the grid that slices up to a radius of `band` cycles per box read."""
    return 2 * (int(band * padding) + 2)


def gridding_correction(
    box: int, padding: int, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """Fall-off of the map, ``sinc^2`` along each axis, that trilinear interpolation brings.

    Returns
    -------
    Tensor, shape (N, N, N)
        The map is divided by it before the transform.
    """
    axis = torch.sinc(centred_frequencies(box, device).to(dtype) / (box * padding)) ** 2
    return axis[:, None, None] * axis[None, :, None] * axis[None, None, :]


def padded_transform(volume: Tensor, padding: int = 2, band: float | None = None) -> Transform:
    """Oversampled transform of a map, corrected for the interpolation to come.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
        Indexed [z, y, x].
    padding : int
        Oversampling factor of the transform.
    band : float, optional
        How far slices will reach, in cycles per box: the part of :meth:`Transform.within`.
    """
    box = volume.shape[-1]
    corrected = volume / gridding_correction(box, padding, volume.dtype, volume.device)
    size = box * padding
    keep = size if band is None else min(size, reach(band, padding))
    return Transform(fft_padded(corrected, size, keep, 3), padding)


def gridded_transform(volume: Tensor, padding: int = 2) -> Transform:
    """What averaging slices on the grid estimates: the transform of the map times the fall-off.

    Inverse of :func:`to_volume`; note that :func:`padded_transform`, from which slices are read,
    divides by the fall-off instead.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
    """
    box = volume.shape[-1]
    fallen = volume * gridding_correction(box, padding, volume.dtype, volume.device)
    return Transform(fft_padded(fallen, box * padding, box * padding, 3), padding)


def to_volume(transform: Transform, box: int) -> Tensor:
    """Map of an oversampled transform that slices were averaged on by trilinear weights.

    Averaging with the interpolation kernel multiplies the map by the kernel's fall-off, which is
    divided out.

    Parameters
    ----------
    transform : Transform
        What it does not hold, up to ``P / 2``, is zero.
    box : int
        Voxels a side of the map; the field of view is the same whatever the number. Values are
        sums over a voxel's share of the box, so that a coarser map has larger ones.

    Returns
    -------
    Tensor, shape (N, N, N), real
    """
    size = box * transform.padding
    values = transform.values
    if len(values) > size:
        values = crop_or_pad_centred(values, size, 3)
    volume = ifft_cropped(values, size, box, 3).real
    return volume / gridding_correction(box, transform.padding, volume.dtype, volume.device)


def padded_transform_adjoint(values: Tensor, box: int, padding: int) -> Tensor:
    """Adjoint of :func:`padded_transform`: (P, P, P) complex to (N, N, N) real."""
    size = box * padding
    volume = ifft_cropped(values, size, box, 3).real * float(size) ** 3
    return volume / gridding_correction(box, padding, volume.dtype, volume.device)


def extract_slices(transform: Transform, rotations: Tensor, plane: HalfPlane) -> Tensor:
    """Central slices of a map's transform by trilinear interpolation.

    Differentiable in the transform and in the rotations.

    Parameters
    ----------
    transform : Transform
        Must reach as far as the list's largest radius.
    rotations : Tensor, shape (b, 3, 3)
        A, reference to image coordinates.
    plane : HalfPlane of m coefficients

    Returns
    -------
    Tensor, shape (b, m), complex
    """
    slices: Tensor = _Slices.apply(transform.values, rotations, plane, transform.padding)
    return slices


class _Slices(torch.autograd.Function):
    """Slices whose gradient in the transform is their adjoint, ten times as fast as torch's own."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, rotations: Tensor, plane: HalfPlane, padding: int
    ) -> Tensor:
        ctx.save_for_backward(values, rotations)
        ctx.plane, ctx.padding = plane, padding
        return points.read(values, rotations, plane, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        values, rotations = ctx.saved_tensors
        plane, padding, of_values, of_rotations = ctx.plane, ctx.padding, None, None
        if ctx.needs_input_grad[0]:
            of_values = insert_slices(gradient, rotations, plane, len(values), padding)
        if ctx.needs_input_grad[1]:
            of_rotations = points.turn(values, gradient, rotations, plane, padding)
        return of_values, of_rotations, None, None


def insert_slices(
    slices: Tensor, rotations: Tensor, plane: HalfPlane, size: int, padding: int
) -> Tensor:
    """Adjoint of :func:`extract_slices`: spread slices over a grid of `size` points a side.

    Parameters
    ----------
    slices : Tensor, shape (b, m), real or complex
        Real values (weights) give a real grid.
    rotations : Tensor, shape (b, 3, 3)
    plane : HalfPlane of m coefficients
    size, padding : int
        Points a side of the grid and its oversampling factor.

    Returns
    -------
    Tensor, shape (size, size, size)
    """
    grid = slices.new_zeros(size, size, size)
    points.add([(slices, grid)], rotations, plane, padding)
    return grid


def project(volume: Tensor, rotations: Tensor, plane: HalfPlane, padding: int = 2) -> Tensor:
    """Half-plane Fourier coefficients of a map's projections; sums over z in voxels.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
    rotations : Tensor, shape (b, 3, 3)
    plane : HalfPlane of the same box

    Returns
    -------
    Tensor, shape (b, m), complex
    """
    return extract_slices(padded_transform(volume, padding), rotations, plane)


def backproject(slices: Tensor, rotations: Tensor, plane: HalfPlane, padding: int = 2) -> Tensor:
    """Adjoint of :func:`project`: shape (b, m) to a map of shape (N, N, N)."""
    grid = insert_slices(slices, rotations, plane, plane.box * padding, padding)
    return padded_transform_adjoint(grid, plane.box, padding)


def project_slowly(volume: Tensor, rotations: Tensor, plane: HalfPlane) -> Tensor:
    """The same projections from the definition, one exponential per voxel and coefficient.

    The oracle of :func:`project`: exact for any map, O(b m N^3).
    """
    axis = centred_frequencies(plane.box, volume.device).to(volume.dtype)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    positions = torch.stack([x, y, z], -1).reshape(-1, 3)
    frequencies = plane.frequencies.to(volume.dtype) @ rotations[..., :2, :]
    angle = (-2 * torch.pi / plane.box) * (frequencies @ positions.T)
    return torch.polar(torch.ones_like(angle), angle) @ volume.flatten().to(
        torch.complex128 if volume.dtype == torch.float64 else torch.complex64
    )
