"""The end of engine rmfn's search: its map goes on at a higher band, poses still soft."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.grid_map import GridMap
from cryorecon.engines.observations import Observations
from cryorecon.engines.reconstruction import TOLD_APART, outline_offsets, shell_prior
from cryorecon.engines.rmfn import Search, excess_power
from cryorecon.engines.search import Evidence, offsets_to_try, posterior_of
from cryorecon.physics.masks import Support

# Epochs before a map may count as settled, and the share of the evidence that so many more must
# bring. While poses are not told apart, most of it lies in shells that have long been found, and a
# map may stand still for a while before it falls to one hand.
_SETTLED = {True: (3, 2, 1e-3), False: (8, 4, 2.5e-4)}
# Least signal of a coefficient, over its noise: no shell is taken to be empty.
_LEAST_SIGNAL = 0.01
# That by which a later map must be better, or rounding would choose between maps that are alike.
_BETTER = 1e-4


@dataclass(kw_only=True)
class FineSearch(Search):
    """Goes on from a search's map where its two hands can be told apart.

    At the search's band the map of a compact molecule is nearly its own mirror image, and images
    of either hand fit a map between the two about as well as the right one. Some shells higher
    they do not: with poses that are still averaged, the map falls to one side. Refinement, which
    gives every image one pose, would keep what is between. The first epoch only gathers images.

    Each shell is held back by what the images say of its signal. Where that is far below the
    noise, a map that follows its sums freely learns its own images by heart, and stays where it
    is: the poses are surer than they should be.

    Attributes
    ----------
    held_out : Observations
        Images that no search has seen, to the band that is searched: by their evidence it is known
        when to end. That of the images seen rises and falls with the noise that they are judged
        by.
    start : Tensor, shape (M, M, M)
        The search's map, on any grid that holds it.
    unexplained : Tensor, shape (s,)
        Its :attr:`Search.excess`.
    course : list of float
        Mean log-evidence of an image held out, after each epoch.
    poses : float
        How many poses such an image leaves likely after the last epoch, the median.
    best : Tensor, shape (M, M, M)
        The map of the epoch that had most of it, the first of those that are alike.
    """

    held_out: Observations
    start: Tensor
    unexplained: Tensor
    course: list[float] = field(default_factory=list)
    poses: float = 1.0
    best: Tensor = field(init=False)
    _prior: Tensor = field(init=False)
    _likely_held_out: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._look(round(float(self.held_out.plane.radius[-1])))
        device = self.observations.device
        self._prior = self.config.fine_prior * self._wiener()
        # The solved grid: the network's first scale follows it too slowly in its last shells.
        self.network = GridMap((self.band,), Support(self.config.diameter / 2, self.mask))
        self.network.fit_volume(self.start.to(device), 0, 0, 0, self.generator)
        self.excess = torch.ones(self.observations.plane.n_shells, device=device)
        shells = min(len(self.unexplained), len(self.excess))
        self.excess[:shells] = self.unexplained[:shells].to(device)
        self.likely, self._likely_held_out = map(
            self._by_outline, (self.observations, self.held_out.within(self.band))
        )

    def _by_outline(self, images: Observations) -> Tensor:
        noise = images.noise_power * self.excess
        volume = self.start.to(images.device)
        return outline_offsets(
            replace(images, noise_power=noise), volume, self.config, self.grid[0], self.offsets
        )

    def end_epoch(self) -> None:
        """As for any search; the first time the map learns of the images."""
        if not self.course:
            assert self.sums is not None
            # As much as later sums hold, of which each batch forgets a share.
            self.sums = self.sums.scaled(self._remembered() / len(self.observations))
            self._take(self.sums)
        super().end_epoch()
        found = self._evidence_held_out()
        if not self.course or found.mean - max(self.course) > _BETTER * abs(found.mean):
            self.best = self.network.volume(0)
        self.course.append(found.mean)
        self.poses = found.poses

    def _evidence_held_out(self) -> Evidence:
        """Of images that it does not see, at offsets that have been likely."""
        with torch.no_grad():
            images, poses = self.held_out.within(self.band), (self.grid, self.offsets)
            volume = self.network.volume(0)
            posterior = posterior_of(images, volume, *poses, self._likely_held_out)
            shares = posterior.offset_shares
            self.ranks.same(shares)
            self._likely_held_out = offsets_to_try(shares, self.offsets, self.offsets)
        return Evidence(*self.ranks.numbers(*Evidence.of(posterior)))

    @property
    def settled(self) -> bool:
        """Whether the last epochs brought hardly any evidence beyond that of those before."""
        fewest, last, share = _SETTLED[self.poses <= TOLD_APART]
        if len(self.course) < fewest:
            return False
        before, now = max(self.course[:-last]), max(self.course[-last:])
        return now - before < share * abs(before)

    def _remembered(self) -> int:
        """Images that the sums hold: those of a mini-batch at least."""
        return max(self._batch(), min(self.config.fine_memory, len(self.observations)))

    def _kept(self) -> float:
        return 1 - self._batch() / self._remembered() if self.course else 1.0

    def _wiener(self) -> Tensor:
        """Noise over signal of a voxel, by shell, once the sums hold as many images as they may.

        A shell s of a slice has 2 pi s coefficients, one of the map 4 pi s^2 voxels, so that each
        image brings 1 / 2s to a voxel.
        """
        signal = (excess_power(self.observations) - 1)[: self.band + 1].clamp(min=_LEAST_SIGNAL)
        shells = torch.arange(self.band + 1, device=signal.device).clamp(min=1)
        return 2 * shells / (self._remembered() * signal)

    def _follow(self, sums: NormalEquations, n_steps: int | None = None) -> None:
        del n_steps
        if self.course:
            self._take(sums)

    def _take(self, sums: NormalEquations) -> None:
        self.network.fit(sums, shell_prior(sums, 1.0, self.band) * self._prior, 0)

    def state(self) -> dict[str, Any]:
        """As of any search, with the course and the best map."""
        own = {"course": list(self.course), "poses": self.poses, "best": self.best}
        return {**super().state(), **own, "likely_held_out": self._likely_held_out}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        super().load(state)
        self.course, self.poses = list(state["course"]), state["poses"]
        device = self.observations.device
        self.best = state["best"].to(device)
        self._likely_held_out = state["likely_held_out"].to(device)
