"""What every ab initio engine works towards: a pose table with two half maps, and its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.observations import ImageSet, Observations
from cryorecon.engines.rivals import Rivals
from cryorecon.engines.search import (
    best_grid_pose,
    evidence,
    offset_grid,
    offsets_to_try,
    posterior_of,
)
from cryorecon.image_table import image_table
from cryorecon.physics.fourier import max_band
from cryorecon.physics.masks import Support
from cryorecon.physics.projection import extract_slices, padded_transform
from cryorecon.physics.resampling import resample_sums
from cryorecon.physics.rotations import random_rotations, so3_grid_on
from cryorecon.physics.symmetry import distinct_rotations

Agreement = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int], None]

# Images that see the same random turn of a grid of poses, on any device.
TURNED_TOGETHER = 500
# A search that leaves an image more poses than this has not told them apart.
TOLD_APART = 24
# A grid that leaves more makes way for a finer one; as many images are asked. Bands of finer ones,
# relative to the coarse one's.
_FEW, _ASKED, _FINER = 12, 100, (1.6, 2.0)
# Rotations that tell which offsets are worth comparing with all: 20 degrees apart.
_ROUGH_NSIDE = 3
# How many times as many offsets there must be as rough ones, for these to be worth their time.
_WORTHWHILE = 3
# Share of the particles that may lie as far off centre as is searched; beyond the offset that so
# many exceed, new searches go by this factor.
MANY_AT_LIMIT, _BEYOND = 0.02, 1.25
# Poses that are tried of each that a grid leaves likely, at least, and at most.
_TRIED, _LEAST_TRIED, _MOST_TRIED = 16, 24, 200


@dataclass(frozen=True)
class RefineConfig:
    """Settings that all engines share; lengths in units of the box unless named otherwise.

    Attributes
    ----------
    diameter : float
        Of the particle, as a fraction of the box side.
    search_cycles : float
        Band of global searches in cycles per particle diameter: 3.2 is a 20 A map of a 64 A
        protein.
    search_nside : int
        Grid of rotations, 60 / nside degrees apart.
    offset_range : float
        Largest in-plane offset, as a fraction of the box side.
    farthest_offset : float
        To which new searches go, the same, if many particles lie at that limit.
    half_rounds, joint_rounds : int
        Most rounds of refinement against the half maps, and against the joint map.
    mask_cycles : float
        Detail, in cycles per particle diameter, of the mask around the molecule: references wear
        it in refinement, and it is written with the map.
    update_noise : bool
        Whether each round replaces the noise spectra by the power of its residuals.
    update_scale : bool
        Whether each round fits every image's scale as well.
    settled_deg, joint_settled_deg : float
        Refinement against half maps, once their band is stable, and against the joint map ends
        when the median pose moves less.
    """

    diameter: float = 0.8
    search_cycles: float = 3.2
    search_nside: int = 4
    offset_range: float = 0.1
    farthest_offset: float = 0.25
    half_rounds: int = 40
    joint_rounds: int = 3
    mask_cycles: float = 6.4
    update_noise: bool = True
    update_scale: bool = False
    settled_deg: float = 0.3
    joint_settled_deg: float = 0.05

    def search_band(self, box: int) -> int:
        """Radius of searches in cycles per box."""
        return max(2, min(round(self.search_cycles / self.diameter), max_band(box) - 2))

    def assign_band(self, box: int) -> int:
        """Radius, a quarter beyond the search's, at which all images are compared with a map."""
        return min(round(self.search_band(box) * 1.25), max_band(box))

    def mask_band(self, box: int) -> float:
        """Radius, in cycles per box, to which a map is low-passed to find its molecule."""
        return min(self.mask_cycles / self.diameter, max_band(box))


@dataclass
class Reconstruction:
    """Everything that a run of any engine carries from one step to the next.

    Attributes
    ----------
    rotations : Tensor, shape (n, 3, 3)
        On the CPU, as are all tables of images (:mod:`cryorecon.image_table`); maps lie on the
        images' device.
    offsets_px : Tensor, shape (n, 2)
    half : Tensor, shape (n,), int64
        Half set, 0 or 1.
    maps : list of two Tensor, shape (N, N, N)
        Reference of each half set.
    band : float
        Radius that the next refinement uses, in cycles per box.
    halves : list of two Tensor, shape (N, N, N)
        Unfiltered, unmasked maps of the half sets, at the poses of the last round against half
        maps.
    fsc : Tensor, shape (N // 2 + 1,)
        Between these, masked.
    support : Support
        Where maps may have density.
    group : Tensor, shape (g, 3, 3)
        Rotations that leave the map as it is; the identity alone for C1.
    half_poses : tuple of Tensor, or None
        Rotations and offsets from before the rounds against the joint map: all that half maps
        may be made of.
    chance : Tensor, shape (N // 2 + 1,), or None
        FSC that aligning noise would reach, of half sets that were aligned.
    log_likelihood : Tensor, shape (n,)
        Of each image at its pose in the last round, against an empty image; zero before the first.
    offset_range : float
        Largest offset that new searches have looked for, as a fraction of the box side; 0 before
        the first.
    rivals : Rivals
        Other poses that images may have; none until all have been searched anew.
    """

    rotations: Tensor
    offsets_px: Tensor
    half: Tensor
    maps: list[Tensor]
    band: float
    support: Support
    halves: list[Tensor] = field(default_factory=list)
    fsc: Tensor = field(default_factory=lambda: torch.ones(1))
    group: Tensor = field(default_factory=lambda: torch.eye(3)[None])
    half_poses: tuple[Tensor, Tensor] | None = None
    chance: Tensor | None = None
    log_likelihood: Tensor = field(default_factory=lambda: torch.empty(0))
    offset_range: float = 0.0
    rivals: Rivals = field(init=False)

    def __post_init__(self) -> None:
        self.rivals = Rivals.none(len(self.rotations))
        if len(self.log_likelihood) == 0:
            self.log_likelihood = image_table(len(self.rotations))

    def searched_to(self, config: RefineConfig) -> float:
        """Largest offset that has been looked for by any search, as a fraction of the box side."""
        return max(config.offset_range, self.offset_range)


