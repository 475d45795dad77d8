"""Loops over the points of slices, compiled for the CPU: what torch would do in many passes.

A slice reads or writes the eight grid points around each of its coefficients. They lie scattered,
so that memory decides: each loop asks for the points of a coefficient some places ahead before it
needs them, and goes through them once. All these loops stand in this file, since compiled code is
kept beside it until it changes; so do those of :mod:`likely` in theirs. Arrays are NumPy's,
contiguous, of one precision; :mod:`projection` and :mod:`pose_derivatives` call these loops with
tensors of the CPU and do the same by torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# How many coefficients ahead: memory answers after some hundred cycles.
_AHEAD = 16
# Points that are worth a thread of their own.
_POINTS_A_THREAD = 20_000
# Sums in any order; not "nnan" and "ninf", since images may hold such numbers.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},
}


def compiled(function: Callable[..., Any]) -> Any:
    """Compiled when first called, kept on disk where there is a place for it."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # Neither the package's folder nor the user's can be written.
        return njit(**_OPTIONS)(function)


def in_threads(work: Callable[[int, int], None], count: int, points: int) -> None:
    """Share `count` items, of some points in all, among as many threads as torch may use.

    Parameters
    ----------
    work : callable
        Takes the first item and the one after the last; lets other threads go on.
    """
    threads = min(torch.get_num_threads(), count, max(1, points // _POINTS_A_THREAD))
    if threads <= 1:
        work(0, count)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    # Starting a thread takes as long as some thousand points: this one takes a share, too.
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work, *share) for share in pairwise(bounds[1:])]
        work(bounds[0], bounds[1])
        for other in others:
            other.result()


@intrinsic
def _fetch(_: Any, array: Any, index: Any) -> Any:
    """Ask for an element of a one-dimensional array; nobody waits for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        place = builder.bitcast(builder.gep(data, [args[1]]), byte)
        builder.call(fetch, [place, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, index), generate


@intrinsic
def _weigh_rows(_: Any, table: Any, places: Any, weights: Any, found: Any, at: Any) -> Any:
    """``found[at : at + 8] = sum of w * table[p : p + 8]``, eight numbers in one instruction.

    Left to itself the compiler takes one number after the other, which takes twice as long.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real, lane = context.get_data_type(signature.args[0].dtype), ir.IntType(32)
        row, size = ir.VectorType(real, 8), signature.args[0].dtype.bitwidth // 8
        table_at, found_at = (
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3)
        )
        nothing, first = (
            ir.Constant(row, ir.Undefined),
            ir.Constant(ir.VectorType(lane, 8), [0] * 8),
        )
        total = ir.Constant(row, [0.0] * 8)
        for i in range(len(places)):
            place = builder.gep(table_at, [builder.extract_value(args[1], i)])
            values = builder.load(builder.bitcast(place, row.as_pointer()), align=size)
            weight = builder.insert_element(nothing, builder.extract_value(args[2], i), lane(0))
            weight = builder.shuffle_vector(weight, nothing, first)
            product = builder.fmul(weight, values, flags=["contract"])
            total = builder.fadd(total, product, flags=["contract"])
        target = builder.bitcast(builder.gep(found_at, [args[4]]), row.as_pointer())
        builder.store(total, target, align=size)
        return context.get_dummy_value()

    return types.void(table, places, weights, found, at), generate


