"""How well two maps would agree by chance, once one was aligned to the other."""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.fourier import fft_centred, ifft_centred, radius_grid, shell_sums


def noise_like(volume: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise with a map's power in every shell, on the map's device.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
    """
    noise = torch.randn(volume.shape, generator=generator, dtype=volume.dtype)
    wanted, found = (fft_centred(v, 3) for v in (volume, noise.to(volume.device)))
    shells = (radius_grid(len(volume), 3, volume.device) + 0.5).long()
    n_shells = int(shells.max()) + 1
    power = [
        shell_sums(f.abs().square().flatten(), shells.flatten(), n_shells) for f in (wanted, found)
    ]
    return ifft_centred(found * (power[0] / power[1].clamp(min=1e-30)).sqrt()[shells], 3).real


def chance_fsc(
    moving: Tensor,
    reference: Tensor,
    mask: Tensor,
    pixel_size_angst: float,
    generator: torch.Generator,
    n_trials: int = 6,
) -> Tensor:
    """Largest FSC that noise in place of the moving map reaches, once aligned to the reference.

    Alignment takes the best of many thousand rotations, shifts and two hands, which makes even
    noise agree with a map in the shells that have few coefficients.

    Parameters
    ----------
    moving, reference : Tensor, shape (N, N, N), real
        Unmasked.
    mask : Tensor, shape (N, N, N)
        Worn by both when they are compared.
    n_trials : int
        Maps of noise, each with the moving map's power in every shell.

    Returns
    -------
    Tensor, shape (N // 2 + 1,), float64
        The largest value of the trials at this or any finer shell; at least 0.
    """
    largest = torch.zeros(len(moving) // 2 + 1, dtype=torch.float64)
    for _ in range(n_trials):
        noise = noise_like(moving, generator) * mask
        found = align_maps(noise, reference * mask, pixel_size_angst)
        curve = fsc_curve(apply_alignment(noise, found) * mask, reference * mask)
        # Shells beyond those that were aligned are not biased.
        curve[int(found.band) + 2 :] = 0
        largest = torch.maximum(largest, curve.cpu())
    return largest.flip(0).cummax(0).values.flip(0)


def beyond_chance(curve: Tensor, chance: Tensor) -> Tensor:
    """An FSC with what chance explains taken out: ``(F - C) / (1 - C)``; 1 stays 1.

    Chen et al. (2013) take out in the same way what a mask explains.

    Parameters
    ----------
    curve, chance : Tensor, shape (N // 2 + 1,)
    """
    limited = chance.to(curve).clamp(0.0, 0.99)
    beyond = (curve - limited) / (1 - limited)
    beyond[0] = curve[0]
    return beyond
