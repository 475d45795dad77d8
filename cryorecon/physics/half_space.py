"""Real maps by half of their transforms: columns kx >= 0, some of them at a time.

The transform of a real map holds everything twice. Working on half of it, by columns that the
processor's caches hold, moves a fraction of the bytes that whole padded cubes would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cryorecon.physics.fourier import (
    centred_frequencies,
    crop_or_pad_centred,
    middle,
    wrapped,
)

# Points of a padded grid that are worked on at once: 4 MB of complex numbers; more where a device
# has room, and each call takes its time.
_POINTS_CPU, _POINTS_DEVICE = 2**19, 2**27


def spans(count: int, face: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """From, and up to, which column; `face` is the number of points in a column's plane."""
    points = _POINTS_CPU if device.type == "cpu" else _POINTS_DEVICE
    width = max(1, points // face)
    for start in range(0, count, width):
        yield start, min(count, start + width)


def columns(grid: Tensor, start: int, stop: int) -> Tensor:
    """Columns `start` <= kx < `stop` of a grid, both members of each Friedel pair averaged.

    Parameters
    ----------
    grid : Tensor, shape (P, P, P), real or complex
        Centred, indexed [kz, ky, kx], P even. What lies at -P / 2 has no mate and is left out.

    Returns
    -------
    Tensor, shape (P - 1, P - 1, stop - start)
        From -P / 2 + 1 on along kz and ky.
    """
    centre = grid.shape[-1] // 2
    mates = grid[1:, 1:, centre - stop + 1 : centre - start + 1].flip((0, 1, 2))
    return mates.conj().add(grid[1:, 1:, centre + start : centre + stop]).div_(2)


def maps_of(
    read: Callable[[int, int], Tensor], points: int, size: int, box: int, device: torch.device
) -> Tensor:
    """The middle of the real maps that have these transforms.

    Parameters
    ----------
    read : callable
        Gives columns `start` to `stop` of transforms, shape (k, P - 1, P - 1, stop - start),
        complex, as :func:`columns` has them.
    points : int
        P.
    size, box : int
        Points a side of the padded box, P - 1 or more, and of the maps.

    Returns
    -------
    Tensor, shape (k, N, N, N), real
    """
    ramp, parts = _ramp(points, size, box, device), []
    for start, stop in spans(points // 2, size**2, device):
        block = read(start, stop)
        for dim in (1, 2):
            turn = ramp.to(block.dtype).view(-1, *[1] * (3 - dim))
            block = middle(torch.fft.ifft(block, n=size, dim=dim), dim, box) * turn
        parts.append(block)
    return middle(torch.fft.irfft(torch.cat(parts, -1), n=size, dim=-1), -1, box)


def _ramp(points: int, size: int, box: int, device: torch.device) -> Tensor:
    """What a grid that begins at -P / 2 + 1 is multiplied by in real space."""
    turn = -2 * torch.pi * (points // 2 - 1) / size
    angle = centred_frequencies(box, device).double() * turn
    return torch.polar(torch.ones_like(angle), angle)


def fill_transforms(volumes: Tensor, size: int, factors: Tensor, out: Tensor) -> None:
    """The middle of the transforms of zero-padded real maps, side by side.

    Both halves are written, from the transform of one.

    Parameters
    ----------
    volumes : Tensor, shape (k, N, N, N), real
        Centred.
    size : int
        Points a side of the padded box.
    factors : Tensor, shape (k,), complex
        What each transform is multiplied by.
    out : Tensor, shape (K, K, K, k), complex
        Centred; K even, at most `size`, or one more if that is odd. Zero at -K / 2 along each axis.
    """
    keep, device = len(out), volumes.device
    low, mirrored = keep // 2, factors / factors.conj()
    rows = torch.fft.rfft(wrapped(volumes, -1, size), dim=-1)[..., :low]
    rows = rows.permute(1, 2, 3, 0).contiguous()
    planes = rows.new_empty(len(rows), keep, *rows.shape[2:])
    for start, stop in spans(len(rows), size * low * len(volumes), device):
        block = torch.fft.fft(wrapped(rows[start:stop], 1, size), dim=1)
        planes[start:stop] = middle(block, 1, keep)
    # By rows of a plane: what is written together lies together.
    for start, stop in spans(keep, size * low * len(volumes), device):
        block = torch.fft.fft(wrapped(planes[:, start:stop], 0, size), dim=0)
        there, first = out[:, start:stop, low:], max(start, 1)
        torch.mul(block[size - low :], factors, out=there[:low])
        torch.mul(block[:low], factors, out=there[low:])
        mates = there[1:, first - start :].flip((0, 1, 2)).conj()
        torch.mul(mates, mirrored, out=out[1:, keep - stop + 1 : keep - first + 1, 1 : low + 1])
    for border in range(3):
        out.select(border, 0).zero_()


def convolve(values: Tensor, kernel: Tensor) -> Tensor:
    """Periodic convolution of a zero-padded map, cut to its own box.

    Parameters
    ----------
    values : Tensor, shape (N, N, N), real
    kernel : Tensor, shape (S, S, S // 2 + 1), real
        Transform of the kernel as ``rfftn`` orders it, S at least 2 N - 1.
    """
    box, size, fft = len(values), len(kernel), torch.fft
    rows = fft.rfft(values, n=size, dim=2)
    for start, stop in spans(rows.shape[-1], size**2, values.device):
        block = fft.fft(fft.fft(rows[..., start:stop], n=size, dim=1), n=size, dim=0)
        block.mul_(kernel[..., start:stop])
        block = fft.ifft(fft.ifft(block, dim=0)[:box], dim=1)[:, :box]
        rows[..., start:stop] = block
    return fft.irfft(rows, n=size, dim=2)[..., :box]


def without_fall_off(weight: Tensor, size: int) -> Tensor:
    """A kernel's transform, once the fall-off of trilinear interpolation is divided out.

    Weights that were spread on a grid by linear interpolation are a kernel's transform whose
    kernel fell off as sinc^2 along each axis. Dividing by it is a real convolution of the weights
    along each axis, done as products of matrices.

    Parameters
    ----------
    weight : Tensor, shape (P - 1, P - 1, P // 2), real
        Columns kx >= 0, as :func:`columns` has them.
    size : int
        Points a side of the padded box, P - 1 or more.

    Returns
    -------
    Tensor, shape (S, S, S // 2 + 1)
        As ``rfftn`` orders it.
    """
    points, n_columns = len(weight), weight.shape[-1]
    mates = weight.flip((0, 1))
    ahead = torch.arange(size // 2 + 1, device=weight.device)
    there = torch.arange(n_columns, device=weight.device)
    along = _undone(ahead, there, size).to(weight)
    back = _undone(ahead, -there[1:], size).to(weight)
    held = weight @ along.T + mates[..., 1:] @ back.T
    around = torch.arange(size, device=weight.device)
    across = _undone(around, centred_frequencies(points, weight.device), size).to(weight)
    held = torch.matmul(across, held)
    return (across @ held.flatten(1)).view(size, size, -1)


def _undone(to: Tensor, of: Tensor, size: int) -> Tensor:
    """Matrix of the convolution with the transform of 1 / sinc^2, shape (to, of), float64."""
    fall = torch.sinc(torch.fft.fftfreq(size, dtype=torch.float64, device=to.device)) ** 2
    kernel = torch.fft.fft(1 / fall).real / size
    return kernel[(to[:, None] - of) % size]


def cropped(grid: Tensor, size: int) -> Tensor:
    """A grid without what a padded box of `size` points cannot hold; its side stays even."""
    most = size + size % 2
    return crop_or_pad_centred(grid, most, 3) if len(grid) > most else grid
