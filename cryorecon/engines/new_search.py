"""Searching every image's pose anew, once there is a better map than the first one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from cryorecon.engines.half_maps import agreement_band
from cryorecon.engines.observations import ImageSet, Observations
from cryorecon.engines.reconstruction import (
    TURNED_TOGETHER,
    Agreement,
    PoseGrid,
    Progress,
    Reconstruction,
    RefineConfig,
    grid_poses,
    telling_grid,
    with_room,
)
from cryorecon.engines.refine import LEAST_GAIN, PoseObjective, refined
from cryorecon.engines.rivals import N_RIVALS, SAME_DEG, weighed
from cryorecon.engines.rounds import (
    image_batches,
    poses_at_once,
    renew_maps,
    without_solvent,
)
from cryorecon.engines.shrinking import ShrinkingBatch
from cryorecon.image_table import ROWS
from cryorecon.physics.fourier import max_band
from cryorecon.physics.pose_derivatives import Derivatives, derivatives
from cryorecon.physics.rotations import grid_step_deg, mean_rotation
from cryorecon.physics.symmetry import distance_under_deg, nearest_copies

# Share of the tried poses that are left at each higher band, at least how many, and steps of each.
_RUNGS = ((1.0, 1, 1), (0.3, 8, 1), (0.12, 6, 2), (0.04, 4, 4))
# Of the particle's rim, in periods of the finest detail, when a pose turns by half a grid's step:
# farther, and a candidate may not come to the pose next to it.
_RIM = 0.5
# Log-likelihood by which a candidate may lie behind the best one, or the old pose, and still go on.
_HOPELESS = 10.0
# Candidates of the last band that rivals are chosen from: several come to the same pose.
_LOOKED_AT = 8

# Candidates that are refined together, at least.
_TOGETHER = 250

# Rotations and offsets; the same after rows, or after log-likelihoods.
_Pairs = tuple[Tensor, Tensor]
_Found = tuple[Tensor, Tensor, Tensor]


def reassign(
    state: Reconstruction,
    images: ImageSet,
    config: RefineConfig,
    agreement: Agreement,
    generator: torch.Generator,
    progress: Progress | None = None,
    asked: Tensor | None = None,
) -> float:
    """Search images' poses anew against the other half set's map; move them where likelier.

    Frees images that the first map put into a wrong maximum. The other half set's map, since the
    noise of an image is part of its own one and makes its old pose likelier than it is. Poses that
    are nearly as likely become an image's rivals. Goes farther off centre than before, if many
    particles lie at the limit.

    The second half set is searched in the first one's map as it is after its own search: where a
    particle is nearly symmetric, half maps may have settled on different copies, and would change
    places for ever. Where only some are asked, too few move for that, and maps stay.

    Of the poses that a symmetric map (`state.group`) cannot tell apart one is tried.

    Parameters
    ----------
    agreement : callable
        FSC of two maps, shape (N // 2 + 1,).
    progress : callable, optional
        Told how many images are done.
    asked : Tensor, shape (n,), bool, optional
        Images to search alone, where no larger offsets are to be looked for; default all.

    Returns
    -------
    float
        Share of all images that were moved, by more than 5 degrees.
    """
    n_moved, n_before = 0, 0

    def tell(count: int) -> None:
        if progress is not None:
            progress(n_before + count)

    searched = state.searched_to(config)
    config = with_room(config, state, images.plane.box)
    state.offset_range = config.offset_range
    if asked is None or state.offset_range > searched:
        asked = torch.ones(len(images), dtype=torch.bool)
    limit = agreement_band(state.fsc) + 2
    unseen = images.apart(torch.nonzero(state.half == 1)[:, 0])
    start = without_solvent(state.maps[0], config)
    grid = telling_grid(unseen, start, config, limit, state.group)
    for half in (0, 1):
        members = torch.nonzero((state.half == half) & asked)[:, 0]
        if len(members) == 0:
            continue
        reference = without_solvent(state.maps[1 - half], config)
        own = images.apart(members)
        ladder = _Ladder.of(reference, config, grid, limit, state.group)
        tried = grid_poses(own, reference, config, grid, generator, tell, grid.candidates)
        held = state.rotations[members], state.offsets_px[members]
        n_moved += _move(state, own, members, list(_climbed(own, ladder, held, tried)))
        n_before += len(members)
        if half == 0 and bool(asked.all()):
            renew_maps(state, images, agreement)
    return n_moved / len(images)


def least_likely(state: Reconstruction, images: ImageSet, share: float) -> Tensor:
    """Which images fit their poses worst, a share of each optics group; shape (n,), bool.

    Where most images tell their poses, those that are wrong are among these.
    """
    order = torch.argsort(state.log_likelihood, stable=True)  # The same in all processes.
    order = order[torch.argsort(images.group[order], stable=True)]
    counts = torch.bincount(images.group)[images.group[order].long()]
    first = torch.searchsorted(images.group[order], images.group[order])
    found = torch.zeros(len(order), dtype=torch.bool)
    found[order] = torch.arange(len(order)) - first < share * counts
    return found


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
    group: Tensor

    @staticmethod
    def of(
        reference: Tensor, config: RefineConfig, grid: PoseGrid, limit: float, group: Tensor
    ) -> _Ladder:  # fmt: skip
        """For candidates of a grid, and a map that can be trusted up to a shell."""
        most = float(max_band(reference.shape[-1]))
        half_step_rad = math.radians(grid_step_deg(grid.nside)) / 2
        low = min(_RIM / (half_step_rad * config.diameter / 2), most)
        high = min(max(low, limit), most)
        rungs = []
        for number, (share, least, n_steps) in enumerate(_RUNGS):
            band = low * (high / low) ** (number / (len(_RUNGS) - 1))
            most = min(grid.candidates, max(least, round(share * grid.candidates)))
            rungs.append(_Rung(band, most, n_steps))
        return _Ladder(derivatives(reference, 2, high), rungs, group.to(reference))

    @property
    def band(self) -> float:
        """The highest."""
        return self.rungs[-1].band

    def climb(
        self, batch: Observations, held: _Pairs, found: _Pairs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By how much other poses are likelier than an image's own, and these poses.

        Parameters
        ----------
        held : tuple of Tensor
            Every image's own pose.
        found : tuple of Tensor
            Candidates, c an image.

        Returns
        -------
        gain : Tensor, shape (b, k)
            Of the log-likelihood, descending; -inf where no candidate is left, and then the pose
            is any.
        rotations : Tensor, shape (b, k, 3, 3)
        offsets_px : Tensor, shape (b, k, 2)
        """
        gain = torch.zeros_like(found[0][..., 0, 0])
        for rung in self.rungs:
            near = PoseObjective(batch.within(rung.band), self.model)
            # Many candidates come back to the pose that is held.
            going = gain.isfinite() & self._away(found[0], held[0])
            going &= gain >= gain.where(going, -torch.inf).topk(rung.most).values[:, -1:]
            found, likelihood = self._refined_where(going, near, rung.n_steps, found)
            alone = (held[0][:, None], held[1][:, None])
            own = self._refined_where(going.any(1, keepdim=True), near, rung.n_steps, alone)[1]
            gain = (likelihood - own).where(going, -torch.inf)
            best = gain.amax(1, keepdim=True).clamp(min=0.0)
            gain = gain.where(gain > best - _HOPELESS, -torch.inf)
        gain = gain.where(self._away(found[0], held[0]), -torch.inf)
        return _best_apart(gain, found, self.group)

    def _away(self, rotations: Tensor, held: Tensor) -> Tensor:
        """Which of several poses an image are other ones than its own."""
        return distance_under_deg(rotations, held[:, None], self.group) > SAME_DEG

    def _refined_where(
        self, chosen: Tensor, images: PoseObjective, n_steps: int, poses: _Pairs
    ) -> tuple[_Pairs, Tensor]:
        """Chosen ones (b, c) of several poses an image, refined; others' likelihood is -inf."""
        image, candidate = torch.nonzero(chosen, as_tuple=True)
        rotations, offsets_px = (table.clone() for table in poses)
        likelihood = torch.full_like(rotations[..., 0, 0], -torch.inf)
        numbers = torch.arange(len(image), device=image.device)
        together = poses_at_once(images.plane, image.device, max(len(chosen), _TOGETHER))
        for some in numbers.split(together):
            at = image[some], candidate[some]
            start = rotations[at], offsets_px[at]
            better = refined(images.select(at[0]), *start, n_steps)
            rotations[at], offsets_px[at] = better.rotations, better.offsets_px
            likelihood[at] = better.log_likelihood
        return (rotations, offsets_px), likelihood


def _best_apart(
    gain: Tensor, poses: _Pairs, group: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The likeliest poses (b, k) of several (b, c) an image that are not the same.

    Several come to the same one from different sides, and stay as far from it as a step gains
    nothing. Each is the mean of those as likely as itself, where the likeliest would be a matter of
    rounding.
    """
    rows = torch.arange(len(gain), device=gain.device)[:, None]
    gain, best = gain.topk(min(_LOOKED_AT, gain.shape[1]))
    rotations, offsets_px = (table[rows, best] for table in poses)
    apart = distance_under_deg(rotations[:, None], rotations[:, :, None], group)
    same = (apart < SAME_DEG) & gain[:, None].isfinite()
    behind = (gain[:, :, None] - gain[:, None]).abs() / LEAST_GAIN
    shares = torch.where(same, 1 - behind, 0.0).clamp(min=0.0)
    shares.diagonal(dim1=1, dim2=2).fill_(1.0)
    for k in range(1, gain.shape[1]):
        taken = same[:, k, :k] & gain[:, :k].isfinite()
        gain[:, k] = gain[:, k].where(~taken.any(1), -torch.inf)
    gain, best = gain.topk(N_RIVALS)
    shares = shares[rows, best] / shares[rows, best].sum(-1, keepdim=True)
    alike = nearest_copies(rotations[:, None], rotations[rows, best][:, :, None], group)
    return gain, mean_rotation(alike, shares), shares @ offsets_px


def _climbed(
    own: ImageSet, ladder: _Ladder, held: _Pairs, tried: Iterator[_Found]
) -> Iterator[_Found]:
    """Of this process's images: by how much other poses are likelier, and these.

    Candidates of few images are held at a time: they take up to ten kilobytes each.
    """
    batches = image_batches(own.within(ladder.band))
    blocks = max(1, batches.size // TURNED_TOGETHER)
    while some := list(islice(tried, blocks)):
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
    return gain, pose[0], pose[1]


def _move(state: Reconstruction, own: ImageSet, members: Tensor, found: list[_Found]) -> int:
    """Put likelier poses of a half set's images into the table, and their rivals; how many."""
    none = torch.zeros(0, N_RIVALS), torch.zeros(0, N_RIVALS, 3, 3), torch.zeros(0, N_RIVALS, 2)
    # To the CPU at the end: each copy would wait for the device.
    mine = [torch.cat(parts).cpu() for parts in zip(*(found or [none]), strict=True)]
    found.clear()
    everyone = own.in_file_order(torch.arange(len(own)))
    gain, *others = own.everyones(everyone, *mine)
    rows, n_moved = members[everyone], 0
    for some in torch.arange(len(rows)).split(ROWS):
        at = rows[some]
        held = state.rotations[at], state.offsets_px[at]
        moved, held, rivals = weighed(gain[some], held, (others[0][some], others[1][some]))
        state.rotations[at], state.offsets_px[at] = held
        state.rivals.put(at, rivals)
        n_moved += int(moved.sum())
    return n_moved
