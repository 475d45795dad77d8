"""How well two maps would agree by chance, once one was aligned to the other."""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve, taken_out
from cryorecon.physics.fourier import fft_centred, ifft_centred, radius_grid, shell_sums

# Standard deviations of Fisher's z above its mean that noise is taken to reach: one in 700 goes
# beyond. The largest of a few trials says little about shells of few coefficients.
_SPREAD = 3.0
# The first shell's few coefficients can agree nearly fully by chance; were all of that taken out,
# maps that are alike would seem to differ there.
_MOST = 0.9
# Correlations of which z is still finite.
_CERTAIN = 0.999


def _coloured(noise: Tensor, volume: Tensor) -> Tensor:
    """Noise, given a map's power in every shell."""
    wanted, found = (fft_centred(v, 3) for v in (volume, noise.to(volume)))
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
    *,
    aligned: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """FSC that noise in place of the moving map may reach, once aligned to the reference.

    Alignment takes the best of many thousand rotations, shifts and two hands, which makes even
    noise agree with a map in the shells that have few coefficients.

    Parameters
    ----------
    moving, reference : Tensor, shape (N, N, N), real
        Unmasked.
    mask : Tensor, shape (N, N, N)
        Worn by both when they are compared.
    n_trials : int
        Maps of noise, each with the moving map's power in every shell; without any, 0 is found.
    aligned : tuple of two Tensors, shape (N, N, N), real, optional
        What the moving map and the reference look like where they are aligned, if other than
        where they are compared: filtered maps leave few shells to decide, which then agree the
        better.

    Returns
    -------
    Tensor, shape (N // 2 + 1,), float64
        Three standard deviations (of Fisher's z) above the trials' mean; the largest at this or
        any finer shell, 0 to 0.9. Of one trial its own values.
    """
    curves = [] if n_trials else [torch.zeros(len(moving) // 2 + 1, dtype=torch.float64)]
    for _ in range(n_trials):
        white = torch.randn(moving.shape, generator=generator, dtype=moving.dtype)
        noise = _coloured(white, moving) * mask
        if aligned is None:
            found = align_maps(noise, reference * mask, pixel_size_angst)
        else:
            found = align_maps(_coloured(white, aligned[0]) * mask, aligned[1], pixel_size_angst)
        curve = fsc_curve(apply_alignment(noise, found) * mask, reference * mask)
        # Shells beyond those that were aligned are not biased.
        curve[int(found.band) + 2 :] = 0
        curves.append(curve.cpu())
    z = torch.stack(curves).clamp(-_CERTAIN, _CERTAIN).atanh()
    spread = z.std(0, correction=min(len(z) - 1, 1))
    limit = (z.mean(0) + _SPREAD * spread).tanh().clamp(0.0, _MOST)
    return limit.flip(0).cummax(0).values.flip(0)


def beyond_chance(curve: Tensor, chance: Tensor) -> Tensor:
    """An FSC with what chance explains taken out: ``(F - C) / (1 - C)``; 1 stays 1.

    Chen et al. (2013) take out in the same way what a mask explains. No less than -1, where an
    FSC ends.

    Parameters
    ----------
    curve, chance : Tensor, shape (N // 2 + 1,)
    """
    beyond = taken_out(curve, chance, _MOST)
    beyond[0] = curve[0]
    return beyond