def with_room(config: RefineConfig, state: Reconstruction, box: int) -> RefineConfig:
    """Settings of a new search, which looks farther out where many particles lie at the limit."""
    reach = state.searched_to(config)
    lengths = state.offsets_px.norm(dim=-1) / box
    edge = float(lengths.topk(int(MANY_AT_LIMIT * len(lengths)) + 1).values[-1])
    if edge > reach - 0.5 / box:
        reach = max(reach, min(_BEYOND * edge, config.farthest_offset))
    return replace(config, offset_range=reach)


def offsets_for(config: RefineConfig, box: int, band: float) -> Tensor:
    """Offsets fine enough for a band: the phase at its edge changes by about 1.2 rad a step."""
    return offset_grid(config.offset_range * box, box / (5 * band))


def outline_offsets(
    images: Observations,
    volume: Tensor,
    config: RefineConfig,
    turn: Tensor,
    shifts: Tensor,
    group: Tensor | None = None,
) -> Tensor:
    """Offsets that images may have by half of their detail; shape (n, s), bool.

    Parameters
    ----------
    images : Observations of n images
        Up to the band that poses will be compared at.
    volume : Tensor, shape (M, M, M)
        Large enough for it.
    turn : Tensor, shape (3, 3)
        Of the grid of rotations that tells.
    shifts : Tensor, shape (s, 2)
        Offsets that may be tried at that band; few are all tried.
    group : Tensor, shape (g, 3, 3), optional
        Rotations that leave the map as it is.
    """
    box, band = images.plane.box, math.ceil(float(images.plane.radius[-1]) / 2)
    rough = offsets_for(config, box, band).to(shifts)
    if _WORTHWHILE * len(rough) > len(shifts):
        return torch.ones(len(images), len(shifts), dtype=torch.bool, device=shifts.device)
    grid = PoseGrid(band, _ROUGH_NSIDE, group=group).rotations(turn)
    posterior = posterior_of(images.within(band), volume, grid, rough)
    return offsets_to_try(posterior.offset_shares, rough, shifts)


def shell_prior(sums: NormalEquations, strength: float, band: float) -> Tensor:
    """Wiener prior in proportion to each shell's mean weight, up to a band."""
    return sums.shell_mean_weight()[: int(band) + 1] * strength


