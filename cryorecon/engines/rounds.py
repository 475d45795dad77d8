"""Rounds of refinement, shared by the engines: poses and maps, half set against half set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.half_maps import (
    agreement_band,
    empty_sums,
    insert,
    solve_halves,
)
from cryorecon.engines.observations import ImageSet, Observations, taken_to
from cryorecon.engines.reconstruction import (
    Agreement,
    Progress,
    Reconstruction,
    RefineConfig,
)
from cryorecon.engines.refine import (
    Poses,
    image_scales,
    predictions,
    refine_poses,
    residual_power,
)
from cryorecon.engines.rivals import Doubt
from cryorecon.engines.shrinking import ShrinkingBatch, at_once
from cryorecon.image_table import ROWS, kept
from cryorecon.physics.fourier import HalfPlane, max_band
from cryorecon.physics.imaging import pooled_spectra
from cryorecon.physics.masks import molecule_mask
from cryorecon.physics.pose_derivatives import Derivatives, derivatives
from cryorecon.physics.rotations import geodesic_distance_deg

# Images at once on the CPU; memory of a coefficient in a pose step, bytes; and most points of the
# map's transform, eight a coefficient, that are read at once.
_IMAGES, _BYTES, _MOST_POINTS = 250, 500.0, 2**30
# Bytes of images on disk that half a round's batch takes: twice as many are just read ahead.
_MOST_READ = 128e6
# A half set may have so many times its share of a batch and still be worked on at once, in place of
# a small rest by itself.
_UNEVEN = 1.1


def poses_at_once(
    plane: HalfPlane, device: torch.device, on_cpu: int = _IMAGES, most: int = 32768
) -> int:
    """How many poses to work on together: as many as a GPU holds, of so many coefficients."""
    most = min(most, max(1, _MOST_POINTS // (8 * len(plane))))
    return at_once(on_cpu, _BYTES * len(plane), device, most)


def image_batches(images: ImageSet) -> ShrinkingBatch:
    """Images at once in pose steps, as many as the device holds and are read ahead."""
    most = min(4096, max(1, int(_MOST_READ / (4 * images.pixels_read))))
    return ShrinkingBatch(poses_at_once(images.plane, images.device, most=most))


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
    n_steps: int = 6,
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
    before, before_offsets = kept(state.rotations), kept(state.offsets_px)
    references = [(state.maps[0] + state.maps[1]) / 2] if joint else state.maps
    references = [without_solvent(reference, config) for reference in references]
    learned, done = _Learned(images, config), 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            # Others have come as far.
            progress(min(len(images), done * images.ranks.count))

    models = [derivatives(reference, 2, state.band) for reference in references]
    sums, likelihood = _refine_all(state, images, models, learned, n_steps, tell)
    used = state.band
    if n_steps > 0:
        learned.apply(images)
    solve_halves(state, sums, agreement, images, joint=joint)
    limit = agreement_band(state.fsc)
    state.band = float(min(max_band(images.plane.box), max(limit + 2, used), 1.6 * used + 1))
    return RoundReport(
        used,
        _median_turn_deg(before, state.rotations),
        float((before_offsets - state.offsets_px).norm(dim=-1).median()),
        float(likelihood.mean()),
        limit,
    )


def renew_maps(state: Reconstruction, images: ImageSet, agreement: Agreement) -> None:
    """Solve both half sets' maps anew, with poses as they are.

    Parameters
    ----------
    agreement : callable
        FSC of two maps, shape (N // 2 + 1,).
    """
    rows = images.mine(images.in_file_order(torch.arange(len(images))))
    sums, group = [empty_sums(images) for _ in range(2)], state.group.to(images.device)
    batches = image_batches(images)

    def loaded(span: slice) -> tuple[Tensor, Observations]:
        images.expect(rows[span.stop : span.stop + batches.size])
        return rows[span], images.select(rows[span])

    # What is added lies outside: a batch may be repeated.
    for _, (read, both) in batches.over(len(rows), loaded):
        for half in state.half[read].unique().tolist():
            few = torch.nonzero(state.half[read] == half)[:, 0]
            held = state.rotations[read[few]], state.offsets_px[read[few]]
            turns, offsets_px = (taken_to(table, images.device) for table in held)
            doubt = state.rivals.of(read[few], images.device)
            insert(sums[half], both.select(few), (turns, offsets_px), doubt, group)
    for new in sums:
        images.ranks.add_up(new.signal, new.weight)
    solve_halves(state, sums, agreement, images, joint=False)


def _median_turn_deg(before: Tensor, after: Tensor) -> float:
    pairs = zip(before.split(ROWS), after.split(ROWS), strict=True)
    return float(torch.cat([geodesic_distance_deg(*pair) for pair in pairs]).median())


_Seen = tuple[Tensor, Tensor, Tensor | None]
_Refined = tuple[int, Tensor, Observations, Poses, Doubt, _Seen]


def _refine_all(
    state: Reconstruction,
    images: ImageSet,
    models: list[Derivatives],
    learned: _Learned,
    n_steps: int,
    tell: Callable[[int], None],
) -> tuple[list[NormalEquations], Tensor]:
    """Refine all poses in one pass over the images; half sets' equations, log-likelihoods.

    Disks give neighbours fastest, and half sets' images lie between each other.
    """
    order = images.in_file_order(torch.arange(len(images)))
    sums, group = [empty_sums(images) for _ in range(2)], state.group.to(images.device)
    found: list[list[Poses]] = [[], []]
    for parts in _refined(state, images, images.mine(order), models, n_steps, learned):
        for half, rows, loaded, poses, doubt, seen in parts:
            learned.add(rows, seen)
            insert(sums[half], loaded, (poses.rotations, poses.offsets_px), doubt, group)
            found[half].append(poses)
        tell(sum(len(rows) for _, rows, *_ in parts))
    for new in sums:
        images.ranks.add_up(new.signal, new.weight)
    members = [order[state.half[order] == half] for half in range(2)]
    pairs = zip(members, found, strict=True)
    return sums, torch.cat([_store(state, images, rows, poses) for rows, poses in pairs])


def _refined(
    state: Reconstruction,
    images: ImageSet,
    rows: Tensor,
    models: list[Derivatives],
    n_steps: int,
    learned: _Learned,
) -> Iterator[list[_Refined]]:
    """Poses of both half sets' images against their maps, by batches; nothing is stored yet."""
    batches = image_batches(images)

    def refine(span: slice) -> list[_Refined]:
        images.expect(rows[span.stop : span.stop + batches.size])
        both = images.select(rows[span])
        of_half, most = state.half[rows[span]], max(1, int(_UNEVEN * batches.size / 2))
        return [
            of(half, rows[span], both, few)
            for half in of_half.unique().tolist()
            for few in torch.nonzero(of_half == half)[:, 0].split(most)
        ]

    def of(half: int, read: Tensor, both: Observations, few: Tensor) -> _Refined:
        mine, loaded = read[few], both.select(few)
        batch = loaded.within(state.band)
        held = (table[mine] for table in (state.rotations, state.offsets_px, images.gain))
        turns, offsets, scales = (taken_to(values, images.device) for values in held)
        model = models[min(half, len(models) - 1)]  # One for both in a joint round.
        poses = refine_poses(batch, model, turns, offsets, n_steps=n_steps)
        doubt = state.rivals.of(mine, images.device)
        seen = learned.seen(batch, predictions(batch, model, poses), scales)
        return half, mine, loaded, poses, doubt, seen

    # Half of what is read is worked on at a time.
    batches.size *= 2
    return (parts for _, parts in batches.over(len(rows), refine))


class _Learned:
    """What a round says of the images themselves: noise by optics group and shell, scales."""

    def __init__(self, images: ImageSet, config: RefineConfig) -> None:
        self.config = config
        self.power = torch.zeros_like(images.noise_power)
        self.count = torch.zeros_like(self.power)
        self.scales = torch.ones_like(images.gain)
        self.everyone = torch.arange(len(images))

    def seen(self, batch: Observations, predicted: Tensor, held: Tensor) -> _Seen:
        """What one batch says, to be added; of images with the scales `held`."""
        scales = image_scales(batch, predicted, held) if self.config.update_scale else None
        return *residual_power(batch, predicted), scales

    def add(self, rows: Tensor, seen: _Seen) -> None:
        power, count, scales = seen
        self.power[:, : power.shape[1]] += power
        self.count[:, : count.shape[1]] += count
        if scales is not None:
            self.scales[rows] = scales.cpu()

    def apply(self, images: ImageSet) -> None:
        """Replace the noise spectra where the round measured them; adjust the scales."""
        images.ranks.add_up(self.power, self.count)
        if self.config.update_noise:
            known = self.count.sum(0) > 0
            measured = pooled_spectra(self.power, self.count)
            images.noise_power.copy_(torch.where(known, measured, images.noise_power))
        if self.config.update_scale:
            own = self.scales[images.mine(self.everyone)]
            (self.scales,) = images.everyones(self.everyone, own)
            images.gain.mul_(self.scales / (images.gain * self.scales).abs().mean())


def without_solvent(volume: Tensor, config: RefineConfig) -> Tensor:
    """A map free of the noise around the molecule, which would pull poses to itself."""
    return volume * molecule_mask(volume, config.mask_band(volume.shape[-1]))


def _refuse_broken(rows: Tensor, log_likelihood: Tensor) -> None:
    broken = rows[~log_likelihood.isfinite()]
    if len(broken):
        raise FloatingPointError(
            f"the likelihood of {len(broken)} images of {len(rows)} is not finite, the first of "
            f"them particle {int(broken[0]) + 1}"
        )


def _store(state: Reconstruction, images: ImageSet, rows: Tensor, found: list[Poses]) -> Tensor:
    """Put all processes' poses of some images into the table; their log-likelihoods."""
    none = Poses(torch.zeros(0, 3, 3), torch.zeros(0, 2), torch.zeros(0))
    parts = ((p.rotations, p.offsets_px, p.log_likelihood) for p in found or [none])
    # To the CPU at the end: each copy would wait for the device.
    mine = [torch.cat(p).cpu() for p in zip(*parts, strict=True)]
    rotations, offsets_px, likelihood = images.everyones(rows, *mine)
    _refuse_broken(images.rows[rows], likelihood)
    state.rotations[rows], state.offsets_px[rows] = rotations, offsets_px
    state.log_likelihood[rows] = likelihood
    return likelihood
