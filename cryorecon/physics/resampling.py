"""Maps and images on other grids, and moved by parts of a voxel: all by Fourier transforms."""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.physics.fourier import (
    centred_frequencies,
    fft_centred,
    ifft_centred,
)


def resample_sums(volume: Tensor, box: int) -> Tensor:
    """A map of voxel sums on another grid: the same transform, cropped or padded.

    Axis by axis, by products with real matrices: no padded cube of complex numbers is made.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
    """
    volume = volume if volume.is_floating_point() else volume.float()
    matrix = _resampler(len(volume), box, volume.device).to(volume)
    across = torch.matmul(matrix, volume @ matrix.T)
    return (matrix @ across.flatten(1)).unflatten(1, (box, box))


def _resampler(size: int, box: int, device: torch.device) -> Tensor:
    """Samples on another grid of the same width from samples of one, shape (box, size), float64.

    A Nyquist frequency, whose sign a grid cannot tell, is a cosine.
    """
    frequencies = centred_frequencies(min(size, box), device).double() * (2 * torch.pi)
    to, of = (
        torch.outer(centred_frequencies(n, device).double() / n, frequencies) for n in (box, size)
    )
    return (to.cos() @ of.cos().T + to.sin() @ of.sin().T) / box


def resample_volume(volume: Tensor, box: int) -> Tensor:
    """The same real volume on a grid of `box` samples a side, by Fourier cropping or padding.

    Values keep their scale (density, not sums). The field of view is unchanged, so the pixel
    size becomes ``old * old_box / box``.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
    """
    if box == volume.shape[-1]:
        return volume
    return resample_sums(volume, box) * (box / volume.shape[-1]) ** 3


def sample_volume(volume: Tensor, box: int, step: float) -> Tensor:
    """The same real volume on a grid of any spacing, centre on centre, by trigonometric sums.

    Values keep their scale (density). Frequencies that the new grid cannot hold, along each axis,
    are removed; the volume goes on periodically outside its box.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
    box : int
        Samples a side of the result.
    step : float
        New spacing in samples of the volume.
    """
    size = volume.shape[-1]
    frequencies = centred_frequencies(size, volume.device)
    keep = frequencies.abs() * step <= size / 2
    points = centred_frequencies(box, volume.device).double() * step
    angle = (2 * torch.pi / size) * points[:, None] * frequencies[keep]
    transform = fft_centred(volume, 3)[keep][:, keep][:, :, keep]
    waves = torch.polar(torch.ones_like(angle), angle).to(transform.dtype) / size
    for _ in range(3):  # Each turn sums over the first axis and puts the new one last.
        transform = torch.tensordot(transform, waves, dims=([0], [1]))
    return transform.real


def shift_volume(volume: Tensor, shift_px: Tensor) -> Tensor:
    """A map whose content is moved by (x, y, z) pixels, around the borders of its box.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
    shift_px : Tensor, shape (3,)
        Parts of a voxel count: every coefficient below Nyquist keeps its amplitude.
    """
    box = volume.shape[-1]
    frequencies = centred_frequencies(box, volume.device).double()
    moved = fft_centred(volume, 3)
    for dim, shift in zip((-1, -2, -3), shift_px.double(), strict=True):
        angle = (-2 * torch.pi / box) * shift * frequencies
        phases = torch.polar(torch.ones_like(angle), angle).to(moved.dtype)
        moved = moved * phases.view(-1, *[1] * (-dim - 1))
    return ifft_centred(moved, 3).real


def downsample_images(images: Tensor, box: int) -> Tensor:
    """Real images on a coarser grid of the same width, by Fourier cropping.

    As programs do on extraction: values keep their scale, what lies on sample ``N // 2`` lies on
    ``box // 2``, and the pixel size becomes ``old * N / box``. The new grid's Nyquist frequency,
    whose sign it cannot tell, is left out. A constant is subtracted before and added after, so
    that images of one value stay so.

    Parameters
    ----------
    images : Tensor, shape (b, N, N), float32 or float64
    box : int
        At most N.

    Returns
    -------
    Tensor, shape (b, box, box)
    """
    size = images.shape[-1]
    if box == size:
        return images
    level = images[:, :1, :1]
    below = (box - 1) // 2
    # Axis by axis: frequencies that are cropped in x take no time in y.
    values = torch.fft.fft(torch.fft.rfft(images - level)[..., : below + 1], dim=-2)
    frequencies = torch.arange(-below, below + 1, device=images.device)
    phases = _recentring(frequencies, size, box).to(values.dtype)
    values = values[:, frequencies] * phases[:, None] * phases[below:]
    cropped = values.new_zeros(len(images), box, box // 2 + 1)
    cropped[:, frequencies, : below + 1] = values * (box / size) ** 2
    return torch.fft.irfft2(cropped, s=(box, box)) + level


def _recentring(frequencies: Tensor, size: int, box: int) -> Tensor:
    """Factors that bring sample ``size // 2`` of one grid onto ``box // 2`` of another."""
    angle = 2 * torch.pi * ((size // 2) / size - (box // 2) / box) * frequencies.double()
    return torch.polar(torch.ones_like(angle), angle)