@dataclass(frozen=True)
class PoseGrid:
    """A grid of poses: rotations 60 / nside degrees apart, compared up to a band.

    Attributes
    ----------
    candidates : int
        How many of an image's poses deserve a closer look.
    group : Tensor, shape (g, 3, 3), optional
        Rotations that leave the map as it is: one of g equal poses is tried.
    """

    band: int
    nside: int
    candidates: int = _MOST_TRIED
    group: Tensor | None = field(default=None, compare=False)

    def rotations(self, turn: Tensor) -> Tensor:
        """Those that are tried once the grid has been turned, shape (r, 3, 3)."""
        turned = so3_grid_on(self.nside, turn.device).to(turn) @ turn
        return turned if self.group is None else distinct_rotations(turned, self.group)

    def among(self, poses: float) -> int:
        """How many of an image's poses deserve a closer look where so many are likely."""
        order = 1 if self.group is None else len(self.group)
        # As many in any turn of a symmetric map's grid.
        most = min(_MOST_TRIED, 72 * self.nside**3 // (2 * order))
        return round(min(max(_TRIED * poses, _LEAST_TRIED), most))


def telling_grid(
    images: ImageSet,
    volume: Tensor,
    config: RefineConfig,
    limit: float,
    group: Tensor | None = None,
) -> PoseGrid:
    """The coarsest grid that leaves few poses likely, of those whose detail the map holds.

    Parameters
    ----------
    volume : Tensor, shape (M, M, M)
    limit : float
        How far the map can be trusted, in cycles per box.
    group : Tensor, shape (g, 3, 3), optional
        Rotations that leave the map as it is.

    Returns
    -------
    PoseGrid
        The same in all processes.
    """
    box = images.plane.box
    coarse, order = config.assign_band(box), 1 if group is None else len(group)
    # One of all equal poses is tried: so more of them can be, and must, where details are alike.
    finer = min(order ** (1 / 6), max(1.0, limit / coarse))
    coarse, nside = round(finer * coarse), round(finer * config.search_nside)
    bands = [coarse, *(min(round(further * coarse), max_band(box)) for further in _FINER)]
    bands = [band for band in bands if band == coarse or band <= limit]
    finest = PoseGrid(bands[-1], nside + 1, group=group)
    chosen = replace(finest, candidates=finest.among(torch.inf))
    for band in bands[: len(_FINER)]:
        poses = _likely_poses(images, volume, config, replace(chosen, band=band))
        if math.isnan(poses):
            return chosen
        if poses <= _FEW or band == bands[-1]:
            return replace(chosen, band=band, candidates=chosen.among(poses))
    return chosen


def _likely_poses(images: ImageSet, volume: Tensor, config: RefineConfig, tried: PoseGrid) -> float:
    """How many poses of a grid an image leaves likely, the median; NaN if any image's are."""
    rows = torch.arange(len(images))[:: max(1, len(images) // _ASKED)]
    small = resample_sums(volume, min(images.plane.box, 2 * (tried.band + 5)))
    grid = tried.rotations(torch.eye(3))
    shifts = offsets_for(config, images.plane.box, tried.band)
    found = evidence(images.select(rows, tried.band), small, grid, shifts)
    return images.ranks.numbers(*found)[2]


def grid_poses(
    images: ImageSet,
    volume: Tensor,
    config: RefineConfig,
    chosen: PoseGrid,
    generator: torch.Generator,
    progress: Progress | None,
    count: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The likeliest poses of each image on a randomly turned grid, some images at a time.

    Yields
    ------
    rows : Tensor, shape (b,)
        Of this process's images, in file order.
    rotations : Tensor, shape (b, count, 3, 3)
        The likeliest first.
    offsets_px : Tensor, shape (b, count, 2)
    """
    images, device, band = images.within(chosen.band), images.device, float(chosen.band)
    plane = images.plane
    shifts = offsets_for(config, plane.box, band).to(device)
    coarse = resample_sums(volume, min(plane.box, 2 * (chosen.band + 5)))
    transform = padded_transform(coarse, band=band)
    everyone = images.in_file_order(torch.arange(len(images)))
    blocks = [*everyone.split(TURNED_TOGETHER), everyone[:0]]
    for number, (block, following) in enumerate(pairwise(blocks), 1):
        # Drawn for every block, whoever works on it.
        turn = random_rotations(1, generator, torch.float32)[0].to(device)
        rows = images.mine(block)
        if len(rows) > 0:
            turned = chosen.rotations(turn)
            templates = extract_slices(transform, turned, plane)
            images.expect(images.mine(following))
            batch = images.select(rows)
            likely = outline_offsets(batch, coarse, config, turned[0], shifts, chosen.group)
            rotation, offset = best_grid_pose(batch, templates, shifts, None, count, likely)
            yield rows, turned[rotation], shifts[offset]
        if progress is not None:
            progress(min(len(images), number * TURNED_TOGETHER))


def best_grid_poses(
    images: ImageSet,
    volume: Tensor,
    config: RefineConfig,
    chosen: PoseGrid,
    generator: torch.Generator,
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """The likeliest pose of each image on a randomly turned grid, on the CPU.

    Returns
    -------
    rotations : Tensor, shape (n, 3, 3)
    offsets_px : Tensor, shape (n, 2)
    """
    found = [
        (rotations[:, 0], offsets_px[:, 0])
        for _, rotations, offsets_px in grid_poses(
            images, volume, config, chosen, generator, progress
        )
    ]
    # To the CPU at the end: each copy would wait for the device.
    parts = found or [(torch.zeros(0, 3, 3), torch.zeros(0, 2))]
    mine = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    everyone = images.in_file_order(torch.arange(len(images)))
    rotations, offsets = image_table(len(images), 3, 3), image_table(len(images), 2)
    for table, part in zip((rotations, offsets), images.everyones(everyone, *mine), strict=True):
        table[everyone] = part
    return rotations, offsets


def assign(
    volume: Tensor,
    support: Support,
    images: ImageSet,
    half: Tensor,
    config: RefineConfig,
    chosen: PoseGrid,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Reconstruction:
    """Give every image its best pose of a grid against a map, a band higher than the search.

    Parameters
    ----------
    volume : Tensor, shape (M, M, M)
        The map, on any grid that holds the band.
    support : Support
        Where maps may have density.
    half : Tensor, shape (n,), int64
    """
    found = best_grid_poses(images, volume, config, chosen, generator, progress)
    reference = resample_sums(volume, images.plane.box)
    return Reconstruction(*found, half, [reference, reference], float(chosen.band), support)
