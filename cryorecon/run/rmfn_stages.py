"""How engine rmfn begins: a global search from random poses, or a given map."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from cryorecon.engines.grid_map import GridMap
from cryorecon.engines.network_map import NetworkMap
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import Reconstruction, offsets_for
from cryorecon.engines.rmfn import RmfnConfig, Search, fit_scales, new_map, scaled_to_images
from cryorecon.engines.search import evidence
from cryorecon.errors import CryoreconError
from cryorecon.physics.masks import on_centre
from cryorecon.physics.rotations import so3_grid
from cryorecon.run.checkpoint import Entry, frozen
from cryorecon.run.climbing import Climb, ClimbingStages
from cryorecon.run.stages import HELD_OUT, beyond_noise, refuse_noise


@dataclass
class RmfnStages(ClimbingStages):
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
        volume, band = self.first_map(images)
        return self.assigned(on_centre(volume, band), band, images, half)

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
        best = found.best
        assert best is not None
        network = self.network = self._network(best["network"], images)

        def start() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                return network.volume(0), best["excess"]

        def keep() -> None:
            self._keep_search(found)

        return self.finer(found.climb, [start], images, keep)

    @property
    def search_config(self) -> RmfnConfig:
        """The engine's own settings."""
        return self.config

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
        return self.assigned(scaled, config.assign_band(box), images, half)

    def scale_maps(self, joint: torch.Tensor) -> list[torch.Tensor]:
        """The network's scales, coarse to fine, fitted to the final map."""
        self.job.say("fitting the network's scales to the map")
        assert self.network is not None
        return fit_scales(self.network, joint, self.config, self.generator)

    def search(self, images: ImageSet) -> Starts:
        """Run the starts, all of which see the same images, and keep the likeliest."""
        config = self.config
        n_held, free = self.counts(images)
        n = min(config.search_images, free)
        band_angst = self._angst(config.search_band(images.plane.box), images.plane.box)
        saved = self.job.checkpoint.get(self.part)
        run = Starts()
        if saved is not None:
            run = Starts(**saved["search"], climb=Climb(**saved["climb"]))
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

    def _one_start(self, run: Starts, images: ImageSet) -> Search:
        """All epochs of a start, or those that are left of it."""
        config, band = self.config, self.config.search_band(images.plane.box)
        at = self.generator.get_state()
        if run.climb.order is None:
            order = torch.randperm(len(images), generator=self.generator)
            run.climb.order = self.shortened(order, config.search_images, images)
        rows, held = self.seen_and_held(run.climb, config.search_images, images)
        n = len(rows)
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
                self.epoch(search, temperature, where, n * run.epochs, bar)
                run.epochs += 1
                run.state = search.state()
                self._keep_search(run)
        search.judge(images.select(held, band))
        return search

    def _keep_search(self, run: Starts, *, force: bool = False) -> None:
        def pack() -> Entry:
            starts = {name: value for name, value in vars(run).items() if name != "climb"}
            generator = self.generator.get_state()
            return {"search": starts, "climb": dict(vars(run.climb)), "generator": generator}

        self.job.checkpoint.put(self.part, pack, force=force)


@dataclass
class Starts:
    """How far the search has come.

    Attributes
    ----------
    start, epochs : int
        Starts that are done; epochs of the next one that are.
    state, best : dict, optional
        Of the start that is going on, and of the likeliest that is done.
    climb : Climb
        Of the search that goes on from it, and the images that all of them see.
    """

    start: int = 0
    epochs: int = 0
    state: Entry | None = None
    best: Entry | None = None
    climb: Climb = field(default_factory=Climb)
