"""Searching every image's pose anew, once there is a better map than the first one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.engines.observations import ImageSet, Observations
from cryorecon.engines.reconstruction import (
    Progress,
    Reconstruction,
    RefineConfig,
    best_grid_poses,
)
from cryorecon.engines.refine import Derivatives, Poses, derivatives, likeliest, refine_poses
from cryorecon.engines.rounds import agreement_band, image_batches, without_solvent
from cryorecon.physics.fourier import max_band
from cryorecon.physics.rotations import geodesic_distance_deg

# Poses of the coarse grid that are refined a little; those of them that are refined at the finest
# band; steps of each.
_CANDIDATES, _FINALISTS = 24, 6
_FIRST_STEPS, _LAST_STEPS = 2, 4
# A new pose is farther away than rounds of refinement go, and surely likelier.
_FAR_DEG, _LIKELIER = 5.0, 1.0


def reassign(
    state: Reconstruction,
    images: ImageSet,
    config: RefineConfig,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> float:
    """Search every image's pose anew against the other half set's map; move it where likelier.

    Frees images that the first map put into a wrong maximum. The other half set's map, since the
    noise of an image is part of its own one and makes its old pose likelier than it is.

    Returns
    -------
    float
        Share of the images that were moved, by more than 5 degrees.
    """
    n_moved, n_before = 0, 0

    def tell(count: int) -> None:
        if progress is not None:
            progress(n_before + count)

    limit = agreement_band(state.fsc) + 2
    for half in (0, 1):
        members = torch.nonzero(state.half == half)[:, 0]
        reference = without_solvent(state.maps[1 - half], config)
        ladder = _Ladder.of(reference, config, limit)
        own = images.apart(members)
        near, nside = own.within(config.assign_band(images.plane.box)), config.search_nside + 1
        found = best_grid_poses(near, reference, config, nside, generator, tell, _CANDIDATES)
        n_moved += _move(state, own, members, ladder, found)
        n_before += len(members)
    return n_moved / len(images)


@dataclass(frozen=True)
class _Ladder:
    """Candidates are refined at a low band; the likeliest of them go on to a higher one."""

    low: Derivatives
    low_band: float
    high: Derivatives
    high_band: float

    @staticmethod
    def of(reference: Tensor, config: RefineConfig, limit: float) -> _Ladder:
        """For a map that can be trusted up to a shell."""
        box = reference.shape[-1]
        low = min(2.0 * config.assign_band(box), max_band(box))
        high = min(max(low, limit), max_band(box))
        return _Ladder(derivatives(reference, 2, low), low, derivatives(reference, 2, high), high)

    def climb(self, batch: Observations, rotations: Tensor, offsets_px: Tensor) -> Poses:
        """The likeliest pose of each image, of those near its candidates (b, c, ...)."""
        near = batch.within(self.low_band)
        tried = [
            refine_poses(near, self.low, rotations[:, k], offsets_px[:, k], _FIRST_STEPS)
            for k in range(rotations.shape[1])
        ]
        likelihood = torch.stack([poses.log_likelihood for poses in tried])
        best = likelihood.topk(_FINALISTS, 0).indices
        rows = torch.arange(len(batch), device=best.device)
        turned = torch.stack([poses.rotations for poses in tried])
        shifted = torch.stack([poses.offsets_px for poses in tried])
        return likeliest(
            [self.settle(batch, turned[k, rows], shifted[k, rows]) for k in best.unbind()]
        )

    def settle(self, batch: Observations, rotations: Tensor, offsets_px: Tensor) -> Poses:
        """Poses refined at the highest band."""
        return refine_poses(batch, self.high, rotations, offsets_px, _LAST_STEPS)


def _move(
    state: Reconstruction,
    own: ImageSet,
    members: Tensor,
    ladder: _Ladder,
    found: tuple[Tensor, Tensor],
) -> int:
    """Put likelier poses of a half set's images into the table; how many."""
    everyone, device = own.in_file_order(torch.arange(len(own))), own.device
    rows = own.mine(everyone)
    held = state.rotations[members], state.offsets_px[members]

    def search(span: slice) -> tuple[Tensor, Tensor, Tensor]:
        mine = rows[span]
        batch = own.select(mine, ladder.high_band)
        old = ladder.settle(batch, *(table[mine].to(device) for table in held))
        new = ladder.climb(batch, *(table[mine].to(device) for table in found))
        likelier = new.log_likelihood > old.log_likelihood + _LIKELIER
        far = geodesic_distance_deg(old.rotations, new.rotations) > _FAR_DEG
        return (likelier & far).to(torch.uint8), new.rotations, new.offsets_px

    none = torch.zeros(0, dtype=torch.uint8), torch.zeros(0, 3, 3), torch.zeros(0, 2)
    batches = image_batches(own.plane.within(ladder.high_band), device)
    searched = [result for _, result in batches.over(len(rows), search)] or [none]
    # To the CPU at the end: each copy would wait for the device.
    mine = [torch.cat(parts).cpu() for parts in zip(*searched, strict=True)]
    moved, turned, shifted = own.everyones(everyone, *mine)
    better = moved > 0
    chosen = members[everyone[better]]
    state.rotations[chosen], state.offsets_px[chosen] = turned[better], shifted[better]
    return len(chosen)
