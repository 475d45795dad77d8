"""Projection and backprojection: an adjoint pair between a map and slices of its transform.

By the Fourier slice theorem the transform of an image is a central slice of the map's transform.
The map is zero-padded, transformed, and read by trilinear interpolation; dividing the map by the
interpolation kernel's own transform beforehand (gridding correction) removes the kernel's
fall-off. ``insert_slices`` and ``backproject`` are the exact adjoints of ``extract_slices`` and
``project`` under the inner product ``Re sum conj(a) b``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.physics.fourier import (
    HalfPlane,
    centred_frequencies,
    crop_or_pad_centred,
    fft_centred,
    ifft_centred,
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
        size = 2 * (int(band * self.padding) + 2)
        if size >= self.values.shape[-1]:
            return self
        return Transform(crop_or_pad_centred(self.values, size, 3), self.padding)


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


def padded_transform(volume: Tensor, padding: int = 2) -> Transform:
    """Oversampled transform of a map, corrected for the interpolation to come.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
        Indexed [z, y, x].
    padding : int
        Oversampling factor of the transform.
    """
    box = volume.shape[-1]
    corrected = volume / gridding_correction(box, padding, volume.dtype, volume.device)
    return Transform(fft_centred(crop_or_pad_centred(corrected, box * padding, 3), 3), padding)


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
    return Transform(fft_centred(crop_or_pad_centred(fallen, box * padding, 3), 3), padding)


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
    values = crop_or_pad_centred(transform.values, box * transform.padding, 3)
    volume = crop_or_pad_centred(ifft_centred(values, 3).real, box, 3)
    return volume / gridding_correction(box, transform.padding, volume.dtype, volume.device)


def padded_transform_adjoint(values: Tensor, box: int, padding: int) -> Tensor:
    """Adjoint of :func:`padded_transform`: (P, P, P) complex to (N, N, N) real."""
    size = values.shape[-1]
    if size < box * padding:
        values = crop_or_pad_centred(values, box * padding, 3)
    volume = ifft_centred(values, 3).real * float(box * padding) ** 3
    volume = crop_or_pad_centred(volume, box, 3)
    return volume / gridding_correction(box, padding, volume.dtype, volume.device)


def _corners(rotations: Tensor, plane: HalfPlane, size: int, padding: int) -> tuple[Tensor, Tensor]:
    """Grid indices and trilinear weights, (b * m, 8) each, of the slices' coefficients."""
    frequencies = plane.frequencies.to(rotations.dtype) * padding
    # A.T @ (kx, ky, 0) for row vectors is (kx, ky) @ A[:2].
    points = frequencies @ rotations[..., :2, :] + size // 2
    lower = points.floor()
    fraction = (points - lower).reshape(-1, 3)
    x, y, z = lower.reshape(-1, 3).to(torch.int64).unbind(-1)
    base = (z * size + y) * size + x
    steps = torch.arange(8, device=base.device)
    offsets = (steps >> 2) * size * size + ((steps >> 1) & 1) * size + (steps & 1)
    two = torch.stack([1 - fraction, fraction], -1)
    yx = two[:, 1, :, None] * two[:, 0, None, :]
    weights = two[:, 2, :, None] * yx.flatten(1)[:, None, :]
    return base[:, None] + offsets, weights.flatten(1)


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
    table = torch.view_as_real(transform.values)
    return torch.view_as_complex(interpolate(table, rotations, plane, transform.padding))


def interpolate(table: Tensor, rotations: Tensor, plane: HalfPlane, padding: int) -> Tensor:
    """Trilinear interpolation of c real fields at the points of central slices.

    Parameters
    ----------
    table : Tensor, shape (P, P, P, c), real
        Fields on a centred grid with steps of ``1 / padding`` cycles per box.
    rotations : Tensor, shape (b, 3, 3)
    plane : HalfPlane of m coefficients
    padding : int

    Returns
    -------
    Tensor, shape (b, m, c)
    """
    size, n_fields = table.shape[0], table.shape[-1]
    index, weights = _corners(rotations, plane, size, padding)
    values = torch.nn.functional.embedding_bag(
        index,
        table.reshape(-1, n_fields),
        per_sample_weights=weights.to(table.dtype),
        mode="sum",
    )
    return values.reshape(rotations.shape[0], len(plane), n_fields)


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
    fields = torch.view_as_real(slices.contiguous()) if slices.is_complex() else slices[..., None]
    grids = spread(fields, rotations, plane, size, padding)
    return torch.complex(grids[0], grids[1]) if slices.is_complex() else grids[0]


def spread(fields: Tensor, rotations: Tensor, plane: HalfPlane, size: int, padding: int) -> Tensor:
    """Adjoint of :func:`interpolate`, field by field.

    Parameters
    ----------
    fields : Tensor, shape (b, m, c), real
    rotations : Tensor, shape (b, 3, 3)
    plane : HalfPlane of m coefficients
    size, padding : int

    Returns
    -------
    Tensor, shape (c, size, size, size)
    """
    index, weights = _corners(rotations, plane, size, padding)
    index, weights = index.flatten(), weights.to(fields.dtype)
    grids = fields.new_zeros(fields.shape[-1], size**3)
    for grid, field in zip(grids, fields.flatten(0, 1).unbind(-1), strict=True):
        grid.index_add_(0, index, (weights * field[:, None]).flatten())
    return grids.view(-1, size, size, size)


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
