"""Engine rmfn: ab initio maps with a residual multiplicative filter network, coarse to fine.

Search: from Haar-random poses, mini-batches see every pose of a grid at low band; their
posterior, spread by a falling temperature, adds to running normal equations that the network's
coarsest scale follows. The likelier of two goes on at a higher band. Refine: Gauss-Newton steps on
each image's pose, against its half set's own map, at a band that follows the half maps'
agreement. Finish: the same against the joint map.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.grid_map import GridMap
from cryorecon.engines.network_map import FitConfig, NetworkMap
from cryorecon.engines.numbers import refuse_senseless
from cryorecon.engines.observations import ImageSet, Observations, taken_to
from cryorecon.engines.reconstruction import RefineConfig, offsets_for, shell_prior
from cryorecon.engines.search import (
    Evidence,
    accumulate_grid,
    evidence,
    grid_expectation,
    offsets_to_try,
)
from cryorecon.networks.mfn import MfnConfig
from cryorecon.physics.fourier import lowpass, max_band
from cryorecon.physics.masks import Support
from cryorecon.physics.projection import extract_slices, padded_transform
from cryorecon.physics.rotations import random_rotations, so3_grid_on
from cryorecon.ranks import ALONE, Ranks


@dataclass(frozen=True)
class RmfnConfig(RefineConfig):
    """Settings of the engine, besides those that all engines share.

    Attributes
    ----------
    search_images : int
        Images that the search uses; the others join at the assignment.
    search_batch : int
        Images of a mini-batch; fewer where an epoch would have less than ten.
    temperatures : tuple of float
        One epoch each. What softens the poses at first is above all the map's own error, see
        :class:`Search`.
    memory : float
        Share of the running normal equations kept at each batch.
    excess_memory : float
        The same of the residuals' power.
    search_prior, prior_floor
        Wiener prior of the search relative to the mean weight of a shell.
    n_starts : int
        Searches from different random poses; the likeliest goes on.
    fine_cycles : float
        Band, in cycles per particle diameter, at which it does, see :mod:`engines.fine_search`.
    fine_epochs : int
        Most epochs there, the first of which gathers images; none: refinement follows at once.
    fine_images : int
        Images that are used there: more of them do more than more epochs.
    fine_memory : int
        How many of these the equations remember: between two hands a map moves the faster the
        sooner it forgets.
    fine_prior : float
        Wiener prior there, in units of the inverse of the signal's power by shell that the images
        show.
    hard_poses : int
        Images that leave more poses than this likely, of those of the search's grid, are a hard
        set: the search goes on again at `hard_cycles`, for at most `hard_epochs` and with as many
        as `hard_images`.
    hard_cycles, hard_epochs, hard_images
        As `fine_cycles`, `fine_epochs` and `fine_images`.
    volume : "rmfn" or "grid"
        What the search holds its map in: the network, or the solved grid itself.
    width : int
        Hidden units of the network.
    final_steps : int
        Regression steps of each scale of the network at the end.
    """

    search_images: int = 1000
    search_batch: int = 100
    temperatures: tuple[float, ...] = (1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    memory: float = 0.9
    excess_memory: float = 0.8
    search_prior: float = 0.05
    n_starts: int = 2
    fine_cycles: float = 4.8
    fine_epochs: int = 14
    fine_images: int = 2000
    fine_memory: int = 500
    fine_prior: float = 0.5
    hard_poses: int = 100
    hard_cycles: float = 6.4
    hard_epochs: int = 14
    hard_images: int = 4000
    volume: Literal["rmfn", "grid"] = "rmfn"
    width: int = 128
    final_steps: int = 60
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        positive = "search_nside search_images search_batch n_starts fine_images hard_images width"
        refuse_senseless(self, positive, "memory excess_memory")

    def fine_band(self, box: int) -> int:
        """Radius at which the search goes on, in cycles per box."""
        wanted = round(self.fine_cycles / self.diameter)
        return max(self.search_band(box), min(wanted, max_band(box) - 2))

    def hard_band(self, box: int) -> int:
        """Radius at which that of a hard set goes on again, in cycles per box."""
        wanted = round(self.hard_cycles / self.diameter)
        return max(self.fine_band(box), min(wanted, max_band(box) - 2))

    def bands(self, box: int) -> tuple[int, ...]:
        """Bands of the network's scales: search, middle (geometric mean), all."""
        first, last = self.search_band(box), max_band(box)
        middle = round((first * last) ** 0.5)
        return tuple(sorted({first, middle, last}))


