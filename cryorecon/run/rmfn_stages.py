"""How engine rmfn begins: a global search from random poses, or a given map."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from cryorecon.engines.fine_search import FineSearch
from cryorecon.engines.grid_map import GridMap
from cryorecon.engines.network_map import NetworkMap
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import (
    Reconstruction,
    assign,
    offsets_for,
    telling_grid,
)
from cryorecon.engines.rmfn import RmfnConfig, Search, fit_scales, new_map, scaled_to_images
from cryorecon.engines.search import evidence
from cryorecon.errors import CryoreconError
from cryorecon.physics.rotations import so3_grid
from cryorecon.run.checkpoint import Entry, broken, frozen
from cryorecon.run.progress import Update
from cryorecon.run.stages import HELD_OUT, Stages, beyond_noise, refuse_noise

# Share of the evidence that two epochs must bring for the search to go on: of hard sets most lies
# in shells that have long been found.
_GAIN, _HARD_GAIN = 1e-3, 2.5e-4


@dataclass
class RmfnStages(Stages):
    """A run of engine rmfn.

    Attributes
    ----------
    network : NetworkMap or GridMap
        Of the search; fitted to the final map at the end.
    """

    config: RmfnConfig
    network: NetworkMap | GridMap | None = None

    def begin(self, images: ImageSet, half: torch.Tensor) -> Reconstruction:
        """Search, then give every image its best pose."""
        return self._assigned(*self.first_map(images), images, half)

    def first_map(self, images: ImageSet) -> tuple[torch.Tensor, int]:
        """What the whole search ends with.

        Returns
        -------
        volume : Tensor, shape (M, M, M)
            On a grid that holds it.
        band : int
            How far it reaches, in cycles per box.
        """
        found = self.search(images)
        assert found.best is not None
        self.network = self._network(found.best["network"], images)
        with torch.no_grad():
            volume = self.network.volume(0)
        return self._finer(found, volume, images)

    def engine_state(self) -> Entry:
        """The network."""
        assert self.network is not None
        return {"network": self.network.state()}

    def load_engine(self, state: Entry, images: ImageSet) -> None:
        """Go on from what :meth:`engine_state` gave."""
        self.network = self._network(state["network"], images)

    def _network(self, state: Entry, images: ImageSet) -> NetworkMap | GridMap:
        # What a fresh network draws is thrown away.
        box, device = images.plane.box, images.device
        network = new_map(self.config, box, torch.Generator(), self.mask, device)
        network.load(state)
        return network.to(device) if isinstance(network, GridMap) else network

    def from_map(
        self, images: ImageSet, half: torch.Tensor, volume: torch.Tensor
    ) -> Reconstruction:
        """Assign and refine, with a given map in place of the search's."""

        def begin() -> Reconstruction:
            return self._assigned_to(images, half, volume)

        return self.go_through("map", images, begin, self.refine)

    def _assigned_to(
        self, images: ImageSet, half: torch.Tensor, volume: torch.Tensor
    ) -> Reconstruction:
        config, box = self.config, images.plane.box
        scaled = scaled_to_images(volume.to(images.device), images, config)
        band = config.search_band(box)
        rows = torch.arange(len(images))[:: max(1, len(images) // HELD_OUT)]
        grid = so3_grid(config.search_nside, torch.float32)[0]
        offsets = offsets_for(config, box, band)
        found = evidence(images.select(rows, band), scaled, grid, offsets)
        mean, error, _ = images.ranks.numbers(*found)
        self.job.say(f"the map given explains images with log-evidence {mean:.2f} an image")
        if not beyond_noise(mean, error):
            raise CryoreconError(
                f"The map of --init-map explains the images no better than an empty one "
                f"(log-evidence {mean:.2f} +- {error:.2f})",
                "It must be white on black, of this particle; or leave it out and search",
            )
        self.network = new_map(config, box, self.generator, self.mask, images.device)
        return self._assigned(scaled, config.assign_band(box), images, half)

    def scale_maps(self, joint: torch.Tensor) -> list[torch.Tensor]:
        """The network's scales, coarse to fine, fitted to the final map."""
        self.job.say("fitting the network's scales to the map")
        assert self.network is not None
        return fit_scales(self.network, joint, self.config, self.generator)

    def _assigned(
        self, volume: torch.Tensor, band: int, images: ImageSet, half: torch.Tensor
    ) -> Reconstruction:
        grid = telling_grid(images, volume, self.config, band)
        known = volume, self.support, images, half, self.config
        with self.job.bar("Assigning", len(images)) as bar:
            state = assign(*known, grid, self.generator, bar)
        self.job.say("every image has a first pose")
        return state

    def search(self, images: ImageSet) -> Starts:
        """Run the starts, all of which see the same images, and keep the likeliest."""
        config = self.config
        n_held, free = self._counts(images)
        n = min(config.search_images, free)
        band_angst = self._angst(config.search_band(images.plane.box), images.plane.box)
        saved = self.job.checkpoint.get(self.part)
        run = Starts() if saved is None else Starts(**saved["search"])
        if saved is None:
            self.job.say(f"searching from random poses at {band_angst:.1f} A with {n} images")
        else:
            self.generator.set_state(saved["generator"])
            if run.start < config.n_starts:
                self.job.say(f"search: start {run.start + 1} goes on after {run.epochs} epochs")
        while run.start < config.n_starts:
            search = self._one_start(run, images)
            self.job.say(
                f"start {run.start + 1}: log-evidence {search.log_evidence:.2f} an image, "
                f"{search.held_out_evidence:.2f} of {n_held} held out"
            )
            if run.best is None or search.log_evidence > run.best["log_evidence"]:
                run.best = frozen(search.state())
            run.start, run.epochs, run.state = run.start + 1, 0, None
            self._keep_search(run, force=run.start == config.n_starts)
        assert run.best is not None
        refuse_noise(run.best["held_out_evidence"], run.best["held_out_error"])
        return run

    def _counts(self, images: ImageSet) -> tuple[int, int]:
        """How many images no search sees, and how many are left."""
        held = min(HELD_OUT, len(images) // 5)
        return held, len(images) - held

    def _rungs(self, box: int) -> list[Rung]:
        """Where the search goes on, once the starts are done."""
        config = self.config
        bands = config.search_band(box), config.fine_band(box), config.hard_band(box)
        rungs = [
            Rung(bands[1], config.fine_images, config.fine_epochs, _GAIN),
            Rung(bands[2], config.hard_images, config.hard_epochs, _HARD_GAIN),
        ]
        higher = [now > before for before, now in pairwise(bands)]
        return [rung for rung, so in zip(rungs, higher, strict=True) if so and rung.epochs > 0]

    def _finer(
        self, run: Starts, volume: torch.Tensor, images: ImageSet
    ) -> tuple[torch.Tensor, int]:
        """Go on from the search's map at a higher band, with more images; of hard sets twice."""
        assert run.best is not None
        if run.reached is None:
            run.reached = {"start": volume, "unexplained": run.best["excess"]}
            run.band = self.config.search_band(images.plane.box)
        rungs = self._rungs(images.plane.box)
        while run.rung < len(rungs):
            rung = rungs[run.rung]
            search = self._climb(run, rung, images)
            run.reached = {"start": search.best, "unexplained": search.excess}
            # With few poses left, nothing is to be gained from telling more of them apart.
            told_apart = search.poses <= self.config.hard_poses
            run.rung = len(rungs) if told_apart else run.rung + 1
            run.band, run.fine = rung.band, None
            self._keep_search(run)
        return run.reached["start"].to(images.device), run.band

    def _climb(self, run: Starts, rung: Rung, images: ImageSet) -> FineSearch:
        """Search on at a band, until it has settled."""
        n_held, free = self._counts(images)
        n, search = min(rung.images, free), self._fine_search(run, rung, images)
        again = f", after {len(search.course)} epochs" if search.course else ""
        band_angst = self._angst(rung.band, images.plane.box)
        self.job.say(f"searching on at {band_angst:.1f} A with {n} images{again}")
        with self.job.bar("Search, finer", n * rung.epochs) as bar:
            while len(search.course) < rung.epochs and not search.settled:
                done = len(search.course)
                self._epoch(search, 1.0, f"searched on, epoch {done + 1}", n * done, bar)
                run.fine = search.state()
                self._keep_search(run)
        self.job.say(
            f"after {len(search.course)} epochs: log-evidence {max(search.course):.2f} an image of "
            f"{n_held} held out, {search.poses:.0f} poses likely for each"
        )
        return search

    def _fine_search(self, run: Starts, rung: Rung, images: ImageSet) -> FineSearch:
        """As it was left, or from its beginning."""
        assert run.order is not None
        assert run.reached is not None
        n_held, free = self._counts(images)
        sets = _seen_and_held(run.order, min(rung.images, free), n_held)
        seen, held = (images.select(rows, rung.band) for rows in sets)
        shared = (self.config, seen, self.generator, self.mask, images.ranks)
        gain = rung.least_gain
        search = FineSearch(*shared, held_out=held, least_gain=gain, **run.reached)
        if run.fine is not None:
            search.load(run.fine)
        return search

    def _one_start(self, run: Starts, images: ImageSet) -> Search:
        """All epochs of a start, or those that are left of it."""
        config, band = self.config, self.config.search_band(images.plane.box)
        n_held, free = self._counts(images)
        n = min(config.search_images, free)
        at = self.generator.get_state()
        if run.order is None:
            order = torch.randperm(len(images), generator=self.generator)
            most = max(n, *(min(rung.images, free) for rung in self._rungs(images.plane.box)), 0)
            run.order = torch.cat(_seen_and_held(order, most, n_held))
        rows, held = _seen_and_held(run.order, n, n_held)
        seen = images.select(rows, band)
        search = Search(config, seen, self.generator, self.mask, images.ranks)
        if run.state is not None:
            search.load(run.state)
            self.generator.set_state(at)
        title = f"Search {run.start + 1}/{config.n_starts}"
        with self.job.bar(title, n * len(config.temperatures)) as bar:
            while run.epochs < len(config.temperatures):
                where = f"start {run.start + 1}, epoch {run.epochs + 1}"
                temperature = config.temperatures[run.epochs]
                self._epoch(search, temperature, where, n * run.epochs, bar)
                run.epochs += 1
                run.state = search.state()
                self._keep_search(run)
        search.judge(images.select(held, band))
        return search

    def _epoch(
        self, search: Search, temperature: float, where: str, done: int, bar: Update
    ) -> None:  # fmt: skip
        band_angst = self._angst(search.band, search.observations.plane.box)
        for number, batch in enumerate(search.batches(), 1):
            try:
                effective = search.step(batch, temperature)
            except FloatingPointError as error:
                raise broken(f"The search ({where}, batch {number})", error) from error
            done += len(batch)
            bar(done, f"{band_angst:.1f} A, {effective:.1f} poses an image")
        search.end_epoch()

    def _keep_search(self, run: Starts, *, force: bool = False) -> None:
        def pack() -> Entry:
            return {"search": dict(vars(run)), "generator": self.generator.get_state()}

        self.job.checkpoint.put(self.part, pack, force=force)


@dataclass(frozen=True)
class Rung:
    """How the search goes on: band in cycles per box, most images and epochs, when to end."""

    band: int
    images: int
    epochs: int
    least_gain: float


@dataclass
class Starts:
    """How far the search has come.

    Attributes
    ----------
    start, epochs : int
        Starts that are done; epochs of the next one that are.
    order : Tensor, int64, optional
        Images as they were drawn: as many as any search sees, then those held out.
    state, best, fine : dict, optional
        Of the start that is going on, of the likeliest that is done, and of the search that goes
        on from it.
    rung, band : int
        Bands at which it has done so, and the last of them in cycles per box.
    reached : dict, optional
        What the next one begins with: see :class:`FineSearch`.
    """

    start: int = 0
    epochs: int = 0
    order: torch.Tensor | None = None
    state: Entry | None = None
    best: Entry | None = None
    fine: Entry | None = None
    rung: int = 0
    band: int = 0
    reached: Entry | None = None


def _seen_and_held(order: torch.Tensor, n: int, n_held: int) -> tuple[torch.Tensor, torch.Tensor]:
    return order[:n], order[len(order) - n_held :]
