"""The map that fits images with known poses best, from their normal equations.

Dividing the gridded signal by the gridded weight takes the weight for constant over the
interpolation kernel. At low resolution, where the CTF rises from its amplitude contrast to its
first maximum within a few shells, that biases the map. Conjugate gradients on the normal
equations of maps that fit the box have no such error; the normal matrix is a convolution, so
that a step costs two transforms however many images there are (Wang, Shkolnisky & Singer 2013).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.physics.fourier import crop_or_pad_centred, radius_grid
from cryorecon.physics.projection import Transform, to_volume


def least_squares_map(
    sums: NormalEquations, prior: Tensor, support: Tensor, n_steps: int = 5
) -> Tensor:
    """Regularised least-squares map within a soft mask, by conjugate gradients.

    Parameters
    ----------
    sums : NormalEquations
        With padding 2 or more, so that the box's pairs of points do not wrap around.
    prior : Tensor, shape (n_shells,), real
        As in :meth:`NormalEquations.solve`, which gives the first guess; the last value holds
        beyond the end.
    support : Tensor, shape (N, N, N), real
        Mask that the map wears.
    n_steps : int
        Conjugate-gradient steps from there; 0 is the first guess, masked.

    Returns
    -------
    Tensor, shape (N, N, N), real
        Sums over a voxel's share of the box, times the mask.
    """
    box = len(support)
    guess = to_volume(sums.solve(prior), box)
    if n_steps == 0:
        return guess * support
    signal = torch.where(sums.shells() < len(prior), sums.signal, torch.zeros_like(sums.signal))
    seen = to_volume(Transform(signal, sums.padding), box) * support
    kernel = _normal_kernel(sums, prior, box)

    def normal(values: Tensor) -> Tensor:
        return _convolve(values * support, kernel) * support

    return _conjugate_gradients(normal, seen, guess, n_steps) * support


def _normal_kernel(sums: NormalEquations, prior: Tensor, box: int) -> Tensor:
    """Transform of the normal matrix's convolution kernel, real, in ``rfftn`` layout."""
    size = box * sums.padding
    known = sums.shells() < len(prior)
    weight = torch.where(known, sums.symmetrised().weight, torch.zeros_like(sums.weight))
    weight = _rfft_layout(crop_or_pad_centred(weight, size, 3))
    # Spreading the weights on the grid multiplied the kernel by the interpolation's fall-off.
    fall = torch.sinc(torch.fft.fftfreq(size, device=weight.device).to(weight)) ** 2
    kernel = torch.fft.irfftn(weight, s=(size,) * 3)
    kernel = kernel / (fall[:, None, None] * fall[:, None] * fall)
    shells = (radius_grid(size, 3, weight.device) / sums.padding + 0.5).long()
    penalty = prior.to(weight)[shells.clamp(max=len(prior) - 1)]
    return torch.fft.rfftn(kernel).real + _rfft_layout(penalty)


def _rfft_layout(centred: Tensor) -> Tensor:
    return torch.fft.ifftshift(centred)[..., : centred.shape[-1] // 2 + 1].contiguous()


def _convolve(values: Tensor, kernel: Tensor) -> Tensor:
    # Axis by axis: rows of zeros are not transformed, nor what is cut off.
    box, size, fft = len(values), len(kernel), torch.fft
    spectrum = fft.fft(fft.rfft(values, n=size, dim=2), n=size, dim=1)
    spectrum = fft.fft(spectrum, n=size, dim=0).mul_(kernel)
    spectrum = fft.ifft(fft.ifft(spectrum, dim=0)[:box], dim=1)[:, :box]
    return fft.irfft(spectrum, n=size, dim=2)[:, :, :box]


def _conjugate_gradients(
    matrix: Callable[[Tensor], Tensor], right: Tensor, start: Tensor, n_steps: int
) -> Tensor:
    """Solve ``matrix(x) = right`` for a positive semi-definite matrix."""
    found = start
    residual = right - matrix(found)
    direction, power = residual, residual.square().sum()
    for _ in range(n_steps):
        moved = matrix(direction)
        curvature = (direction * moved).sum()
        if not (power > 0 and curvature > 0):
            break
        length = power / curvature
        found = found + length * direction
        residual = residual - length * moved
        before, power = power, residual.square().sum()
        direction = residual + (power / before) * direction
    return found
