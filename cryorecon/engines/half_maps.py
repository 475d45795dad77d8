"""Maps of the half sets, from images at the poses that they have, and how far they agree."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.least_squares import least_squares_map, wiener_map
from cryorecon.engines.observations import ImageSet, Observations, centred
from cryorecon.engines.reconstruction import Agreement, Reconstruction, shell_prior
from cryorecon.engines.rivals import Doubt
from cryorecon.engines.shrinking import ShrinkingBatch
from cryorecon.physics.fourier import HalfPlane, max_band

_Pair = tuple[Tensor, Tensor]
# Conjugate-gradient steps of joint maps. Poses come out the same with references from signal over
# weight (0.83 degrees both), at a tenth less time.
_STEPS = 5


def empty_sums(images: ImageSet) -> NormalEquations:
    """The equations of a map that no image was added to yet."""
    band = float(max_band(images.plane.box))
    return NormalEquations.empty(band, 2, images.gain.dtype, images.device)


def insert(
    sums: NormalEquations, batch: Observations, poses: _Pair, doubt: Doubt, group: Tensor
) -> None:
    """Add images at their poses, or a share of each at every pose it may have.

    Parameters
    ----------
    poses : tuple of Tensor, shapes (b, 3, 3) and (b, 2)
        Rotations and offsets.
    doubt : Doubt
        Other poses of the same images.
    group : Tensor, shape (g, 3, 3)
        Rotations that leave the map as it is.
    """
    (matched, weight), own = batch.matched(), doubt.own[:, None]
    _add(sums, batch.plane, (matched * own, weight * own), poses, group)
    for some in torch.arange(len(doubt.image), device=batch.device).split(max(1, len(batch))):
        image, share = doubt.image[some], doubt.share[some, None]
        others = doubt.rotations[some], doubt.offsets_px[some]
        _add(sums, batch.plane, (matched[image] * share, weight[image] * share), others, group)


def _add(
    sums: NormalEquations,
    plane: HalfPlane,
    values: _Pair,
    poses: _Pair,
    group: Tensor,
) -> None:
    """Add images, as :meth:`Observations.matched` gives them, at poses and their equivalents."""
    signal, weight = centred(values[0], poses[1], plane), values[1]
    parts = ShrinkingBatch(max(1, len(signal)))
    for rotation in group.to(poses[0]):
        turned = poses[0] @ rotation

        def add(span: slice, turned: Tensor = turned) -> None:
            sums.add(signal[span], weight[span], turned[span], plane)

        for _ in parts.over(len(signal), add):
            pass


def solve_halves(
    state: Reconstruction,
    sums: list[NormalEquations],
    agreement: Agreement,
    images: ImageSet,
    *,
    joint: bool,
) -> None:
    """Wiener maps whose signal power comes from the half sets' agreement.

    A joint round leaves the half sets' own maps and their FSC as the last half-map round left them:
    poses that were refined against the joint map would make the halves agree too well. With
    correlation c between half maps the signal-to-noise ratio of one is c / (1 - c), of both
    together twice that. Processes solve half sets at the same time, one each.
    """
    if not (joint and state.halves):
        state.halves = [_unfiltered(of, state) for of in sums]
        _compare(state, agreement, images)
    solved = [sums[0].plus(sums[1])] if joint else sums
    makers = [partial(_filtered, of, state, joint=joint) for of in solved]
    maps = images.ranks.made(makers, state.maps[0])
    state.maps = maps * 2 if joint else maps


def _unfiltered(of: NormalEquations, state: Reconstruction) -> Tensor:
    box = state.maps[0].shape[-1]
    return wiener_map(of, shell_prior(of, 1e-3, max_band(box)), box)


def _filtered(of: NormalEquations, state: Reconstruction, *, joint: bool = False) -> Tensor:
    box = state.maps[0].shape[-1]
    correlation = state.fsc[: max_band(box) + 1].clamp(1e-3, 0.999).to(of.weight.device)
    ratio = (2.0 if joint else 1.0) * correlation / (1 - correlation)
    prior = of.shell_mean_weight()[: len(ratio)] / ratio
    return least_squares_map(of, prior, _mask(state), _STEPS if joint else 0)


def _mask(state: Reconstruction) -> Tensor:
    volume = state.maps[0]
    return state.support.on(volume.shape[-1], device=volume.device)


def _compare(state: Reconstruction, agreement: Agreement, images: ImageSet) -> None:
    """How far half maps agree, now that they are new."""
    mask = _mask(state)
    state.fsc = agreement(*(half * mask for half in state.halves)).cpu()
    if images.empty is not None and bool(images.empty[:, -1].all()):
        # The mask carries what agrees in other shells beyond the last that any image shows.
        shown = torch.nonzero(~images.empty.all(0))
        state.fsc[int(shown[-1]) + 1 :] = 0
    images.ranks.same(state.fsc)


def agreement_band(fsc: Tensor, threshold: float = 0.143) -> float:
    """Last shell before the half maps' correlation first falls below a threshold."""
    below = torch.nonzero(fsc[1:] < threshold)
    return float(below[0]) if len(below) else float(len(fsc) - 1)