@compiled
def _place(size, padding, rotation, kx, ky, base, side):
    """Lowest corner of each coefficient and how far beyond it along x, y, z; False if outside."""
    zero, centre = kx.dtype.type(0), kx.dtype.type(size // 2)
    # The last point is inside, also where rounding leads beyond it.
    end, step, inside = kx.dtype.type(size - 1 + 1e-3), kx.dtype.type(padding), True
    for j in range(len(kx)):
        x = (rotation[0, 0] * kx[j] + rotation[1, 0] * ky[j]) * step + centre
        y = (rotation[0, 1] * kx[j] + rotation[1, 1] * ky[j]) * step + centre
        z = (rotation[0, 2] * kx[j] + rotation[1, 2] * ky[j]) * step + centre
        # Also false for what is no number.
        here = x >= zero and x < end and y >= zero and y < end and z >= zero and z < end
        inside = inside and here
        ix, iy, iz = (
            min(np.int32(x), size - 2),
            min(np.int32(y), size - 2),
            min(np.int32(z), size - 2),
        )
        base[j] = (np.int64(iz) * size + iy) * size + ix
        side[0, j] = x - kx.dtype.type(ix)
        side[1, j] = y - kx.dtype.type(iy)
        side[2, j] = z - kx.dtype.type(iz)
    return inside


@compiled
def _fetch_cell(grid, lowest, row, layer):
    """Ask for the eight points around a coefficient: pairs along x lie side by side."""
    _fetch(grid, lowest), _fetch(grid, lowest + row)
    _fetch(grid, lowest + layer), _fetch(grid, lowest + layer + row)


@compiled
def _read_one(grid, size, base, side, found):
    m, row, layer, one = len(base), size, size * size, side.dtype.type(1)
    for j in range(m):
        _fetch_cell(grid, base[min(j + _AHEAD, m - 1)], row, layer)
        fx, fy, fz = side[0, j], side[1, j], side[2, j]
        w0, w1, w2, w3 = (one - fz) * (one - fy), (one - fz) * fy, fz * (one - fy), fz * fy
        b = base[j]
        c, d, e = b + row, b + layer, b + layer + row
        lower = w0 * grid[b] + w1 * grid[c] + w2 * grid[d] + w3 * grid[e]
        upper = w0 * grid[b + 1] + w1 * grid[c + 1] + w2 * grid[d + 1] + w3 * grid[e + 1]
        found[j] = (one - fx) * lower + fx * upper


@compiled
def read(grid, at, first, end, found):
    """Trilinear interpolation of a grid at the points of slices `first` to `end`.

    Parameters
    ----------
    grid : array, shape (size^3,), complex
    at : tuple
        Points: size, padding, rotations (b, 3, 3), kx (m,) and ky (m,) in cycles per box.
    found : array, shape (b, m)
        A slice that reaches beyond the grid, or is turned by no number, is NaN.
    """
    size, padding, rotations, kx, ky = at
    base, side = np.empty(len(kx), np.int64), np.empty((3, len(kx)), kx.dtype)
    for i in range(first, end):
        if _place(size, padding, rotations[i], kx, ky, base, side):
            _read_one(grid, size, base, side, found[i])
        else:
            found[i, :] = np.nan


@compiled
def _add_one(values, grid, size, base, side, first_layer, end_layer):
    m, row, layer, one = len(base), size, size * size, side.dtype.type(1)
    begin, end = first_layer * layer, end_layer * layer
    for j in range(m):
        _fetch_cell(grid, base[min(j + _AHEAD, m - 1)], row, layer)
        b, fx, fy, fz = base[j], side[0, j], side[1, j], side[2, j]
        lower, upper = values[j] * (one - fx), values[j] * fx
        front, back = one - fy, fy
        if begin <= b < end:
            w0, w1 = (one - fz) * front, (one - fz) * back
            grid[b] += w0 * lower
            grid[b + 1] += w0 * upper
            grid[b + row] += w1 * lower
            grid[b + row + 1] += w1 * upper
        if begin <= b + layer < end:
            w0, w1 = fz * front, fz * back
            b += layer
            grid[b] += w0 * lower
            grid[b + 1] += w0 * upper
            grid[b + row] += w1 * lower
            grid[b + row + 1] += w1 * upper


@compiled
def add(values, grid, at, first_layer, end_layer):
    """Spread slices over those layers of a grid, the adjoint of :func:`read`; False if one cannot.

    Layers are of z: threads that add to layers of their own do not meet, and each grid point's
    additions come in the order of images, whatever their number.

    Parameters
    ----------
    values : array, shape (b, m), real or complex
    grid : array, shape (size^3,), of the same type
    at : tuple
        As in :func:`read`.
    """
    size, padding, rotations, kx, ky = at
    base, side = np.empty(len(kx), np.int64), np.empty((3, len(kx)), kx.dtype)
    for i in range(len(rotations)):
        if not _place(size, padding, rotations[i], kx, ky, base, side):
            return False
        _add_one(values[i], grid, size, base, side, first_layer, end_layer)
    return True


@compiled
def _turn_one(grid, size, base, side, slopes, kx, ky, found):
    m, row, layer, one = len(base), size, size * size, side.dtype.type(1)
    for j in range(m):
        _fetch_cell(grid, base[min(j + _AHEAD, m - 1)], row, layer)
        fx, fy, fz = side[0, j], side[1, j], side[2, j]
        ex, ey, ez = one - fx, one - fy, one - fz
        b, re, im = base[j], slopes[j].real, slopes[j].imag
        c, d, e = b + row, b + layer, b + layer + row
        # Of the value at each corner: the two along x, by y and z.
        l0, u0 = _along(grid[b], re, im), _along(grid[b + 1], re, im)
        l1, u1 = _along(grid[c], re, im), _along(grid[c + 1], re, im)
        l2, u2 = _along(grid[d], re, im), _along(grid[d + 1], re, im)
        l3, u3 = _along(grid[e], re, im), _along(grid[e + 1], re, im)
        x = ez * (ey * (u0 - l0) + fy * (u1 - l1)) + fz * (ey * (u2 - l2) + fy * (u3 - l3))
        v0, v1, v2, v3 = ex * l0 + fx * u0, ex * l1 + fx * u1, ex * l2 + fx * u2, ex * l3 + fx * u3
        y, z = ez * (v1 - v0) + fz * (v3 - v2), ey * (v2 - v0) + fy * (v3 - v1)
        found[0, 0] += kx[j] * x
        found[0, 1] += kx[j] * y
        found[0, 2] += kx[j] * z
        found[1, 0] += ky[j] * x
        found[1, 1] += ky[j] * y
        found[1, 2] += ky[j] * z


@compiled
def _along(value, re, im):
    return value.real * re + value.imag * im


@compiled
def turn(grid, at, slopes, first, end, found):
    """Derivative of ``Re sum conj(slopes) read(...)`` in rows 0 and 1 of each rotation.

    Parameters
    ----------
    at : tuple
        As in :func:`read`.
    slopes : array, shape (b, m), complex
    found : array, shape (b, 2, 3)
        In grid steps: times the padding it is in cycles per box. NaN where a slice leaves the grid.
    """
    size, padding, rotations, kx, ky = at
    base, side = np.empty(len(kx), np.int64), np.empty((3, len(kx)), kx.dtype)
    for i in range(first, end):
        found[i, :, :] = 0
        if _place(size, padding, rotations[i], kx, ky, base, side):
            _turn_one(grid, size, base, side, slopes[i], kx, ky, found[i])
        else:
            found[i, :, :] = np.nan


@compiled
def _read_rows(table, size, base, side, found):
    m, row, layer, one = len(base), 8 * size, 8 * size * size, side.dtype.type(1)
    for j in range(m):
        # Two lines of the cache where the pair along x lies across its bounds.
        ahead = 8 * base[min(j + _AHEAD, m - 1)]
        _fetch_cell(table, ahead, row, layer)
        _fetch_cell(table, ahead + 8, row, layer)
        fx, fy, fz = side[0, j], side[1, j], side[2, j]
        w0, w1, w2, w3 = (one - fz) * (one - fy), (one - fz) * fy, fz * (one - fy), fz * fy
        ex, b = one - fx, 8 * base[j]
        c, d, e = b + row, b + layer, b + layer + row
        places = (b, b + 8, c, c + 8, d, d + 8, e, e + 8)
        weights = (w0 * ex, w0 * fx, w1 * ex, w1 * fx, w2 * ex, w2 * fx, w3 * ex, w3 * fx)
        _weigh_rows(table, places, weights, found, 8 * j)


@compiled
def _centre(target, offset, kx, ky, wave, found):
    """An image with its offset undone; real and imaginary parts, shape (2, m)."""
    for j in range(len(kx)):
        angle = wave * (kx[j] * offset[0] + ky[j] * offset[1])
        cosine, sine = np.cos(angle), np.sin(angle)
        re, im = target[j].real, target[j].imag
        found[0, j] = re * cosine + im * sine
        found[1, j] = im * cosine - re * sine


@compiled
def _fill(read_rows, rotation, gain, kx, ky, wave, rows):
    """Five derivatives of the prediction; what is left of the image stands in rows 10 and 11."""
    for j in range(len(kx)):
        g, k = gain[j], 8 * j
        x = (rotation[0, 0] * kx[j] + rotation[1, 0] * ky[j]) * g
        y = (rotation[0, 1] * kx[j] + rotation[1, 1] * ky[j]) * g
        z = (rotation[0, 2] * kx[j] + rotation[1, 2] * ky[j]) * g
        re, im = read_rows[k] * g, read_rows[k + 1] * g
        for part in range(2):
            along_x, along_y = read_rows[k + 2 + part], read_rows[k + 4 + part]
            along_z = read_rows[k + 6 + part]
            rows[part, j] = along_y * z - along_z * y
            rows[2 + part, j] = along_z * x - along_x * z
            rows[4 + part, j] = along_x * y - along_y * x
        rows[6, j], rows[7, j] = -wave * kx[j] * im, wave * kx[j] * re
        rows[8, j], rows[9, j] = -wave * ky[j] * im, wave * ky[j] * re
        rows[10, j] -= re
        rows[11, j] -= im


@compiled
def _multiply(rows, found):
    for a in range(6):
        for b in range(a, 6):
            total = rows.dtype.type(0)
            for j in range(rows.shape[1]):
                total += rows[2 * a, j] * rows[2 * b, j] + rows[2 * a + 1, j] * rows[2 * b + 1, j]
            found[a, b] = found[b, a] = total


@compiled
def _power(parts):
    """Sum of squares, exact enough to tell likelihoods apart by a hundredth."""
    total = 0.0
    for j in range(parts.shape[1]):
        total += parts[0, j] * parts[0, j] + parts[1, j] * parts[1, j]
    return total


@compiled
def pose_products(table, at, wave, images, first, end, found):
    """See :func:`pose_derivatives.pose_products`, for images `first` to `end`.

    Parameters
    ----------
    table : array, shape (8 size^3,)
    at : tuple
        As in :func:`read`.
    wave : float
        Radians a cycle per box and pixel, 2 pi / N.
    images : tuple
        Their offsets (b, 2), targets (b, m) and gains (b, m).
    found : array, shape (b, 6, 6)
        NaN for an image whose slice leaves the grid.
    """
    size, padding, rotations, kx, ky = at
    offsets, target, gain = images
    m = len(kx)
    base, side = np.empty(m, np.int64), np.empty((3, m), kx.dtype)
    read_rows, rows = np.empty(8 * m, kx.dtype), np.empty((12, m), kx.dtype)
    for i in range(first, end):
        if not _place(size, padding, rotations[i], kx, ky, base, side):
            found[i, :, :] = np.nan
            continue
        _read_rows(table, size, base, side, read_rows)
        _centre(target[i], offsets[i], kx, ky, wave, rows[10:])
        _fill(read_rows, rotations[i], gain[i], kx, ky, wave, rows)
        _multiply(rows, found[i])
        found[i, 5, 5] = _power(rows[10:])


@compiled
def squared_residual(grid, at, wave, images, first, end, found):
    """The last of these products alone, shape (b,); `grid` as in :func:`read`."""
    size, padding, rotations, kx, ky = at
    offsets, target, gain = images
    m = len(kx)
    base, side = np.empty(m, np.int64), np.empty((3, m), kx.dtype)
    values, left = np.empty(m, grid.dtype), np.empty((2, m), kx.dtype)
    for i in range(first, end):
        if not _place(size, padding, rotations[i], kx, ky, base, side):
            found[i] = np.nan
            continue
        _read_one(grid, size, base, side, values)
        _centre(target[i], offsets[i], kx, ky, wave, left)
        for j in range(m):
            left[0, j] -= gain[i, j] * values[j].real
            left[1, j] -= gain[i, j] * values[j].imag
        found[i] = _power(left)
