"""Pose search shared by the engines: a posterior over a grid, then local Gauss-Newton steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.observations import Observations, as_real, centred
from cryorecon.physics.fourier import (
    HalfPlane,
    centred_frequencies,
    crop_or_pad_centred,
    fft_centred,
    shift_phases,
)
from cryorecon.physics.projection import (
    gridding_correction,
)
from cryorecon.physics.rotations import exp_map


def offset_grid(range_px: float, step_px: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """In-plane offsets (ox, oy) in pixels on a square lattice within a disc; shape (s, 2)."""
    reach = int(range_px / step_px + 1e-6)
    axis = torch.arange(-reach, reach + 1, dtype=dtype) * step_px
    lattice = torch.cartesian_prod(axis, axis)
    lattice = lattice[lattice.norm(dim=-1) <= range_px + 1e-6]
    return lattice[torch.sort(lattice.norm(dim=-1), stable=True).indices]


@dataclass(frozen=True)
class GridPosterior:
    """What a grid search found.

    Attributes
    ----------
    best_rotation, best_offset : Tensor, shape (n,), int64
        Index of the best grid rotation and offset of each image.
    log_evidence : Tensor, shape (n,)
        Log of the mean likelihood over the grid, against an empty image.
    effective_poses : Tensor, shape (n,)
        Inverse of the sum of squared weights.
    """

    best_rotation: Tensor
    best_offset: Tensor
    log_evidence: Tensor
    effective_poses: Tensor


def grid_expectation(
    observations: Observations,
    templates: Tensor,
    offsets_px: Tensor,
    temperature: float = 1.0,
    chunk_elements: int = 40_000_000,
) -> tuple[GridPosterior, Tensor, Tensor]:
    """Posterior of each image over all grid poses, and its sums over images.

    The likelihood of every (image, offset, rotation) is two matrix products; so are the sums
    that a map update needs, and no image is ever projected by itself.

    Parameters
    ----------
    observations : Observations of n images, m coefficients
    templates : Tensor, shape (r, m), complex
        Slices of the current map at the grid's rotations.
    offsets_px : Tensor, shape (s, 2)
    temperature : float
        Divides the log-likelihood; above 1 spreads the posterior.

    Returns
    -------
    posterior : GridPosterior
    signal : Tensor, shape (r, m), complex
        Posterior-weighted sum of the images, offsets undone, at each rotation.
    weight : Tensor, shape (r, m), real
    """
    n, (r, m), s = len(observations), templates.shape, len(offsets_px)
    real_templates = as_real(templates)
    power = templates.abs() ** 2
    signal = templates.real.new_zeros(r, 2 * m)
    weight = templates.real.new_zeros(r, m)
    parts = []
    for rows in torch.arange(n).split(max(1, chunk_elements // (r * s))):
        matched, weights = observations.select(rows).matched()
        shifted = as_real(centred(matched[:, None, :], offsets_px[None], observations.plane))
        score = torch.baddbmm(
            -(weights @ power.T)[:, None, :].expand(-1, s, -1),
            shifted,
            real_templates.T.expand(len(rows), -1, -1),
            alpha=2.0,
        ).div_(temperature)
        flat = score.view(len(rows), -1)
        peak, best = flat.max(-1, keepdim=True)
        flat.sub_(peak).exp_()
        total = flat.sum(-1, keepdim=True)
        flat.div_(total)
        signal.addmm_(score.view(-1, r).T, shifted.view(-1, 2 * m))
        weight.addmm_(score.sum(1).T, weights)
        evidence = (peak + total.log()).squeeze(-1) - torch.log(torch.tensor(float(r * s)))
        effective = 1 / flat.square_().sum(-1)
        parts.append((best.squeeze(-1) % r, best.squeeze(-1) // r, evidence, effective))
    posterior = GridPosterior(*(torch.cat(p) for p in zip(*parts, strict=True)))
    return posterior, torch.complex(signal[:, :m], signal[:, m:]), weight


def accumulate_grid(
    signal: Tensor, weight: Tensor, rotations: Tensor, plane: HalfPlane, padding: int = 2
) -> NormalEquations:
    """Normal equations of a map from the sums of :func:`grid_expectation`."""
    sums = NormalEquations.empty(float(plane.radius[-1]), padding, weight.dtype, weight.device)
    sums.add(signal, weight, rotations.to(weight.dtype), plane)
    return sums


@dataclass(frozen=True)
class Derivatives:
    """A map's oversampled transform with its gradient in Fourier space.

    Attributes
    ----------
    table : Tensor, shape (P, P, P, 8), real
        Real and imaginary parts of F, dF/dkx, dF/dky, dF/dkz (k in cycles per box).
    padding : int
    """

    table: Tensor
    padding: int


def derivatives(volume: Tensor, padding: int, band: float) -> Derivatives:
    """Transform of a map and of ``-2 pi i x / N`` times it, for analytic pose gradients.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
    band : float
        How far, in cycles per box, slices will reach.
    """
    box = volume.shape[-1]
    corrected = volume / gridding_correction(box, padding, volume.dtype, volume.device)
    axis = centred_frequencies(box, volume.device).to(volume.dtype) * (-2 * torch.pi / box)
    size = min(box * padding, 2 * (int(band * padding) + 2))
    grids = []
    for ramp in (None, axis, axis[:, None], axis[:, None, None]):
        source = corrected if ramp is None else corrected * ramp
        transform = fft_centred(crop_or_pad_centred(source, box * padding, 3), 3)
        transform = crop_or_pad_centred(transform, size, 3)
        grids.append(torch.view_as_real(transform if ramp is None else transform * 1j))
    return Derivatives(torch.cat(grids, -1).contiguous(), padding)


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
    from cryorecon.physics.projection import _corners

    index, weights = _corners(rotations, plane, model.table.shape[0], model.padding)
    table = model.table.reshape(-1, 8)
    values = torch.nn.functional.embedding_bag(
        index, table, per_sample_weights=weights.to(table.dtype), mode="sum"
    ).reshape(len(rotations), len(plane), 4, 2)
    values = torch.view_as_complex(values)
    # d(A^T exp(w)^T k)/dw: with g = A grad F in the image frame, dF = w . (g x k)... for
    # k = (kx, ky, 0): exp(w)^T k = k - w x k, so dF = -g . (w x k) = -w . (k x g).
    gradient = values[..., 1:] @ rotations.transpose(-1, -2).to(values.dtype)
    kx, ky = plane.frequencies.to(table.dtype).unbind(-1)
    gx, gy, gz = gradient.unbind(-1)
    torque = torch.stack([-ky * gz, kx * gz, -(kx * gy - ky * gx)], -1)
    return values[..., 0], torque


def refine_poses(
    observations: Observations,
    model: Derivatives,
    rotations: Tensor,
    offsets_px: Tensor,
    n_steps: int = 4,
    offset_sigma_px: float = 10.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Levenberg-Marquardt steps of each image's rotation and offset on its log-likelihood.

    Parameters
    ----------
    observations : Observations of n images
    model : Derivatives of the map
    rotations : Tensor, shape (n, 3, 3)
    offsets_px : Tensor, shape (n, 2)
    n_steps : int
    offset_sigma_px : float
        Width of the Gaussian prior of the offsets.

    Returns
    -------
    rotations, offsets_px : Tensor
        Never less likely than what came in.
    log_likelihood : Tensor, shape (n,)
        Against an empty image.
    curvature : Tensor, shape (n, 5, 5)
        Minus the expected second derivative in (rotation vector in radians, offset in px).
    """
    precision = observations.precision()
    root = precision.sqrt()
    target = observations.coefficients * root
    gain = observations.ctf * root
    frequencies = observations.plane.frequencies.to(gain.dtype) * (
        2 * torch.pi / observations.plane.box
    )
    prior = torch.zeros(5, dtype=gain.dtype, device=gain.device)
    prior[3:] = 1 / offset_sigma_px**2

    def evaluate(a: Tensor, o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slices, torque = slices_with_gradient(model, a, observations.plane)
        factor = gain * shift_phases(o, observations.plane).to(slices.dtype)
        predicted = slices * factor
        jacobian = torch.cat(
            [torque * factor[..., None], predicted[..., None] * (1j * frequencies)], -1
        )
        residual = target - predicted
        value = (target.abs() ** 2 - residual.abs() ** 2).sum(-1) - (o**2).sum(
            -1
        ) / 2 / offset_sigma_px**2
        jacobian = torch.view_as_real(jacobian).transpose(-1, -2).flatten(1, 2)
        residual = torch.view_as_real(residual).flatten(1)
        gradient = 2 * (jacobian.transpose(-1, -2) @ residual[..., None]).squeeze(-1)
        gradient[:, 3:] -= o / offset_sigma_px**2
        curvature = 2 * jacobian.transpose(-1, -2) @ jacobian + torch.diag(prior)
        return value, gradient, curvature

    value, gradient, curvature = evaluate(rotations, offsets_px)
    damping = torch.full_like(value, 1e-2)
    for _ in range(n_steps):
        diagonal = torch.diagonal(curvature, dim1=-2, dim2=-1)
        damped = curvature + torch.diag_embed(diagonal * damping[:, None] + 1e-6)
        step = torch.linalg.solve(damped, gradient)
        length = step[:, :3].norm(dim=-1, keepdim=True)
        step[:, :3] = step[:, :3] * (0.15 / length.clamp(min=0.15))
        new_rotations = exp_map(step[:, :3]) @ rotations
        new_offsets = offsets_px + step[:, 3:].clamp(-2, 2)
        new_value, new_gradient, new_curvature = evaluate(new_rotations, new_offsets)
        better = new_value > value
        rotations = torch.where(better[:, None, None], new_rotations, rotations)
        offsets_px = torch.where(better[:, None], new_offsets, offsets_px)
        gradient = torch.where(better[:, None], new_gradient, gradient)
        curvature = torch.where(better[:, None, None], new_curvature, curvature)
        value = torch.where(better, new_value, value)
        damping = torch.where(better, damping * 0.2, damping * 8).clamp(1e-4, 1e4)
    return rotations, offsets_px, value, curvature
