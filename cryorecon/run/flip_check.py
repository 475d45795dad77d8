"""Whether images are phase flipped though their table does not say so."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryorecon.engines.observations import ImageSet, Source
from cryorecon.engines.reconstruction import Reconstruction, RefineConfig
from cryorecon.engines.rounds import refine_round
from cryorecon.maps.fsc import crossing_shell, fsc_curve
from cryorecon.physics.fourier import max_band

# Half maps that end beyond this share of the band show that the signs are right.
_FAR = 0.6
# Images that are asked, about; shells by which, and factor, their half maps must agree further.
_ASKED, _MORE_SHELLS, _FACTOR = 4000, 1.5, 1.2


@dataclass(frozen=True)
class _Unsigned:
    """A source of the same images, with the magnitude of their CTF."""

    signed: Source

    def __call__(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        coefficients, ctf = self.signed(rows, count)
        return coefficients, ctf.abs()


def look_flipped(images: ImageSet, state: Reconstruction, config: RefineConfig) -> bool:
    """Whether half maps from a job's poses agree further by the magnitude of the CTF.

    Poses follow from shells before the CTF's first zero, where its sign does not matter; beyond
    it, images whose phases were flipped cancel in a map that expects them as they were recorded.

    Parameters
    ----------
    images : ImageSet of n images
        Modelled by their CTF with its sign.
    state : Reconstruction of them
        Stays as it is.
    """
    if crossing_shell(state.fsc, 0.143) > _FAR * max_band(images.plane.box):
        return False
    rows = torch.arange(len(images))[:: max(1, len(images) // _ASKED)]
    signed = _agreement(images.apart(rows), state, rows, config)
    some = replace(images.apart(rows), source=_Unsigned(images.source))
    unsigned = _agreement(some, state, rows, config)
    return unsigned > max(_FACTOR * signed, signed + _MORE_SHELLS)


def _agreement(
    images: ImageSet, state: Reconstruction, rows: Tensor, config: RefineConfig
) -> float:
    """Sum over shells of the FSC of half maps from the poses as they are."""
    poses = state.rotations[rows], state.offsets_px[rows]
    nothing = [torch.zeros_like(volume) for volume in state.maps]
    made = Reconstruction(*poses, state.half[rows], nothing, state.band, state.support)
    made.group = state.group
    refine_round(made, images, config, fsc_curve, joint=False, n_steps=0)
    return float(made.fsc[1:].clamp(min=0).sum())
