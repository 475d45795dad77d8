"""The stages of an ab initio run with engine rmfn, told to the log as they go."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cryorecon.conventions import shell_to_angst
from cryorecon.engines.grid_map import GridMap
from cryorecon.engines.network_map import NetworkMap
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.rmfn import (
    RmfnConfig,
    RmfnState,
    Search,
    assign,
    evidence,
    new_map,
    offsets_for,
    scaled_to_images,
)
from cryorecon.engines.rmfn_refine import agreement_band, half_maps, reassign, refine_round
from cryorecon.errors import CryoreconError
from cryorecon.maps.align import align_maps
from cryorecon.maps.chance import beyond_chance, chance_fsc
from cryorecon.maps.fsc import fsc_curve
from cryorecon.maps.poses import mirror_poses, rotate_poses, shift_origins
from cryorecon.maps.symmetry import find_symmetry
from cryorecon.physics.rotations import so3_grid
from cryorecon.physics.symmetry import symmetry_group
from cryorecon.run.job import Job
from cryorecon.run.progress import stage_bar

# All images are searched again after this round, and every second round from then on while more
# than this share of them finds a better pose.
_FIRST_NEW_SEARCH = 3
_ENOUGH_FOUND = 0.02
# The axes are looked for where half maps agree by more than this; copies that correlate less are
# doubtful.
_SYMMETRY_FSC = 0.5
_DOUBTFUL = 0.3
# Images that the search does not see: do they tell its map from nothing, by this many errors?
_HELD_OUT = 200
_SURE = 3.0


@dataclass(frozen=True)
class Stages:
    """One run's surroundings: where it logs, its settings and its random numbers."""

    job: Job
    config: RmfnConfig
    generator: torch.Generator
    pixel_size_angst: float
    mask: torch.Tensor | None = None

    def from_scratch(self, images: ImageSet, half: torch.Tensor) -> RmfnState:
        """Search, assign, refine: poses and half maps from random starts."""
        found = self.search(images)
        with torch.no_grad():
            volume = found.network.volume(0)
        return self._from(volume, found.network, images, half)

    def from_map(self, images: ImageSet, half: torch.Tensor, volume: torch.Tensor) -> RmfnState:
        """Assign and refine, with a given map in place of the search's."""
        config, box = self.config, images.plane.box
        scaled = scaled_to_images(volume, images, config)
        band = config.search_band(box)
        rows = torch.arange(len(images))[:: max(1, len(images) // _HELD_OUT)]
        grid = so3_grid(config.search_nside, torch.float32)[0]
        offsets = offsets_for(config, box, band)
        mean, error = evidence(images.select(rows, band), scaled, grid, offsets)
        self.job.say(f"the map given explains images with log-evidence {mean:.2f} an image")
        if mean <= _SURE * error:
            raise CryoreconError(
                f"The map of --init-map explains the images no better than an empty one "
                f"(log-evidence {mean:.2f} +- {error:.2f})",
                "It must be white on black, of this particle; or leave it out and search",
            )
        network = new_map(config, box, self.generator, self.mask)
        return self._from(scaled, network, images, half)

    def _from(
        self,
        volume: torch.Tensor,
        network: NetworkMap | GridMap,
        images: ImageSet,
        half: torch.Tensor,
    ) -> RmfnState:
        with stage_bar(self.job.console, "Assigning", len(images)) as bar:
            state = assign(volume, network, images, half, self.config, self.generator, bar)
        self.job.say("every image has a first pose")
        self.refine(state, images)
        return state

    def search(self, images: ImageSet) -> Search:
        """Run the starts and keep the likeliest."""
        config, box = self.config, images.plane.box
        n_held = min(_HELD_OUT, len(images) // 5)
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
        if best.held_out_evidence <= _SURE * best.held_out_error:
            raise CryoreconError(
                f"No signal found: images that were held out fit the map no better than an empty "
                f"one (log-evidence {best.held_out_evidence:.2f} +- {best.held_out_error:.2f})",
                "Check pixel size, CTF and --diameter, or give more particles",
            )
        return best

    def refine(self, state: RmfnState, images: ImageSet) -> None:
        """Rounds against the half maps until they settle, then against the joint map."""
        number, search_after = 0, _FIRST_NEW_SEARCH
        while number < self.config.half_rounds:
            if number == search_after:
                share = self.search_again(state, images)
                search_after = number + 2 if share > _ENOUGH_FOUND else -1
            number += 1
            moved = self.round(state, images, number, joint=False)
            if moved < self.config.settled_deg and search_after < 0:
                break
        self.finish(state, images, number)

    def finish(self, state: RmfnState, images: ImageSet, number: int) -> None:
        """Rounds against the map of all images."""
        state.half_poses = state.rotations.clone(), state.offsets_px.clone()
        for joint in range(self.config.joint_rounds):
            self.round(state, images, number + joint + 1, joint=True)

    def search_again(self, state: RmfnState, images: ImageSet) -> float:
        """Every image against the better map; the share that found a better pose."""
        with stage_bar(self.job.console, "Searching again", len(images)) as bar:
            share = reassign(state, images, self.config, self.generator, bar)
        self.job.say(f"searched again: {100 * share:.1f} % of the images found a better pose")
        return share

    def round(self, state: RmfnState, images: ImageSet, number: int, *, joint: bool) -> float:
        """One round; degrees that the poses moved, or infinity while the band still grows."""
        box = images.plane.box
        band_angst = self._angst(state.band, box)
        title = f"Refining {'all' if joint else 'halves'} at {band_angst:.2f} A"
        with stage_bar(self.job.console, title, len(images)) as bar:
            report = refine_round(
                state,
                images,
                self.config,
                fsc_curve,
                joint=joint,
                n_steps=8 if number == 1 else 4,
                progress=bar,
            )
        self.job.say(
            f"round {number} ({'joint' if joint else 'half'} maps) at {band_angst:.2f} A: "
            f"log-likelihood {report.log_likelihood:.2f}, poses moved "
            f"{report.pose_change_deg:.2f} deg and {report.offset_change_px:.2f} px, half maps "
            f"agree to {self._angst(report.agreement_band, box):.2f} A"
        )
        return report.pose_change_deg if state.band <= report.band else float("inf")

    def independent_halves(self, images: ImageSet, half: torch.Tensor) -> RmfnState:
        """Each half set from scratch on its own, the second moved onto the first.

        Rounds against the joint map follow; half maps and FSC are those from before them.
        """
        n = len(images)
        runs: list[RmfnState] = []
        rows = [torch.nonzero(half == number)[:, 0] for number in (0, 1)]
        for number, mine in enumerate(rows):
            self.job.say(f"half set {number + 1}, {len(mine)} images, by itself")
            quarters = torch.randperm(len(mine), generator=self.generator) % 2
            own = images.apart(mine)
            runs.append(self.from_scratch(own, quarters))
            images.gain[mine] = own.gain
        self._move_second(runs)
        state = RmfnState(
            torch.empty(n, 3, 3),
            torch.empty(n, 2),
            half,
            [run.maps[0] for run in runs],
            min(run.band for run in runs),
            runs[0].network,
        )
        for mine, run in zip(rows, runs, strict=True):
            state.rotations[mine], state.offsets_px[mine] = run.rotations, run.offsets_px
        refine_round(state, images, self.config, fsc_curve, joint=False, n_steps=0)
        self._take_out_chance(state)
        self.finish(state, images, 0)
        return state

    def _take_out_chance(self, state: RmfnState) -> None:
        """Correct the half maps' FSC for what aligning one to the other brought."""
        box = state.maps[0].shape[-1]
        mask = state.network.support.on(box)
        first, second = half_maps(state, box)
        chance = chance_fsc(second, first, mask, self.pixel_size_angst, self.generator)
        state.chance, state.fsc = chance, beyond_chance(state.fsc, chance)
        self.job.say(
            f"noise aligned in place of half set 2 would agree with an FSC of up to "
            f"{float(chance[1:].max()):.2f}, which is taken out"
        )

    def symmetrise(self, state: RmfnState, images: ImageSet, name: str) -> None:
        """Find the axes in the map, move poses onto them, and finish with every image's copies.

        The half maps are made anew from the poses before any joint round.
        """
        box, group = images.plane.box, symmetry_group(name)
        limit = agreement_band(state.fsc, _SYMMETRY_FSC)
        fit = find_symmetry((state.maps[0] + state.maps[1]) / 2, group, limit)
        self.job.say(
            f"{name}: turned copies of the map correlate {fit.correlation:.2f} up to "
            f"{self._angst(fit.band, box):.1f} A (1: symmetric, 0: not)"
        )
        if fit.correlation < _DOUBTFUL:
            self.job.say(f"WARNING: the map hardly has {name}; see initial_model_C1.mrc")
        rotations, origins = state.half_poses or (state.rotations, state.offsets_px)
        poses = rotate_poses(rotations.double(), fit.rotation)
        offsets = shift_origins(origins.double(), poses, fit.shift_px)
        state.rotations, state.offsets_px = poses.float(), offsets.float()
        state.group = group.float()
        refine_round(state, images, self.config, fsc_curve, joint=False, n_steps=0)
        if state.chance is not None:
            state.fsc = beyond_chance(state.fsc, state.chance)
        self.finish(state, images, 0)

    def _move_second(self, runs: list[RmfnState]) -> None:
        first, second = runs
        found = align_maps(second.maps[0], first.maps[0], self.pixel_size_angst)
        self.job.say(
            f"half set 2 moved onto half set 1{', as its mirror image' if found.flipped else ''}"
        )
        poses = second.rotations.double()
        poses = mirror_poses(poses) if found.flipped else poses
        poses = rotate_poses(poses, found.rotation.double())
        offsets = shift_origins(second.offsets_px.double(), poses, found.shift_px.double())
        second.rotations, second.offsets_px = poses.float(), offsets.float()

    def _angst(self, shell: float, box: int) -> float:
        return shell_to_angst(shell, box, self.pixel_size_angst)
