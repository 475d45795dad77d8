"""Reading and writing grids at the points of central slices, by trilinear interpolation.

Tensors of the CPU go through the loops of :mod:`compiled`; elsewhere the same is done by torch.
Grids hold fields on centred points with steps of ``1 / padding`` cycles per box, ``size`` a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from cryorecon.physics import compiled
from cryorecon.physics.fourier import HalfPlane

# Points whose corners and weights (100 bytes each) stay in a core's cache.
_POINTS_AT_ONCE = 1 << 16


def on_cpu(tensor: Tensor) -> bool:
    """Whether the compiled loops can take a tensor."""
    return tensor.device.type == "cpu"


def as_array(tensor: Tensor, dtype: torch.dtype | None = None) -> NDArray[Any]:
    """A tensor of the CPU for compiled loops: contiguous, its own memory where it can be."""
    values = tensor.detach().resolve_conj().resolve_neg()
    return values.to(dtype or values.dtype).contiguous().numpy()


# Size and padding of the grid, rotations (b, 3, 3), kx and ky (m,).
Points = tuple[int, int, NDArray[Any], NDArray[Any], NDArray[Any]]


def points_for(
    grid: Tensor, rotations: Tensor, plane: HalfPlane, padding: int
) -> tuple[Points, int]:
    """The points of slices as compiled loops take them, in the precision of the grid; how many."""
    real = grid.dtype.to_real() if grid.is_complex() else grid.dtype
    kx, ky = as_array(plane.frequencies.T, real)
    at = len(grid), padding, as_array(rotations, real), kx, ky
    return at, len(rotations) * len(plane)


def require_shape(values: Tensor, at: Points) -> None:
    """Refuse values that are not those of the points: loops would read foreign memory."""
    expected = len(at[2]), len(at[3])
    if values.shape != expected:
        raise ValueError(f"values of {tuple(values.shape)} at points of {expected}")


def read(grid: Tensor, rotations: Tensor, plane: HalfPlane, padding: int) -> Tensor:
    """Values of a grid at the points of slices.

    Parameters
    ----------
    grid : Tensor, shape (P, P, P), complex
    rotations : Tensor, shape (b, 3, 3)
        A, reference to image coordinates.
    plane : HalfPlane of m coefficients
    padding : int

    Returns
    -------
    Tensor, shape (b, m), complex
        On the CPU a slice that leaves the grid, or is turned by no number, is NaN.
    """
    if not on_cpu(grid):
        pairs = read_fields(torch.view_as_real(grid), rotations, plane, padding)
        return torch.view_as_complex(pairs)
    at, count = points_for(grid, rotations, plane, padding)
    found = grid.new_empty(len(rotations), len(plane))
    flat, target = as_array(grid).reshape(-1), found.numpy()

    def work(first: int, end: int) -> None:
        compiled.read(flat, at, first, end, target)

    compiled.in_threads(work, len(rotations), count)
    return found


def turn(grid: Tensor, slopes: Tensor, rotations: Tensor, plane: HalfPlane, padding: int) -> Tensor:
    """Derivative in the rotations of ``Re sum conj(slopes) read(grid, ...)``.

    Parameters
    ----------
    slopes : Tensor, shape (b, m), complex

    Returns
    -------
    Tensor, shape (b, 3, 3)
        The third row is zero: slices do not depend on it.
    """
    if on_cpu(grid):
        at, count = points_for(grid, rotations, plane, padding)
        require_shape(slopes, at)
        found = grid.real.new_empty(len(rotations), 2, 3)
        flat, sloping = as_array(grid).reshape(-1), as_array(slopes, grid.dtype)
        target = found.numpy()

        def work(first: int, end: int) -> None:
            compiled.turn(flat, at, sloping, first, end, target)

        compiled.in_threads(work, len(rotations), count)
        turned = found.to(rotations.dtype) * padding
    else:
        turned = _turn_by_torch(grid.contiguous(), slopes, rotations, plane, padding)
    return torch.nn.functional.pad(turned, (0, 0, 0, 1))


def add(
    pairs: Sequence[tuple[Tensor, Tensor]], rotations: Tensor, plane: HalfPlane, padding: int
) -> None:
    """Add slices to grids, in place: the adjoint of :func:`read`.

    The order of additions to a grid point is that of images, the same in every run on a CPU.

    Parameters
    ----------
    pairs : sequence of (slices, grid)
        Tensors of shape (b, m) and (size, size, size), contiguous, both real or both complex.

    Raises
    ------
    FloatingPointError
        On the CPU, if a slice is turned by what is no number; elsewhere the grid holds it then.
    IndexError
        On the CPU, if a slice leaves the grid.
    """
    if not on_cpu(rotations):
        _add_by_torch(pairs, rotations, plane, padding)
        return
    for slices, grid in pairs:
        if not grid.is_contiguous():
            raise ValueError("slices are added to contiguous grids only")
        if not _added(slices, grid, points_for(grid, rotations, plane, padding)):
            if not bool(rotations.isfinite().all()):
                raise FloatingPointError("a rotation of a slice is not finite")
            raise IndexError("a slice leaves the grid that it is added to")


def _added(slices: Tensor, grid: Tensor, points: tuple[Points, int]) -> bool:
    at, count = points
    require_shape(slices, at)
    values, flat = as_array(slices, grid.dtype), grid.view(-1).numpy()
    inside: list[bool] = []

    def work(first_layer: int, end_layer: int) -> None:
        inside.append(compiled.add(values, flat, at, first_layer, end_layer))

    compiled.in_threads(work, len(grid), count)
    return all(inside)


def read_fields(table: Tensor, rotations: Tensor, plane: HalfPlane, padding: int) -> Tensor:
    """Values of c real fields at the points of slices, by torch.

    Parameters
    ----------
    table : Tensor, shape (P, P, P, c), real

    Returns
    -------
    Tensor, shape (b, m, c)
    """
    together = max(1, _POINTS_AT_ONCE // max(1, len(plane)))
    if on_cpu(table) and len(rotations) > together:
        parts = rotations.split(together)
        return torch.cat([read_fields(table, part, plane, padding) for part in parts])
    size, rows = table.shape[0], table.reshape(-1, table.shape[-1])
    base, weights = _corners(rotations, plane, size, padding)
    values = torch.nn.functional.embedding_bag(
        base[:, None] + _from_lowest(size, table.device),
        rows,
        per_sample_weights=weights.T.to(rows.dtype).contiguous(),
        mode="sum",
    )
    return values.view(len(rotations), len(plane), rows.shape[1])


def points_of(rotations: Tensor, plane: HalfPlane) -> Tensor:
    """Where each coefficient lies in the map's transform, ``A.T k``; (b, m, 3)."""
    return plane.frequencies.to(rotations.dtype) @ rotations[..., :2, :]


