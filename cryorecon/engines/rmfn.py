"""Engine rmfn: ab initio maps with a residual multiplicative filter network, coarse to fine.

Search: from Haar-random poses, mini-batches see every pose of a grid at low band; their
posterior, spread by a falling temperature, adds to running normal equations that the network's
coarsest scale follows. Refine: Gauss-Newton steps on each image's pose, against its half set's
own map, at a band that follows the half maps' agreement. Finish: the same against the joint map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.grid_map import GridMap
from cryorecon.engines.network_map import FitConfig, NetworkMap
from cryorecon.engines.observations import ImageSet, Observations
from cryorecon.engines.search import (
    accumulate_grid,
    best_grid_pose,
    grid_expectation,
    offset_grid,
)
from cryorecon.networks.mfn import MfnConfig
from cryorecon.physics.fourier import lowpass, max_band, resample_sums
from cryorecon.physics.masks import Support
from cryorecon.physics.projection import extract_slices, padded_transform
from cryorecon.physics.rotations import random_rotations, so3_grid

Agreement = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class RmfnConfig:
    """Settings of the engine; lengths in units of the box unless named otherwise.

    Attributes
    ----------
    diameter : float
        Of the particle, as a fraction of the box side.
    search_cycles : float
        Band of the search in cycles per particle diameter: 3.2 is a 20 A map of a 64 A protein.
    search_nside : int
        Grid of rotations, 60 / nside degrees apart.
    search_images : int
        Images that the search uses; the others join at the assignment.
    search_batch : int
    temperatures : tuple of float
        One epoch each.
    memory : float
        Share of the running normal equations kept at each batch.
    search_prior, prior_floor
        Wiener prior of the search relative to the mean weight of a shell.
    n_starts : int
        Searches from different random poses; the likeliest goes on.
    offset_range : float
        Largest in-plane offset, as a fraction of the box side.
    half_rounds, joint_rounds : int
        Most rounds of refinement against the half maps, and rounds against the joint map.
    mask_cycles : float
        Detail, in cycles per particle diameter, of the mask around the molecule that references
        wear in refinement.
    update_noise : bool
        Whether each round replaces the noise spectra by the power of its residuals.
    update_scale : bool
        Whether each round fits every image's scale as well.
    settled_deg : float
        Half-map refinement ends when the median pose moves less and the band is stable.
    volume : "rmfn" or "grid"
        What the search holds its map in: the network, or the solved grid itself.
    width : int
        Hidden units of the network.
    final_steps : int
        Regression steps of each scale of the network at the end.
    """

    diameter: float = 0.8
    search_cycles: float = 3.2
    search_nside: int = 4
    search_images: int = 1000
    search_batch: int = 100
    temperatures: tuple[float, ...] = (10.0, 7.0, 5.0, 3.5, 2.5, 1.8, 1.3, 1.0)
    memory: float = 0.9
    search_prior: float = 0.05
    n_starts: int = 2
    offset_range: float = 0.1
    half_rounds: int = 14
    joint_rounds: int = 3
    mask_cycles: float = 6.4
    update_noise: bool = True
    update_scale: bool = False
    settled_deg: float = 0.3
    volume: Literal["rmfn", "grid"] = "rmfn"
    width: int = 128
    final_steps: int = 60
    fit: FitConfig = field(default_factory=FitConfig)

    def search_band(self, box: int) -> int:
        """Radius of the search in cycles per box."""
        return max(2, min(round(self.search_cycles / self.diameter), max_band(box) - 2))

    def bands(self, box: int) -> tuple[int, ...]:
        """Bands of the network's scales: search, middle (geometric mean), all."""
        first, last = self.search_band(box), max_band(box)
        middle = round((first * last) ** 0.5)
        return tuple(sorted({first, middle, last}))


def new_map(
    config: RmfnConfig, box: int, generator: torch.Generator, mask: Tensor | None = None
) -> NetworkMap | GridMap:
    """An untrained map of the kind that the settings name.

    Parameters
    ----------
    mask : Tensor, shape (N, N, N), optional
        Multiplies the soft sphere of the particle's diameter.
    """
    bands, support = config.bands(box), Support(config.diameter / 2, mask)
    if config.volume == "grid":
        return GridMap(bands, support)
    return NetworkMap(MfnConfig(bands, config.width), support, generator, config.fit)


