"""How an image's likelihood changes with its pose: derivatives of slices of a map's transform."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cryorecon.physics import compiled
from cryorecon.physics.fourier import HalfPlane, centred_frequencies, shift_phases
from cryorecon.physics.half_space import fill_transforms
from cryorecon.physics.points import (
    as_array,
    on_cpu,
    points_for,
    points_of,
    read,
    read_fields,
    require_shape,
)
from cryorecon.physics.projection import gridding_correction, reach


@dataclass(frozen=True)
class Derivatives:
    """A map's oversampled transform with its gradient in Fourier space.

    Attributes
    ----------
    table : Tensor, shape (P, P, P, 8), real
        Real and imaginary parts of F, dF/dkx, dF/dky, dF/dkz (k in cycles per box).
    values : Tensor, shape (P, P, P, 2), real
        F by itself.
    padding : int
    """

    table: Tensor
    values: Tensor
    padding: int


def derivatives(volume: Tensor, padding: int, band: float) -> Derivatives:
    """Transform of a map and of ``-2 pi i x / N`` times it, for analytic pose gradients.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
    padding : int
        Oversampling factor.
    band : float
        How far, in cycles per box, slices will reach.
    """
    box = volume.shape[-1]
    corrected = volume / gridding_correction(box, padding, volume.dtype, volume.device)
    axis = centred_frequencies(box, volume.device).to(volume.dtype) * (-2 * torch.pi / box)
    ramps = (axis, axis[:, None], axis[:, None, None])
    sources = torch.stack([corrected, *(corrected * ramp for ramp in ramps)])
    size = min(box * padding + box * padding % 2, reach(band, padding))
    table = volume.new_empty(size, size, size, 8)
    grid = torch.view_as_complex(table.unflatten(-1, (4, 2)))
    plain = (torch.arange(4, device=volume.device) == 0).to(volume.dtype)
    fill_transforms(sources, box * padding, torch.complex(plain, 1 - plain), grid)
    return Derivatives(table, table[..., :2].contiguous(), padding)


def slices_with_gradient(
    model: Derivatives, rotations: Tensor, plane: HalfPlane
) -> tuple[Tensor, Tensor]:
    """Slices S and their derivatives in a rotation vector w, ``A -> exp(w) A``.

    Returns
    -------
    slices : Tensor, shape (b, m), complex
    gradient : Tensor, shape (b, m, 3), complex
        Per radian about the image's x, y and z axes.
    """
    values = read_fields(model.table, rotations, plane, model.padding)
    torque = values.new_empty(len(rotations), 3, len(plane), 2)
    _torque(values, points_of(rotations, plane), torque)
    turned = rotations @ torque.flatten(2)
    slices = torch.view_as_complex(values[..., :2].contiguous())
    return slices, torch.view_as_complex(turned.unflatten(2, (-1, 2))).transpose(1, 2)


def slices_of(model: Derivatives, rotations: Tensor, plane: HalfPlane) -> Tensor:
    """Slices by themselves, shape (b, m), complex."""
    return read(torch.view_as_complex(model.values), rotations, plane, model.padding)


def pose_products(
    model: Derivatives,
    plane: HalfPlane,
    rotations: Tensor,
    offsets_px: Tensor,
    target: Tensor,
    gain: Tensor,
) -> Tensor:
    """Inner products of five derivatives of each image's prediction and of what it leaves over.

    The prediction is ``gain S(A)``, the image ``target`` with its offset undone: that leaves every
    product with the prediction as it is.

    Parameters
    ----------
    model : Derivatives
    plane : HalfPlane of m coefficients
    rotations : Tensor, shape (b, 3, 3)
    offsets_px : Tensor, shape (b, 2)
        RELION origins in pixels.
    target : Tensor, shape (b, m), complex
    gain : Tensor, shape (b, m), real

    Returns
    -------
    Tensor, shape (b, 6, 6), real
        Real parts. First the derivatives in a turn about the map's x, y and z axes, per radian,
        then in the offset along x and y, per pixel; last ``target - prediction``.
    """
    if on_cpu(target):
        found = gain.new_empty(len(gain), 6, 6)
        images = (rotations, offsets_px, target, gain)
        return _compiled_loop(compiled.pose_products, model.table, model, plane, images, found)
    values = read_fields(model.table, rotations, plane, model.padding)
    rows = values.new_empty(len(rotations), 6, len(plane), 2)
    scale = gain[..., None]
    _torque(values, points_of(rotations, plane) * scale, rows[:, :3])
    predicted = values[..., :2] * scale
    real, imaginary = predicted.unbind(-1)
    waves = plane.frequencies.to(gain.dtype).T * (2 * torch.pi / plane.box)
    for axis in (0, 1):
        torch.mul(imaginary, -waves[axis], out=rows[:, 3 + axis, :, 0])
        torch.mul(real, waves[axis], out=rows[:, 3 + axis, :, 1])
    torch.sub(_without_offset(target, offsets_px, plane), predicted, out=rows[:, 5])
    flat = rows.flatten(2)
    return flat @ flat.transpose(-1, -2)


def squared_residual(
    model: Derivatives,
    plane: HalfPlane,
    rotations: Tensor,
    offsets_px: Tensor,
    target: Tensor,
    gain: Tensor,
) -> Tensor:
    """The last of these products alone, ``|target - prediction|^2``; shape (b,)."""
    if on_cpu(target):
        grid, found = torch.view_as_complex(model.values), gain.new_empty(len(gain))
        images = (rotations, offsets_px, target, gain)
        return _compiled_loop(compiled.squared_residual, grid, model, plane, images, found)
    values = read_fields(model.values, rotations, plane, model.padding)
    residual = _without_offset(target, offsets_px, plane) - values * gain[..., None]
    return residual.square().sum((-2, -1))


def _without_offset(target: Tensor, offsets_px: Tensor, plane: HalfPlane) -> Tensor:
    """Images with their offsets undone, real and imaginary parts, shape (b, m, 2)."""
    phases = shift_phases(offsets_px, plane).conj().to(target.dtype)
    return torch.view_as_real(target * phases)


def _torque(values: Tensor, points: Tensor, out: Tensor) -> None:
    """``grad F x k``, the derivative in a rotation vector of the map's axes.

    To first order exp(w) moves a point k of the map by ``-w x k``, so that F changes by
    ``-grad F . (w x k) = w . (grad F x k)``.

    Parameters
    ----------
    values : Tensor, shape (b, m, 8), real
        From :attr:`Derivatives.table`.
    points : Tensor, shape (b, m, 3)
    out : Tensor, shape (b, 3, m, 2)
    """
    gradient = values[..., 2:].unflatten(-1, (3, 2)).unbind(-2)
    k = points[..., None].unbind(-2)
    for axis in range(3):
        one, two = (axis + 1) % 3, (axis + 2) % 3
        torch.mul(gradient[one], k[two], out=out[:, axis])
        out[:, axis].addcmul_(gradient[two], k[one], value=-1)


def _compiled_loop(
    loop: Any,
    grid: Tensor,
    model: Derivatives,
    plane: HalfPlane,
    images: tuple[Tensor, Tensor, Tensor, Tensor],
    found: Tensor,
) -> Tensor:
    """Run one of the loops over images: rotations, offsets, targets and gains."""
    rotations, *rest = images
    at, count = points_for(grid, rotations, plane, model.padding)
    for values in rest[1:]:
        require_shape(values, at)
    flat, result, kx = as_array(grid).reshape(-1), found.numpy(), at[3]
    each = tuple(map(as_array, rest))
    wave = kx.dtype.type(2 * math.pi / plane.box)

    def work(first: int, end: int) -> None:
        loop(flat, at, wave, each, first, end, result)

    compiled.in_threads(work, len(rotations), count)
    return found
