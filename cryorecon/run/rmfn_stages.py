"""How engine rmfn begins: a global search from random poses, or a given map."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cryorecon.engines.grid_map import GridMap
from cryorecon.engines.network_map import NetworkMap
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import Reconstruction, assign, offsets_for
from cryorecon.engines.rmfn import RmfnConfig, Search, fit_scales, new_map, scaled_to_images
from cryorecon.engines.search import evidence
from cryorecon.errors import CryoreconError
from cryorecon.physics.rotations import so3_grid
from cryorecon.run.progress import stage_bar
from cryorecon.run.stages import HELD_OUT, Stages, beyond_noise, refuse_noise


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
        found = self.search(images)
        self.network = found.network
        with torch.no_grad():
            volume = found.network.volume(0)
        return self._assigned(volume, images, half)

    def from_map(
        self, images: ImageSet, half: torch.Tensor, volume: torch.Tensor
    ) -> Reconstruction:
        """Assign and refine, with a given map in place of the search's."""
        config, box = self.config, images.plane.box
        scaled = scaled_to_images(volume, images, config)
        band = config.search_band(box)
        rows = torch.arange(len(images))[:: max(1, len(images) // HELD_OUT)]
        grid = so3_grid(config.search_nside, torch.float32)[0]
        offsets = offsets_for(config, box, band)
        mean, error = evidence(images.select(rows, band), scaled, grid, offsets)
        self.job.say(f"the map given explains images with log-evidence {mean:.2f} an image")
        if not beyond_noise(mean, error):
            raise CryoreconError(
                f"The map of --init-map explains the images no better than an empty one "
                f"(log-evidence {mean:.2f} +- {error:.2f})",
                "It must be white on black, of this particle; or leave it out and search",
            )
        self.network = new_map(config, box, self.generator, self.mask)
        state = self._assigned(scaled, images, half)
        self.refine(state, images)
        return state

    def scale_maps(self, joint: torch.Tensor) -> list[torch.Tensor]:
        """The network's scales, coarse to fine, fitted to the final map."""
        self.job.say("fitting the network's scales to the map")
        assert self.network is not None
        return fit_scales(self.network, joint, self.config, self.generator)

    def _assigned(
        self, volume: torch.Tensor, images: ImageSet, half: torch.Tensor
    ) -> Reconstruction:
        with stage_bar(self.job.console, "Assigning", len(images)) as bar:
            state = assign(volume, self.support, images, half, self.config, self.generator, bar)
        self.job.say("every image has a first pose")
        return state

    def search(self, images: ImageSet) -> Search:
        """Run the starts and keep the likeliest."""
        config, box = self.config, images.plane.box
        n_held = min(HELD_OUT, len(images) // 5)
        n = min(config.search_images, len(images) - n_held)
        best: Search | None = None
        band = config.search_band(box)
        band_angst = self._angst(band, box)
        self.job.say(f"searching from random poses at {band_angst:.1f} A with {n} images")
        for start in range(config.n_starts):
            order = torch.randperm(len(images), generator=self.generator)
            rows, held = order[:n], order[n : n + n_held]
            search = Search(config, images.select(rows, band), self.generator, self.mask)
            title = f"Search {start + 1}/{config.n_starts}"
            with stage_bar(self.job.console, title, n * len(config.temperatures)) as bar:
                done = 0
                for temperature in config.temperatures:
                    for batch in search.batches():
                        effective = search.step(batch, temperature)
                        done += len(batch)
                        bar(done, f"{band_angst:.1f} A, {effective:.1f} poses an image")
                    search.end_epoch()
            search.judge(images.select(held, band))
            self.job.say(
                f"start {start + 1}: log-evidence {search.log_evidence:.2f} an image, "
                f"{search.held_out_evidence:.2f} of {n_held} held out"
            )
            if best is None or search.log_evidence > best.log_evidence:
                best = search
        assert best is not None
        refuse_noise(best.held_out_evidence, best.held_out_error)
        return best
