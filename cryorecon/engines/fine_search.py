"""The end of engine rmfn's search: its map goes on at a higher band, poses still soft."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.grid_map import GridMap
from cryorecon.engines.observations import Observations
from cryorecon.engines.rmfn import Search
from cryorecon.physics.masks import Support

# Epochs before a map may count as settled, and the share of the evidence that two must bring.
_FEWEST, _GAIN = 3, 1e-3
# That by which a later map must be better, or rounding would choose between maps that are alike.
_BETTER = 1e-4


@dataclass(kw_only=True)
class FineSearch(Search):
    """Goes on from a search's map where its two hands can be told apart.

    At the search's band the map of a compact molecule is nearly its own mirror image, and images
    of either hand fit a map between the two about as well as the right one. Some shells higher
    they do not: with poses that are still averaged, the map falls to one side. Refinement, which
    gives every image one pose, would keep what is between. The first epoch only gathers images.

    Attributes
    ----------
    held_out : Observations
        Images that no search has seen: by their evidence it is known when to end. That of the
        images seen rises and falls with the noise that they are judged by.
    start : Tensor, shape (M, M, M)
        The search's map, on any grid that holds it.
    unexplained : Tensor, shape (s,)
        Its :attr:`Search.excess`.
    course : list of float
        Mean log-evidence of an image held out, after each epoch.
    best : Tensor, shape (M, M, M)
        The map of the epoch that had most of it, the first of those that are alike.
    """

    held_out: Observations
    start: Tensor
    unexplained: Tensor
    course: list[float] = field(default_factory=list)
    best: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._look(self.config.fine_band(self.observations.plane.box))
        device = self.observations.device
        # The solved grid: the network's first scale follows it too slowly in its last shells.
        self.network = GridMap((self.band,), Support(self.config.diameter / 2, self.mask))
        self.network.fit_volume(self.start.to(device), 0, 0, 0, self.generator)
        self.excess = torch.ones(self.observations.plane.n_shells, device=device)
        known = min(len(self.unexplained), len(self.excess))
        self.excess[:known] = self.unexplained[:known].to(device)

    def end_epoch(self) -> None:
        """As for any search; the first time the map learns of the images."""
        if not self.course:
            assert self.sums is not None
            # As much as later sums hold, of which each batch forgets a share.
            self.sums = self.sums.scaled(self._remembered() / len(self.observations))
            super()._follow(self.sums)
        super().end_epoch()
        found = self._evidence(self.held_out)[0]
        if not self.course or found - max(self.course) > _BETTER * abs(found):
            self.best = self.network.volume(0)
        self.course.append(found)

    @property
    def settled(self) -> bool:
        """Whether the last two epochs brought hardly any evidence beyond that of those before."""
        if len(self.course) < _FEWEST:
            return False
        before, last = max(self.course[:-2]), max(self.course[-2:])
        return last - before < _GAIN * abs(before)

    def _remembered(self) -> int:
        """Images that the sums hold: those of a mini-batch at least."""
        return max(self._batch(), min(self.config.fine_memory, len(self.observations)))

    def _kept(self) -> float:
        return 1 - self._batch() / self._remembered() if self.course else 1.0

    def _follow(self, sums: NormalEquations, n_steps: int | None = None) -> None:
        if self.course:
            super()._follow(sums, n_steps)

    def state(self) -> dict[str, Any]:
        """As of any search, with the course and the best map."""
        return {**super().state(), "course": list(self.course), "best": self.best}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        super().load(state)
        self.course = list(state["course"])
        self.best = state["best"].to(self.observations.device)