def new_map(
    config: RmfnConfig,
    box: int,
    generator: torch.Generator,
    mask: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> NetworkMap | GridMap:
    """An untrained map of the kind that the settings name.

    Parameters
    ----------
    mask : Tensor, shape (N, N, N), optional
        Multiplies the soft sphere of the particle's diameter.
    device : torch.device or str
        Where a network lives; grids follow what they are fitted to.
    """
    bands, support = config.bands(box), Support(config.diameter / 2, mask)
    if config.volume == "grid":
        return GridMap(bands, support)
    return NetworkMap(MfnConfig(bands, config.width), support, generator, config.fit, device)


@dataclass
class Search:
    """One start of the global search; :meth:`step` sees one mini-batch.

    The noise that images are judged by is, shell by shell, the power of what the map leaves
    unexplained: all of the images' power at first. A temperature alone would soften all shells
    alike; where the lowest are far above the noise, as with a ribosome, they would settle every
    pose by the outline before the others are heard, and both hands end up in one map.

    From one epoch to the next an image's offset hardly changes: those that were unlikely, and have
    no likely one beside them, are not tried again.

    Attributes
    ----------
    excess : Tensor, shape (n_shells,)
        That power over the noise's, at least 1.
    mask : Tensor, shape (N, N, N), optional
        As in :func:`new_map`.
    ranks : Ranks
        Processes that share each mini-batch; all hold all observations.
    likely : Tensor, shape (n, s), bool
        Which offsets of each image are tried.
    log_evidence : float
        Mean over the images of the last epoch, and once the search is judged over all its images
        at their true noise: what starts are compared by.
    held_out_evidence, held_out_error : float
        Mean over images that the search did not see, and its standard error. Without a signal
        it is negative: the likelihood ratio then has mean 1, its logarithm less than 0.
    """

    config: RmfnConfig
    observations: Observations
    generator: torch.Generator
    mask: Tensor | None = None
    ranks: Ranks = ALONE
    network: NetworkMap | GridMap = field(init=False)
    excess: Tensor = field(init=False)
    sums: NormalEquations | None = None
    likely: Tensor = field(init=False)
    log_evidence: float = -torch.inf
    held_out_evidence: float = -torch.inf
    held_out_error: float = 0.0
    _epoch: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        config, box = self.config, self.observations.plane.box
        device = self.observations.device
        self._look(config.search_band(box))
        self.network = new_map(config, box, self.generator, self.mask, device)
        self.excess = excess_power(self.observations)
        self._start_from_random_poses()

    def _look(self, band: int) -> None:
        """Take images up to a band, and the poses that are compared there."""
        self.band, box = band, self.observations.plane.box
        self.observations = self.observations.within(band)
        device = self.observations.device
        self.grid = so3_grid_on(self.config.search_nside, device)
        self.offsets = offsets_for(self.config, box, band).to(device)
        every = len(self.observations), len(self.offsets)
        self.likely = torch.ones(*every, dtype=torch.bool, device=device)

    def _start_from_random_poses(self) -> None:
        matched, weight = self.observations.matched()
        n = len(self.observations)
        rotations = random_rotations(n, self.generator, torch.float32).to(weight.device)
        sums = NormalEquations.empty(self.band, 2, weight.dtype, weight.device)
        sums.add(matched, weight, rotations, self.observations.plane)
        self._follow(sums.scaled(self.config.search_batch / n), n_steps=20)

    def _follow(self, sums: NormalEquations, n_steps: int | None = None) -> None:
        prior = shell_prior(sums, self.config.search_prior, self.band)
        self.network.fit(sums, prior, 0, n_steps)

    def _kept(self) -> float:
        """Share of the sums that stays at each batch."""
        return self.config.memory

    def batches(self) -> list[Tensor]:
        """Rows of an epoch's mini-batches, in random order."""
        order = torch.randperm(len(self.observations), generator=self.generator)
        return list(order.split(self._batch()))

    def _batch(self) -> int:
        return max(1, min(self.config.search_batch, len(self.observations) // 10))

    def step(self, rows: Tensor, temperature: float) -> float:
        """Show one mini-batch every pose of the grid, then let the network follow.

        Returns
        -------
        float
            Median effective number of poses an image.

        Raises
        ------
        FloatingPointError
            If the images have no finite evidence.
        """
        turn = random_rotations(1, self.generator, torch.float32)[0]
        rotations = self.grid @ taken_to(turn, self.grid.device)
        there = taken_to(rows, self.likely.device)
        mine = self.ranks.share(there)
        batch = self.observations.select(mine)
        batch = replace(batch, noise_power=batch.noise_power * self.excess)
        with torch.no_grad():
            volume = self.network.volume(0)
            self.ranks.same(volume)
            transform = padded_transform(volume, band=self.band)
            templates = extract_slices(transform, rotations, batch.plane)
            posterior, signal, weight = grid_expectation(
                batch, templates, self.offsets, temperature, likely=self.likely[mine]
            )
            new = accumulate_grid(signal, weight, rotations, batch.plane)
            explained = 2 * (signal.conj() * templates).real - weight * templates.abs() ** 2
            left = excess_power(batch, explained.sum(0)) * len(batch)
            self.ranks.add_up(new.signal, new.weight, left)
        kept = self.config.excess_memory
        self.excess = (self.excess * (kept + (1 - kept) * left / len(rows))).clamp(min=1)
        sizes = self.ranks.sizes(len(rows))
        found = self.ranks.everyones(posterior.log_evidence, sizes)
        shares = self.ranks.everyones(posterior.offset_shares, sizes)
        self.likely[there] = offsets_to_try(shares, self.offsets, self.offsets)
        old = self.sums
        self.sums = new if old is None else old.scaled(self._kept()).plus(new)
        self._follow(self.sums)
        self._epoch.append(found)
        # Copies wait for the device: one for both.
        effective = posterior.effective_poses.median()
        known, poses = torch.stack([found.isfinite().all().to(effective.dtype), effective]).tolist()
        if not known:
            raise FloatingPointError("the evidence of the images is not finite")
        return poses

    def end_epoch(self) -> None:
        """Average the evidence of the epoch's images."""
        self.log_evidence = float(torch.cat(self._epoch).mean())
        self._epoch.clear()

    def judge(self, held_out: Observations) -> None:
        """Evidence of images that took no part in the search, and of those that did."""
        found = self._evidence(held_out)
        self.held_out_evidence, self.held_out_error = found.mean, found.error
        self.log_evidence = self._evidence(self.observations).mean

    def _evidence(self, images: Observations) -> Evidence:
        """Of images at their true noise."""
        with torch.no_grad():
            volume = self.network.volume(0)
            found = evidence(images.within(self.band), volume, self.grid, self.offsets)
        return Evidence(*self.ranks.numbers(*found))

    def state(self) -> dict[str, Any]:
        """Between two epochs: all that the search has changed, by reference."""
        sums = self.sums
        return {
            "network": self.network.state(),
            "sums": None if sums is None else [sums.signal, sums.weight],
            "excess": self.excess,
            "likely": self.likely,
            "log_evidence": self.log_evidence,
            "held_out_evidence": self.held_out_evidence,
            "held_out_error": self.held_out_error,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        device = self.observations.device
        self.network.load(state["network"])
        if isinstance(self.network, GridMap):
            self.network.to(device)
        if state["sums"] is not None:
            signal, weight = state["sums"]
            self.sums = NormalEquations(signal.to(device), weight.to(device), 2)
        self.excess = state["excess"].to(device)
        self.likely = state["likely"].to(device)
        self.log_evidence = state["log_evidence"]
        self.held_out_evidence = state["held_out_evidence"]
        self.held_out_error = state["held_out_error"]


def excess_power(batch: Observations, explained: Tensor | float = 0.0) -> Tensor:
    """Power that a map leaves unexplained, by shell, in units of the noise's.

    Parameters
    ----------
    explained : Tensor, shape (m,)
        Sum over the images of what the map takes off each coefficient's squared residual, times
        :meth:`Observations.precision`; none: the images' whole power.

    Returns
    -------
    Tensor, shape (n_shells,), real
        Mean over the images; of pure noise 1.
    """
    plane = batch.plane
    seen = (batch.coefficients.abs().square() * batch.precision()).sum(0)
    shells = seen.new_zeros(2, plane.n_shells)
    pure = len(batch) * plane.multiplicity.to(seen) / 2
    shells.index_add_(1, plane.shell, torch.stack([seen - explained, pure]))
    return shells[0] / shells[1].clamp(min=1e-30)


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
    band = config.assign_band(box)
    smooth = lowpass(volume, float(band), 3)
    batch = images.select(torch.arange(len(images))[:: max(1, len(images) // 500)], band)
    grid = so3_grid_on(2, volume.device)
    slices = extract_slices(padded_transform(smooth, band=band), grid, batch.plane)
    power, shell = slices.abs().square().mean(0), batch.plane.shell
    noise = batch.noise_power[:, shell][batch.group]
    precision = batch.precision()
    seen = ((batch.coefficients.abs().square() - noise) * precision).sum()
    expected = (batch.ctf.square() * power * precision).sum()
    return smooth * float((seen / expected.clamp(min=1e-30)).clamp(min=0).sqrt())


def fit_scales(
    network: NetworkMap | GridMap, joint: Tensor, config: RmfnConfig, generator: torch.Generator
) -> list[Tensor]:
    """Fit each of the network's scales, coarse to fine, to a map at its band.

    Parameters
    ----------
    joint : Tensor, shape (N, N, N)

    Returns
    -------
    list of Tensor, shape (N, N, N)
    """
    box = joint.shape[-1]
    volumes = []
    for scale, band in enumerate(network.bands):
        target = lowpass(joint, band, 3)
        network.fit_volume(target, scale, config.final_steps, 4_000, generator)
        with torch.no_grad():
            volumes.append(network.volume(scale, box))
    return volumes