@dataclass
class RmfnState:
    """Everything that a run carries from one step to the next.

    Attributes
    ----------
    rotations : Tensor, shape (n, 3, 3)
    offsets_px : Tensor, shape (n, 2)
    half : Tensor, shape (n,), int64
        Half set, 0 or 1.
    maps : list of two Tensor, shape (N, N, N)
        Reference of each half set.
    band : float
        Radius that the next refinement uses, in cycles per box.
    sums : list of two NormalEquations
        Of the half sets, at the poses of the last round against half maps.
    fsc : Tensor, shape (N // 2 + 1,)
        Between the maps of these, masked.
    network : NetworkMap
    group : Tensor, shape (g, 3, 3)
        Rotations that leave the map as it is; the identity alone for C1.
    half_poses : tuple of Tensor, or None
        Rotations and offsets from before the rounds against the joint map: all that half maps
        may be made of.
    chance : Tensor, shape (N // 2 + 1,), or None
        FSC that aligning noise would reach, of half sets that were aligned.
    """

    rotations: Tensor
    offsets_px: Tensor
    half: Tensor
    maps: list[Tensor]
    band: float
    network: NetworkMap | GridMap
    sums: list[NormalEquations] = field(default_factory=list)
    fsc: Tensor = field(default_factory=lambda: torch.ones(1))
    group: Tensor = field(default_factory=lambda: torch.eye(3)[None])
    half_poses: tuple[Tensor, Tensor] | None = None
    chance: Tensor | None = None


def offsets_for(config: RmfnConfig, box: int, band: float) -> Tensor:
    """Offsets fine enough for a band: the phase at its edge changes by about 1.2 rad a step."""
    return offset_grid(config.offset_range * box, box / (5 * band))


def shell_prior(sums: NormalEquations, strength: float, band: float) -> Tensor:
    """Wiener prior in proportion to each shell's mean weight, up to a band."""
    return sums.shell_mean_weight()[: int(band) + 1] * strength