def _sides(rotations: Tensor, plane: HalfPlane, size: int, padding: int) -> tuple[Tensor, Tensor]:
    """Index of each coefficient's lowest corner, (b * m,), and weights along axes, (2, 3, b * m).

    Of the lower and the upper side along x, y and z.
    """
    frequencies = plane.frequencies.to(rotations.dtype) * padding
    # A.T @ (kx, ky, 0), one row for each of x, y, z.
    points = (rotations[..., :2, :].permute(2, 0, 1) @ frequencies.T).flatten(1) + size // 2
    # Rotations that are no numbers give values that are none, not indices that end a GPU's job.
    lower = points.floor().clamp(0, size - 2).nan_to_num(0)
    upper = points - lower
    x, y, z = lower.to(torch.int64).unbind(0)
    return (z * size + y) * size + x, torch.stack([1 - upper, upper])


def _corners(rotations: Tensor, plane: HalfPlane, size: int, padding: int) -> tuple[Tensor, Tensor]:
    """Index of each coefficient's lowest corner, (b * m,), and trilinear weights, (8, b * m)."""
    base, sides = _sides(rotations, plane, size, padding)
    weights = sides[:, None, 2] * sides[None, :, 1]
    weights = weights[:, :, None] * sides[None, None, :, 0]
    return base, weights.flatten(0, 2)


def _from_lowest(size: int, device: torch.device) -> Tensor:
    """What is added to the index of the lowest corner for each of the eight."""
    steps = torch.arange(8, device=device)
    return (steps >> 2) * size * size + ((steps >> 1) & 1) * size + (steps & 1)


def _turn_by_torch(
    grid: Tensor, slopes: Tensor, rotations: Tensor, plane: HalfPlane, padding: int
) -> Tensor:
    size = grid.shape[0]
    base, sides = _sides(rotations, plane, size, padding)
    corners = grid.view(-1)[base + _from_lowest(size, grid.device)[:, None]]
    # Of the weight of each corner, [z, y, x, point].
    of_weight = (corners * slopes.conj().reshape(-1)).real.view(2, 2, 2, -1)
    x, y, z = sides.to(of_weight.dtype).unbind(1)
    along_x, along_y = (of_weight * x).sum(2), of_weight * y[:, None]
    of_point = torch.stack(
        [
            (of_weight.diff(dim=2)[:, :, 0] * z[:, None] * y).sum((0, 1)),
            (along_x.diff(dim=1)[:, 0] * z).sum(0),
            (along_y.sum(1) * x).sum(1).diff(dim=0)[0],
        ]
    ).view(3, len(rotations), len(plane))
    rows = of_point.permute(1, 2, 0).to(rotations.dtype)
    return plane.frequencies.to(rotations.dtype).T @ rows * padding


def _add_by_torch(
    pairs: Sequence[tuple[Tensor, Tensor]], rotations: Tensor, plane: HalfPlane, padding: int
) -> None:
    size = len(pairs[0][1])
    # Row by row neighbours in the list are neighbours on the grid.
    kx, ky = plane.frequencies.unbind(-1)
    order = torch.argsort(ky * plane.box + kx)
    rows = replace(plane, frequencies=plane.frequencies[order])
    base, weights = _corners(rotations, rows, size, padding)
    index = (base + _from_lowest(size, rotations.device)[:, None]).view(-1)
    wanted = [slices[:, order].to(grid.dtype).reshape(-1) for slices, grid in pairs]
    found = [weights.to(values.real.dtype) * values for values in wanted]
    # Grids change once no more memory is asked for: what did not fit can be repeated.
    for (_, grid), values in zip(pairs, found, strict=True):
        grid.view(-1).scatter_add_(0, index, values.view(-1))
