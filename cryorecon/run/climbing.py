"""How a search goes on from a coarse map, band by band, until poses are told apart."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from cryorecon.engines.fine_search import FineSearch
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import Reconstruction, assign, telling_grid
from cryorecon.engines.rmfn import RmfnConfig, Search
from cryorecon.run.checkpoint import Entry, broken
from cryorecon.run.progress import Update
from cryorecon.run.stages import HELD_OUT, Stages


@dataclass(frozen=True)
class Rung:
    """How the search goes on: band in cycles per box, most images and epochs."""

    band: int
    images: int
    epochs: int


@dataclass
class Climb:
    """How far a search that goes on from a map has come.

    Attributes
    ----------
    order : Tensor, int64, optional
        Images as they were drawn: as many as any search sees, then those held out.
    rung, band : int
        Bands that are done, and the last of them in cycles per box.
    fine : dict, optional
        State of the search that is going on.
    reached : dict, optional
        What the next one begins with: see :class:`FineSearch`.
    begun : int
        Of several beginnings, those that were searched on from.
    likeliest : dict, optional
        What the best of them has reached, and its evidence.
    """

    order: torch.Tensor | None = None
    rung: int = 0
    band: int = 0
    fine: Entry | None = None
    reached: Entry | None = None
    begun: int = 0
    likeliest: Entry | None = None


# A map, and what it leaves unexplained: see :class:`FineSearch`.
Beginning = Callable[[], tuple[torch.Tensor, torch.Tensor]]


class ClimbingStages(Stages):
    """A run whose coarse map a search goes on from."""

    @property
    @abstractmethod
    def search_config(self) -> RmfnConfig:
        """Settings of the search."""

    def counts(self, images: ImageSet) -> tuple[int, int]:
        """How many images no search sees, and how many are left."""
        held = min(HELD_OUT, len(images) // 5)
        return held, len(images) - held

    def _rungs(self, box: int) -> list[Rung]:
        """Where the search goes on, once the starts are done."""
        config = self.search_config
        bands = config.search_band(box), config.fine_band(box), config.hard_band(box)
        rungs = [
            Rung(bands[1], config.fine_images, config.fine_epochs),
            Rung(bands[2], config.hard_images, config.hard_epochs),
        ]
        higher = [now > before for before, now in pairwise(bands)]
        return [rung for rung, so in zip(rungs, higher, strict=True) if so and rung.epochs > 0]

    def shortened(self, order: torch.Tensor, least: int, images: ImageSet) -> torch.Tensor:
        """Of all images, in some order, those that searches see (`least` or more), and the last."""
        free = self.counts(images)[1]
        most = max(least, *(rung.images for rung in self._rungs(images.plane.box)), 0)
        return torch.cat([order[: min(most, free)], order[free:]])

    def seen_and_held(
        self, climb: Climb, n: int, images: ImageSet
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first of the images that searches see, and those that none does."""
        assert climb.order is not None
        n_held, free = self.counts(images)
        return climb.order[: min(n, free)], climb.order[len(climb.order) - n_held :]

    def finer(
        self,
        climb: Climb,
        beginnings: Sequence[Beginning],
        images: ImageSet,
        keep: Callable[[], None],
    ) -> tuple[torch.Tensor, int]:
        """Go on from a map at a higher band, with more images; of hard sets twice.

        Parameters
        ----------
        beginnings : sequence of callable
            Each gives a map. The others are for hard sets, where a search may stay in a wrong one:
            which explains unseen images best at the higher band decides.
        keep : callable
            Told whenever `climb` has changed.

        Returns
        -------
        volume : Tensor, shape (M, M, M)
        band : int
            How far it reaches, in cycles per box.
        """
        box = images.plane.box
        rungs = self._rungs(box)
        if not rungs:
            volume, _ = beginnings[0]()
            return volume.to(images.device), self.search_config.search_band(box)
        while climb.rung == 0:
            self._try_next(climb, beginnings, rungs[0], images, keep)
        while climb.rung < len(rungs):
            search = self._climbed(climb, rungs[climb.rung], images, keep)
            self._go_up(climb, _reached_by(search), rungs)
            keep()
        assert climb.reached is not None
        return climb.reached["start"].to(images.device), climb.band

    def _try_next(
        self,
        climb: Climb,
        beginnings: Sequence[Beginning],
        rung: Rung,
        images: ImageSet,
        keep: Callable[[], None],
    ) -> None:
        """Search on from one more beginning; go up from the likeliest if it was the last."""
        if climb.reached is None:
            start, unexplained = beginnings[climb.begun]()
            climb.reached = {"start": start, "unexplained": unexplained}
        found = _reached_by(self._climbed(climb, rung, images, keep))
        best = climb.likeliest
        climb.likeliest = found if best is None or found["evidence"] > best["evidence"] else best
        climb.begun, climb.fine, climb.reached = climb.begun + 1, None, None
        if self._told_apart(found) or climb.begun == len(beginnings):
            self._go_up(climb, climb.likeliest, self._rungs(images.plane.box))
            climb.likeliest = None
        keep()

    def _go_up(self, climb: Climb, found: Entry, rungs: list[Rung]) -> None:
        climb.reached = {name: found[name] for name in ("start", "unexplained")}
        climb.band, climb.fine = rungs[climb.rung].band, None
        # With few poses left, nothing is to be gained from telling more of them apart.
        climb.rung = len(rungs) if self._told_apart(found) else climb.rung + 1

    def _told_apart(self, found: Entry) -> bool:
        return bool(found["poses"] <= self.search_config.hard_poses)

    def _climbed(
        self, climb: Climb, rung: Rung, images: ImageSet, keep: Callable[[], None]
    ) -> FineSearch:
        """Search on at a band, until it has settled."""
        search = self._fine_search(climb, rung, images)
        n, n_held = len(search.observations), len(search.held_out)
        again = f", after {len(search.course)} epochs" if search.course else ""
        band_angst = self._angst(rung.band, images.plane.box)
        self.job.say(f"searching on at {band_angst:.1f} A with {n} images{again}")
        with self.job.bar("Search, finer", n * rung.epochs) as bar:
            while len(search.course) < rung.epochs and not search.settled:
                done = len(search.course)
                self.epoch(search, 1.0, f"searched on, epoch {done + 1}", n * done, bar)
                climb.fine = search.state()
                keep()
        self.job.say(
            f"after {len(search.course)} epochs: log-evidence {max(search.course):.2f} an image of "
            f"{n_held} held out, likely poses of each: {search.poses:.0f}"
        )
        return search

    def _fine_search(self, climb: Climb, rung: Rung, images: ImageSet) -> FineSearch:
        """As it was left, or from its beginning."""
        assert climb.reached is not None
        sets = self.seen_and_held(climb, rung.images, images)
        seen, held = (images.select(rows, rung.band) for rows in sets)
        shared = (self.search_config, seen, self.generator, self.mask, images.ranks)
        search = FineSearch(*shared, held_out=held, **climb.reached)
        if climb.fine is not None:
            search.load(climb.fine)
        return search

    def epoch(
        self, search: Search, temperature: float, where: str, done: int, bar: Update
    ) -> None:  # fmt: skip
        """All mini-batches of one epoch, after `done` images of others."""
        band_angst = self._angst(search.band, search.observations.plane.box)
        for number, batch in enumerate(search.batches(), 1):
            try:
                effective = search.step(batch, temperature)
            except FloatingPointError as error:
                raise broken(f"The search ({where}, batch {number})", error) from error
            done += len(batch)
            bar(done, f"{band_angst:.1f} A, {effective:.1f} poses an image")
        search.end_epoch()

    def assigned(
        self, volume: torch.Tensor, band: int, images: ImageSet, half: torch.Tensor
    ) -> Reconstruction:
        """Every image at its likeliest pose of a grid, in a map that reaches up to a band."""
        grid = telling_grid(images, volume, self.config, band)
        known = volume, self.support, images, half, self.config
        with self.job.bar("Assigning", len(images)) as bar:
            state = assign(*known, grid, self.generator, bar)
        self.job.say("every image has a first pose")
        return state


def _reached_by(search: FineSearch) -> Entry:
    """What is left of a search that has settled."""
    ends = {"start": search.best, "unexplained": search.excess}
    return {**ends, "evidence": max(search.course), "poses": search.poses}