@dataclass
class Search:
    """One start of the global search; :meth:`step` sees one mini-batch.

    Attributes
    ----------
    mask : Tensor, shape (N, N, N), optional
        As in :func:`new_map`.
    log_evidence : float
        Mean over the images of the last epoch: what starts are compared by.
    held_out_evidence, held_out_error : float
        Mean over images that the search did not see, and its standard error. Without a signal
        it is negative: the likelihood ratio then has mean 1, its logarithm less than 0.
    """

    config: RmfnConfig
    observations: Observations
    generator: torch.Generator
    mask: Tensor | None = None
    network: NetworkMap | GridMap = field(init=False)
    sums: NormalEquations | None = None
    log_evidence: float = -torch.inf
    held_out_evidence: float = -torch.inf
    held_out_error: float = 0.0
    _epoch: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        config, box = self.config, self.observations.plane.box
        self.band = config.search_band(box)
        self.observations = self.observations.select(
            torch.arange(len(self.observations)), self.band
        )
        self.network = new_map(config, box, self.generator, self.mask)
        self.grid = so3_grid(config.search_nside, torch.float32)[0]
        self.offsets = offsets_for(config, box, self.band)
        self._start_from_random_poses()

    def _start_from_random_poses(self) -> None:
        matched, weight = self.observations.matched()
        n = len(self.observations)
        rotations = random_rotations(n, self.generator, torch.float32)
        sums = NormalEquations.empty(self.band, 2, weight.dtype, weight.device)
        sums.add(matched, weight, rotations, self.observations.plane)
        self._follow(sums.scaled(self.config.search_batch / n), n_steps=20)

    def _follow(self, sums: NormalEquations, n_steps: int | None = None) -> None:
        prior = shell_prior(sums, self.config.search_prior, self.band)
        self.network.fit(sums, prior, 0, n_steps)

    def batches(self) -> list[Tensor]:
        """Rows of an epoch's mini-batches, in random order."""
        n = len(self.observations)
        batch = max(1, min(self.config.search_batch, n // 4))
        return list(torch.randperm(n, generator=self.generator).split(batch))

    def step(self, rows: Tensor, temperature: float) -> float:
        """Show one mini-batch every pose of the grid, then let the network follow.

        Returns
        -------
        float
            Median effective number of poses an image.
        """
        turn = random_rotations(1, self.generator, torch.float32)[0]
        rotations = self.grid @ turn
        batch = self.observations.select(rows)
        with torch.no_grad():
            transform = padded_transform(self.network.volume(0)).within(self.band)
            templates = extract_slices(transform, rotations, batch.plane)
            posterior, signal, weight = grid_expectation(
                batch, templates, self.offsets, temperature
            )
            new = accumulate_grid(signal, weight, rotations, batch.plane)
        old = self.sums
        self.sums = new if old is None else old.scaled(self.config.memory).plus(new)
        self._follow(self.sums)
        self._epoch.append(posterior.log_evidence)
        return float(posterior.effective_poses.median())

    def end_epoch(self) -> None:
        """Average the evidence of the epoch's images."""
        self.log_evidence = float(torch.cat(self._epoch).mean())
        self._epoch.clear()

    def judge(self, held_out: Observations) -> None:
        """Evidence of images that took no part in the search."""
        with torch.no_grad():
            found = evidence(
                held_out.select(torch.arange(len(held_out)), self.band),
                self.network.volume(0),
                self.grid,
                self.offsets,
            )
        self.held_out_evidence, self.held_out_error = found


def evidence(
    observations: Observations, volume: Tensor, grid: Tensor, offsets_px: Tensor
) -> tuple[float, float]:
    """Mean log-evidence an image of a map over a grid of poses, and its standard error.

    Parameters
    ----------
    observations : Observations of n images
        Up to the band that is compared.
    volume : Tensor, shape (M, M, M)
        Large enough for that band.
    grid : Tensor, shape (r, 3, 3)
    offsets_px : Tensor, shape (s, 2)
    """
    transform = padded_transform(volume).within(float(observations.plane.radius[-1]))
    templates = extract_slices(transform, grid, observations.plane)
    found = grid_expectation(observations, templates, offsets_px)[0].log_evidence
    return float(found.mean()), float(found.std() / max(len(found), 1) ** 0.5)


def best_grid_poses(
    images: ImageSet,
    volume: Tensor,
    config: RmfnConfig,
    nside: int,
    generator: torch.Generator,
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """Likeliest rotation and offset of each image on a randomly turned grid."""
    plane = images.plane
    band = float(plane.radius[-1])
    rotations, offsets = torch.empty(len(images), 3, 3), torch.empty(len(images), 2)
    grid, shifts = so3_grid(nside, torch.float32)[0], offsets_for(config, plane.box, band)
    coarse = resample_sums(volume, min(plane.box, 2 * (int(band) + 5)))
    transform = padded_transform(coarse).within(band)
    for rows in torch.arange(len(images)).split(500):
        turned = grid @ random_rotations(1, generator, torch.float32)[0]
        batch = images.select(rows)
        templates = extract_slices(transform, turned, plane)
        rotation, offset = best_grid_pose(batch, templates, shifts)
        rotations[rows], offsets[rows] = turned[rotation], shifts[offset]
        if progress is not None:
            progress(int(rows[-1]) + 1)
    return rotations, offsets


def assign(
    volume: Tensor,
    network: NetworkMap | GridMap,
    images: ImageSet,
    half: Tensor,
    config: RmfnConfig,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> RmfnState:
    """Give every image its best pose of a grid against a map, a band higher than the search.

    Parameters
    ----------
    volume : Tensor, shape (M, M, M)
        The map, on any grid that holds the band.
    network : NetworkMap or GridMap
        What the run fits to its map at the end.
    half : Tensor, shape (n,), int64
    """
    box = images.plane.box
    band = min(round(config.search_band(box) * 1.25), max_band(box))
    rotations, offsets = best_grid_poses(
        images.within(band), volume, config, config.search_nside + 1, generator, progress
    )
    reference = resample_sums(volume, box)
    return RmfnState(rotations, offsets, half, [reference, reference], float(band), network)


def scaled_to_images(volume: Tensor, images: ImageSet, config: RmfnConfig) -> Tensor:
    """A map of unknown scale, low-passed for assignment, with the power that the images show.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
        On the images' grid.

    Returns
    -------
    Tensor, shape (N, N, N)
        Zero if the images hold no more power than their noise.
    """
    box = images.plane.box
    band = min(round(config.search_band(box) * 1.25), max_band(box))
    smooth = lowpass(volume, float(band), 3)
    batch = images.select(torch.arange(len(images))[:: max(1, len(images) // 500)], band)
    grid = so3_grid(2, torch.float32)[0]
    slices = extract_slices(padded_transform(smooth).within(band), grid, batch.plane)
    power, shell = slices.abs().square().mean(0), batch.plane.shell
    noise = batch.noise_power[:, shell][batch.group]
    precision = batch.precision()
    seen = ((batch.coefficients.abs().square() - noise) * precision).sum()
    expected = (batch.ctf.square() * power * precision).sum()
    return smooth * float((seen / expected.clamp(min=1e-30)).clamp(min=0).sqrt())
