"""The end of engine rmfn's search: its map goes on at a higher band, poses still soft."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.grid_map import GridMap
from cryorecon.engines.rmfn import Search
from cryorecon.physics.masks import Support

# Epochs before a map may count as settled, and by how much two must exceed the two before.
_FEWEST, _GAIN = 5, 0.1


@dataclass(kw_only=True)
class FineSearch(Search):
    """Goes on from a search's map where its two hands can be told apart.

    At the search's band the map of a compact molecule is nearly its own mirror image, and images
    of either hand fit a map between the two about as well as the right one. Some shells higher
    they do not: with poses that are still averaged, the map falls to one side. Refinement, which
    gives every image one pose, would keep what is between. The first epoch only gathers images.

    Attributes
    ----------
    start : Tensor, shape (M, M, M)
        The search's map, on any grid that holds it.
    unexplained : Tensor, shape (s,)
        Its :attr:`Search.excess`.
    """

    start: Tensor
    unexplained: Tensor
    _gathering: bool = True
    _course: list[float] = field(default_factory=list)

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
        if self._gathering:
            assert self.sums is not None
            # As much as later sums hold, of which each batch forgets a share.
            steady = 1 / max(1 - self.config.memory, 1 / len(self._epoch))
            self.sums = self.sums.scaled(steady / len(self._epoch))
            self._gathering = False
            self._follow(self.sums)
        super().end_epoch()
        self._course.append(self.log_evidence)

    @property
    def settled(self) -> bool:
        """Whether the last epochs' evidence hardly exceeds that of those before."""
        before, last = sum(self._course[-4:-2]) / 2, sum(self._course[-2:]) / 2
        return len(self._course) >= _FEWEST and last - before < _GAIN

    def _kept(self) -> float:
        return 1.0 if self._gathering else super()._kept()

    def _follow(self, sums: NormalEquations, n_steps: int | None = None) -> None:
        if not self._gathering:
            super()._follow(sums, n_steps)
