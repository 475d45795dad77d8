"""The image model: map, pose, in-plane offset and CTF to an image with noise.

``Y_k = CTF_k * S_k(A) * exp(2 pi i k . o / N) + noise_k``, with S the central slice of the map's
transform at rotation A, o the RELION origin in pixels, and noise independent between
coefficients with a variance that depends on the shell. Simulation, engines and tests all call
this module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.physics.fourier import (
    HalfPlane,
    half_plane,
    shell_sums,
    shift_phases,
    to_coefficients,
    to_images,
)
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.projection import Transform, extract_slices, padded_transform

# Coefficients that all images' spectrum, and their level, count as beside a group's own.
_SPECTRUM_COUNTS, _LEVEL_COUNTS = 1000.0, 10_000.0


def predict(
    transform: Transform,
    rotations: Tensor,
    offsets_px: Tensor | None,
    ctf_values: Tensor | None,
    plane: HalfPlane,
) -> Tensor:
    """Noise-free half-plane coefficients of images; differentiable in map, rotation, offset.

    Parameters
    ----------
    transform : Transform
        From :func:`cryorecon.physics.projection.padded_transform`.
    rotations : Tensor, shape (b, 3, 3)
        A, reference to image coordinates.
    offsets_px : Tensor, shape (b, 2), or None for none
        (ox, oy), RELION origin over pixel size; content moves by its negative.
    ctf_values : Tensor, shape (b, m), or None for 1
    plane : HalfPlane of m coefficients

    Returns
    -------
    Tensor, shape (b, m), complex
    """
    slices = extract_slices(transform, rotations, plane)
    if offsets_px is not None:
        slices = slices * shift_phases(offsets_px, plane).to(slices.dtype)
    return slices if ctf_values is None else slices * ctf_values


def render(
    volume: Tensor,
    rotations: Tensor,
    offsets_px: Tensor | None = None,
    ctf_values: Tensor | None = None,
    padding: int = 2,
) -> Tensor:
    """Noise-free images of a map, shape (b, N, N); coefficients up to ``(N - 1) // 2``.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
    rotations, offsets_px, ctf_values
        As in :func:`predict`, with the CTF on ``half_plane(N)``.
    padding : int
        Oversampling of the transform; 2 carries some percent of error at high resolution, 4
        a fifth of that.
    """
    plane = half_plane(volume.shape[-1], device=volume.device)
    transform = padded_transform(volume, padding)
    return to_images(predict(transform, rotations, offsets_px, ctf_values, plane), plane)


def noise_power_outside(images: Tensor, radius_px: float, plane: HalfPlane) -> Tensor:
    """Noise power by shell, from the part of the images outside a circle, averaged over images.

    Parameters
    ----------
    images : Tensor, shape (b, N, N), real
    radius_px : float
        Radius of the circle that holds the particle.
    plane : HalfPlane of the box

    Returns
    -------
    Tensor, shape (n_shells,)
        Expected ``|noise_k|^2`` of the unnormalised transform of a whole image.
    """
    spectrum = shell_means(_power_outside(images, radius_px, plane).mean(0), plane)
    spectrum[0] = spectrum[min(1, len(spectrum) - 1)]
    return spectrum


def noise_powers_outside(
    images: Tensor, radius_px: float, plane: HalfPlane, unmixing: Tensor
) -> Tensor:
    """The same for each image by itself, without the smoothing of the window; (b, n_shells).

    Parameters
    ----------
    images, radius_px, plane
        As in :func:`noise_power_outside`.
    unmixing : Tensor, shape (n_shells, n_shells)
        From :func:`noise_unmixing`. Single images may get negative values; their mean is unbiased.
    """
    return shell_means(_power_outside(images, radius_px, plane), plane) @ unmixing.to(images).T


def noise_unmixing(radius_px: float, plane: HalfPlane) -> Tensor:
    """Takes the spectrum seen outside a circle to that of the noise; shape (S, S), float64.

    Cutting out a part of an image mixes neighbouring shells, and subtracting its mean takes from
    the lowest. Both are linear in the noise's power; this is the inverse. Shell 0 is taken to have
    the power of shell 1, which it cannot be told from.
    """
    box, n_shells = plane.box, plane.n_shells
    outside = 1 - soft_ball(box, radius_px, 2.0, 2, torch.float64)
    window = torch.fft.fft2(torch.fft.ifftshift(outside))
    level = window.conj() / window[0, 0]
    axis = torch.fft.fftfreq(box, 1 / box).double()
    radius = (axis**2 + axis[:, None] ** 2).sqrt()
    shells = (radius + 0.5).long().clamp(max=n_shells - 1)
    kx, ky = plane.frequencies.unbind(-1)
    as_image, as_power = torch.fft.ifft2(window), torch.fft.ifft2(window.abs() ** 2)

    def convolved(kernel_image: Tensor, values: Tensor) -> Tensor:
        return torch.fft.fft2(kernel_image * torch.fft.ifft2(values)) * box**2

    columns = []
    for shell in range(n_shells):
        mine = (shells == shell).double()
        cross = convolved(as_image, mine * level) * window.conj()
        seen = convolved(as_power, mine.to(cross)).real - 2 * cross.real
        seen = seen + window.abs() ** 2 * (mine * level.abs() ** 2).sum()
        columns.append(shell_means(seen[ky % box, kx % box], plane))
    mixing = torch.stack(columns, 1) / (box**2 * (outside**2).sum())
    mixing[:, 1] += mixing[:, 0]
    inverse = torch.zeros(n_shells, n_shells, dtype=torch.float64)
    inverse[1:, 1:] = torch.linalg.inv(mixing[1:, 1:])
    inverse[0] = inverse[1]
    return inverse


def _power_outside(images: Tensor, radius_px: float, plane: HalfPlane) -> Tensor:
    """``|transform|^2`` outside a circle, scaled to the whole image; shape (b, m)."""
    box = images.shape[-1]
    outside = 1 - soft_ball(box, radius_px, 2.0, 2, images.dtype, images.device)
    level = (images * outside).sum((-2, -1), keepdim=True) / outside.sum()
    power = to_coefficients((images - level) * outside, plane).abs() ** 2
    return power * (box**2 / (outside**2).sum())


def coefficients_by_shell(plane: HalfPlane) -> Tensor:
    """How many coefficients each shell of a half plane has, shape (n_shells,), on its device."""
    ones = torch.ones(len(plane), device=plane.shell.device)
    return shell_sums(ones, plane.shell, plane.n_shells)


def pooled_spectra(power: Tensor, count: Tensor) -> Tensor:
    """Noise spectra of optics groups, a small one's mostly that of all images at its own level.

    A few images tell a level, but no spectrum; and maps that follow them make what they leave
    unexplained less, so that they would weigh more from round to round. Each shell of a group
    counts as many coefficients as it has, and 1,000 of the spectrum of all groups together at the
    group's level; its level counts its coefficients, and 10,000 that have the level of all.

    Parameters
    ----------
    power : Tensor, shape (groups, n_shells), real
        Sums of squared moduli.
    count : Tensor, shape (groups, n_shells), real
        Coefficients in each sum.

    Returns
    -------
    Tensor, shape (groups, n_shells)
        Means; of one group alone its own. 0 in shells that no group has.
    """
    everyone = power.sum(0) / count.sum(0).clamp(min=1)
    if int((count.sum(1) > 0).sum()) == 1:
        return torch.where(count > 0, power / count.clamp(min=1), everyone)
    # Every coefficient in units of the noise of all: shells of little power count alike.
    relative = (power / everyone.clamp(min=1e-30)).sum(1, keepdim=True)
    total = count.sum(1, keepdim=True)
    level = (relative + _LEVEL_COUNTS) / (total + _LEVEL_COUNTS)
    return (power + _SPECTRUM_COUNTS * level * everyone) / (count + _SPECTRUM_COUNTS)


def shell_means(values: Tensor, plane: HalfPlane) -> Tensor:
    """Mean over each shell along the last axis: shape (..., m) to (..., n_shells)."""
    shells = plane.shell.to(values.device)
    counts = torch.bincount(shells, minlength=plane.n_shells).clamp(min=1)
    return shell_sums(values, shells, plane.n_shells) / counts.to(values.dtype)


def log_likelihood(
    observed: Tensor, predicted: Tensor, noise_power: Tensor, plane: HalfPlane
) -> Tensor:
    """Log-likelihood of each image, up to a constant of the noise alone.

    ``- sum_k |Y_k - X_k|^2 / noise_k`` over the half plane: each kept coefficient's real and
    imaginary parts have variance ``noise_k / 2``; the origin is real and counts one half.

    Parameters
    ----------
    observed, predicted : Tensor, shape (..., m), complex
    noise_power : Tensor, shape (n_shells,) or (..., n_shells)
        Expected ``|noise_k|^2`` by shell.

    Returns
    -------
    Tensor, shape (...)
    """
    weights = plane.multiplicity.to(noise_power) / 2 / noise_power[..., plane.shell]
    return -((observed - predicted).abs() ** 2 * weights).sum(-1)
