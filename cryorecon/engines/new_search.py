"""Searching every image's pose anew, once there is a better map than the first one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from cryorecon.engines.observations import ImageSet, Observations
from cryorecon.engines.reconstruction import (
    Progress,
    Reconstruction,
    RefineConfig,
    grid_poses,
    telling_grid,
)
from cryorecon.engines.refine import refine_poses
from cryorecon.engines.rounds import agreement_band, image_batches, without_solvent
from cryorecon.engines.shrinking import ShrinkingBatch
from cryorecon.physics.fourier import max_band
from cryorecon.physics.pose_derivatives import Derivatives, derivatives
from cryorecon.physics.rotations import geodesic_distance_deg

# Poses of the coarse grid that are tried, and how many of them at each higher band; steps of each.
_CANDIDATES, _STEPS = (24, 6, 3), (2, 2, 4)
# A new pose is farther away than rounds of refinement go, and surely likelier.
_FAR_DEG, _LIKELIER = 5.0, 1.0
# Log-likelihood by which a candidate may lie behind the old pose and still go on.
_HOPELESS = 15.0

# Blocks of images whose candidates are held together.
_BLOCKS = 8

# Rotations and offsets; the same after rows, or after whether they are likelier.
_Pairs = tuple[Tensor, Tensor]
_Found = tuple[Tensor, Tensor, Tensor]


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
        grid = telling_grid(own, reference, config, limit)
        tried = grid_poses(own, reference, config, grid, generator, tell, _CANDIDATES[0])
        held = state.rotations[members], state.offsets_px[members]
        n_moved += _move(state, own, members, list(_climbed(own, ladder, held, tried)))
        n_before += len(members)
    return n_moved / len(images)


@dataclass(frozen=True)
class _Rung:
    """Candidates of an image that are refined up to a band: how many at most, and how far."""

    band: float
    most: int
    n_steps: int


@dataclass(frozen=True)
class _Ladder:
    """Candidates are refined band by band; only those that may yet win go on to the next."""

    model: Derivatives
    rungs: list[_Rung]

    @staticmethod
    def of(reference: Tensor, config: RefineConfig, limit: float) -> _Ladder:
        """For a map that can be trusted up to a shell."""
        box = reference.shape[-1]
        low = min(2.0 * config.assign_band(box), max_band(box))
        high = min(max(low, limit), max_band(box))
        bands = [low, (low + high) / 2, high]
        rungs = [_Rung(*each) for each in zip(bands, _CANDIDATES, _STEPS, strict=True)]
        return _Ladder(derivatives(reference, 2, high), rungs)

    @property
    def band(self) -> float:
        """The highest."""
        return self.rungs[-1].band

    def climb(
        self, batch: Observations, held: _Pairs, found: _Pairs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By how much another pose is likelier than an image's own, and that pose.

        Parameters
        ----------
        held : tuple of Tensor
            Every image's own pose.
        found : tuple of Tensor
            Candidates, c an image.

        Returns
        -------
        gain : Tensor, shape (b,)
            Of the log-likelihood; -inf where no candidate is left, and then the pose is any.
        rotations : Tensor, shape (b, 3, 3)
        offsets_px : Tensor, shape (b, 2)
        """
        gain = torch.zeros_like(found[0][..., 0, 0])
        for rung in self.rungs:
            near = batch.within(rung.band)
            # Many candidates come back to the pose that is held.
            going = gain.isfinite() & _away(found[0], held[0])
            going &= gain >= gain.where(going, -torch.inf).topk(rung.most).values[:, -1:]
            found, likelihood = self._refined_where(going, near, rung.n_steps, found)
            alone = (held[0][:, None], held[1][:, None])
            own = self._refined_where(going.any(1, keepdim=True), near, rung.n_steps, alone)[1]
            gain = (likelihood - own).where(going, -torch.inf)
            gain = gain.where(gain > -_HOPELESS, -torch.inf)
        gain, best = gain.where(_away(found[0], held[0]), -torch.inf).max(1)
        rows = torch.arange(len(batch), device=batch.device)
        return gain, found[0][rows, best], found[1][rows, best]

    def _refined_where(
        self, chosen: Tensor, batch: Observations, n_steps: int, poses: _Pairs
    ) -> tuple[_Pairs, Tensor]:
        """Chosen ones (b, c) of several poses an image, refined; others' likelihood is -inf."""
        image, candidate = torch.nonzero(chosen, as_tuple=True)
        rotations, offsets_px = (table.clone() for table in poses)
        likelihood = torch.full_like(rotations[..., 0, 0], -torch.inf)
        for some in torch.arange(len(image), device=image.device).split(len(batch)):
            at = image[some], candidate[some]
            start = rotations[at], offsets_px[at]
            refined = refine_poses(batch.select(at[0]), self.model, *start, n_steps)
            rotations[at], offsets_px[at] = refined.rotations, refined.offsets_px
            likelihood[at] = refined.log_likelihood
        return (rotations, offsets_px), likelihood


def _away(rotations: Tensor, held: Tensor) -> Tensor:
    """Which of several poses an image are other ones than its own."""
    return geodesic_distance_deg(rotations, held[:, None]) > _FAR_DEG


def _climbed(
    own: ImageSet, ladder: _Ladder, held: _Pairs, tried: Iterator[_Found]
) -> Iterator[_Found]:
    """Of this process's images: whether another pose is likelier (uint8), and that pose.

    Candidates of few images are held at a time: they take a kilobyte each.
    """
    batches = image_batches(own.plane.within(ladder.band), own.device)
    while some := list(islice(tried, _BLOCKS)):
        rows, rotations, offsets_px = (torch.cat(parts) for parts in zip(*some, strict=True))
        search = partial(_better, own, ladder, held, rows, (rotations, offsets_px), batches)
        yield from (result for _, result in batches.over(len(rows), search))


def _better(
    own: ImageSet,
    ladder: _Ladder,
    held: _Pairs,
    rows: Tensor,
    tried: _Pairs,
    batches: ShrinkingBatch,
    span: slice,
) -> _Found:
    mine = rows[span]
    own.expect(rows[span.stop : span.stop + batches.size])
    known = held[0][mine].to(own.device), held[1][mine].to(own.device)
    some = tried[0][span], tried[1][span]
    gain, *pose = ladder.climb(own.select(mine, ladder.band), known, some)
    return (gain > _LIKELIER).to(torch.uint8), pose[0], pose[1]


def _move(state: Reconstruction, own: ImageSet, members: Tensor, found: list[_Found]) -> int:
    """Put likelier poses of a half set's images into the table; how many."""
    none = torch.zeros(0, dtype=torch.uint8), torch.zeros(0, 3, 3), torch.zeros(0, 2)
    # To the CPU at the end: each copy would wait for the device.
    mine = [torch.cat(parts).cpu() for parts in zip(*(found or [none]), strict=True)]
    everyone = own.in_file_order(torch.arange(len(own)))
    moved, turned, shifted = own.everyones(everyone, *mine)
    better = moved > 0
    chosen = members[everyone[better]]
    state.rotations[chosen], state.offsets_px[chosen] = turned[better], shifted[better]
    return len(chosen)
