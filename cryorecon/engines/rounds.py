"""Rounds of refinement, shared by the engines: poses and maps, half set against half set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.least_squares import least_squares_map
from cryorecon.engines.observations import ImageSet, Observations, centred
from cryorecon.engines.reconstruction import (
    Agreement,
    Progress,
    Reconstruction,
    RefineConfig,
    best_grid_poses,
    shell_prior,
)
from cryorecon.engines.refine import (
    Derivatives,
    Poses,
    derivatives,
    image_scales,
    predictions,
    refine_poses,
    residual_power,
)
from cryorecon.physics.fourier import max_band
from cryorecon.physics.masks import molecule_mask
from cryorecon.physics.projection import to_volume
from cryorecon.physics.rotations import geodesic_distance_deg
from cryorecon.ranks import Ranks

# Conjugate-gradient steps of joint maps. Poses come out the same with references from signal over
# weight (0.83 degrees both), at a tenth less time.
_STEPS = 5


def reassign(
    state: Reconstruction,
    images: ImageSet,
    config: RefineConfig,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> float:
    """Search every image's pose anew against the better map; keep it where it is likelier.

    Frees images that the first map put into a wrong maximum.

    Returns
    -------
    float
        Share of the images whose pose changed by more than 20 degrees.
    """
    box = images.plane.box
    band = config.assign_band(box)
    joint = _without_solvent((state.maps[0] + state.maps[1]) / 2, config)
    rotations, offsets = best_grid_poses(
        images.within(band), joint, config, config.search_nside + 1, generator, progress
    )
    fine = min(1.6 * band, max_band(box))
    model = derivatives(joint, 2, fine)
    changed = torch.zeros(len(images), dtype=torch.uint8)
    everyone = torch.arange(len(images))
    own = images.mine(everyone)
    for rows in own.split(250):
        batch = images.select(rows, fine)
        old = refine_poses(batch, model, state.rotations[rows], state.offsets_px[rows], 1)
        new = refine_poses(batch, model, rotations[rows], offsets[rows], 5)
        better = new.log_likelihood > old.log_likelihood + 1.0
        far = geodesic_distance_deg(old.rotations, new.rotations) > 20
        chosen = rows[better & far]
        changed[chosen] = 1
        state.rotations[chosen] = new.rotations[better & far]
        state.offsets_px[chosen] = new.offsets_px[better & far]
    state.rotations, state.offsets_px, changed = images.everyones(
        everyone, state.rotations[own], state.offsets_px[own], changed[own]
    )
    return float(changed.float().mean())


@dataclass(frozen=True)
class RoundReport:
    """What one round of refinement did.

    Attributes
    ----------
    band : float
        Radius that was used, in cycles per box.
    pose_change_deg, offset_change_px : float
        Medians.
    log_likelihood : float
        Mean of the images, against empty ones.
    agreement_band : float
        Shell where the half maps' FSC falls below 0.143.
    """

    band: float
    pose_change_deg: float
    offset_change_px: float
    log_likelihood: float
    agreement_band: float


def refine_round(
    state: Reconstruction,
    images: ImageSet,
    config: RefineConfig,
    agreement: Agreement,
    *,
    joint: bool,
    n_steps: int = 4,
    progress: Progress | None = None,
) -> RoundReport:
    """Refine all poses against the current maps, then solve both half sets' maps anew.

    Parameters
    ----------
    agreement : callable
        FSC of two maps, shape (N // 2 + 1,).
    joint : bool
        Against the map of all images instead of each half set's own.

    Raises
    ------
    FloatingPointError
        If an image's likelihood is not finite.
    """
    before, before_offsets = state.rotations.clone(), state.offsets_px.clone()
    references = [(state.maps[0] + state.maps[1]) / 2] * 2 if joint else state.maps
    references = [_without_solvent(reference, config) for reference in references]
    learned, done = _Learned(images, config), 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            # Others have come as far.
            progress(min(len(images), done * images.ranks.count))

    sums, likelihood = [], []
    for half in (0, 1):
        model = derivatives(references[half], 2, state.band)
        members = torch.nonzero(state.half == half)[:, 0]
        new, found = _refine_some(state, images, members, model, learned, n_steps, tell)
        sums.append(new)
        likelihood.append(found)
    used = state.band
    if n_steps > 0:
        learned.apply(images)
    _solve_halves(state, sums, agreement, images.ranks, joint=joint)
    limit = agreement_band(state.fsc)
    state.band = float(min(max_band(images.plane.box), max(limit + 2, used), 1.6 * used + 1))
    return RoundReport(
        used,
        float(geodesic_distance_deg(before, state.rotations).median()),
        float((before_offsets - state.offsets_px).norm(dim=-1).median()),
        float(torch.cat(likelihood).mean()),
        limit,
    )


def _refine_some(
    state: Reconstruction,
    images: ImageSet,
    members: Tensor,
    model: Derivatives,
    learned: _Learned,
    n_steps: int,
    tell: Callable[[int], None],
) -> tuple[NormalEquations, Tensor]:
    """Refine the poses of some images; their normal equations and log-likelihoods."""
    sums, own = _empty(images), images.mine(members)
    found = [torch.zeros(0)]
    for rows in own.split(250):
        loaded = images.select(rows)
        batch = loaded.within(state.band)
        poses = refine_poses(batch, model, state.rotations[rows], state.offsets_px[rows], n_steps)
        _refuse_broken(images.rows[rows], poses)
        _store(state, rows, poses)
        learned.add(rows, batch, predictions(batch, model, poses))
        _insert(sums, loaded, poses, state.group)
        found.append(poses.log_likelihood)
        tell(len(rows))
    images.ranks.add_up(sums.signal, sums.weight)
    rotations, offsets, likelihood = images.everyones(
        members, state.rotations[own], state.offsets_px[own], torch.cat(found)
    )
    state.rotations[members], state.offsets_px[members] = rotations, offsets
    return sums, likelihood


class _Learned:
    """What a round says of the images themselves: noise by optics group and shell, scales."""

    def __init__(self, images: ImageSet, config: RefineConfig) -> None:
        self.config = config
        self.power = torch.zeros_like(images.noise_power)
        self.count = torch.zeros_like(self.power)
        self.scales = torch.ones_like(images.gain)
        self.everyone = torch.arange(len(images))

    def add(self, rows: Tensor, batch: Observations, predicted: Tensor) -> None:
        power, count = residual_power(batch, predicted)
        self.power[:, : batch.plane.n_shells] += power
        self.count[:, : batch.plane.n_shells] += count
        if self.config.update_scale:
            self.scales[rows] = image_scales(batch, predicted)

    def apply(self, images: ImageSet) -> None:
        """Replace the noise spectra where the round measured them; adjust the scales."""
        images.ranks.add_up(self.power, self.count)
        if self.config.update_noise:
            known = self.count > 0
            images.noise_power[known] = (self.power / self.count.clamp(min=1))[known]
        if self.config.update_scale:
            own = self.scales[images.mine(self.everyone)]
            (self.scales,) = images.everyones(self.everyone, own)
            images.gain.mul_(self.scales / (images.gain * self.scales).abs().mean())


def _without_solvent(volume: Tensor, config: RefineConfig) -> Tensor:
    """A map free of the noise around the molecule, which would pull poses to itself."""
    band = min(config.mask_cycles / config.diameter, max_band(volume.shape[-1]))
    return volume * molecule_mask(volume, band)


def _empty(images: ImageSet) -> NormalEquations:
    band = float(max_band(images.plane.box))
    return NormalEquations.empty(band, 2, images.gain.dtype, images.gain.device)


def _refuse_broken(rows: Tensor, poses: Poses) -> None:
    broken = rows[~poses.log_likelihood.isfinite()]
    if len(broken):
        raise FloatingPointError(
            f"the likelihood of {len(broken)} images of {len(rows)} in a batch is not finite, "
            f"the first of them particle {int(broken[0]) + 1}"
        )


def _store(state: Reconstruction, rows: Tensor, poses: Poses) -> None:
    state.rotations[rows], state.offsets_px[rows] = poses.rotations, poses.offsets_px


def _insert(sums: NormalEquations, batch: Observations, poses: Poses, group: Tensor) -> None:
    matched, weight = batch.matched()
    signal = centred(matched, poses.offsets_px, batch.plane)
    for rotation in group.to(poses.rotations):
        sums.add(signal, weight, poses.rotations @ rotation, batch.plane)


def _solve_halves(
    state: Reconstruction,
    sums: list[NormalEquations],
    agreement: Agreement,
    ranks: Ranks,
    *,
    joint: bool,
) -> None:
    """Wiener maps whose signal power comes from the half sets' agreement.

    A joint round leaves the half sets' own maps and their FSC as the last half-map round left them:
    poses that were refined against the joint map would make the halves agree too well. With
    correlation c between half maps the signal-to-noise ratio of one is c / (1 - c), of both
    together twice that. Processes solve half sets at the same time, one each.
    """
    box = state.maps[0].shape[-1]
    mask = state.support.on(box)
    if not (joint and state.halves):
        state.halves = [to_volume(s.solve(shell_prior(s, 1e-3, max_band(box))), box) for s in sums]
        state.fsc = agreement(*(half * mask for half in state.halves))
        ranks.same(state.fsc)
    correlation = state.fsc[: max_band(box) + 1].clamp(1e-3, 0.999)
    ratio = correlation / (1 - correlation)
    solved = sums if not joint else [sums[0].plus(sums[1])]
    factor = 2.0 if joint else 1.0

    def solution(of: NormalEquations) -> Tensor:
        prior = of.shell_mean_weight()[: len(ratio)] / (factor * ratio)
        return least_squares_map(of, prior, mask, _STEPS if joint else 0)

    maps = ranks.made([partial(solution, of) for of in solved], state.maps[0])
    state.maps = maps * 2 if joint else maps


def agreement_band(fsc: Tensor, threshold: float = 0.143) -> float:
    """Last shell before the half maps' correlation first falls below a threshold."""
    below = torch.nonzero(fsc[1:] < threshold)
    return float(below[0]) if len(below) else float(len(fsc) - 1)
