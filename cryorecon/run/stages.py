"""The stages that every ab initio run goes through, told to the log as they go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from cryorecon.conventions import shell_to_angst
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import Reconstruction, RefineConfig, best_grid_poses
from cryorecon.engines.rounds import (
    RoundReport,
    agreement_band,
    half_maps,
    reassign,
    refine_round,
)
from cryorecon.errors import CryoreconError
from cryorecon.maps.align import align_maps
from cryorecon.maps.chance import beyond_chance, chance_fsc
from cryorecon.maps.fsc import fsc_curve
from cryorecon.maps.poses import mirror_poses, rotate_poses, shift_origins
from cryorecon.maps.symmetry import find_symmetry
from cryorecon.physics.fourier import lowpass
from cryorecon.physics.masks import Support
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
# Images that the engines do not learn from: do they tell the map from nothing, by this many
# standard errors?
HELD_OUT = 200
_SURE = 3.0


def beyond_noise(log_evidence: float, error: float) -> bool:
    """Whether images fit a map surely better than an empty one."""
    return log_evidence > _SURE * error


def refuse_noise(log_evidence: float, error: float) -> None:
    """Stop a run whose map explains held-out images no better than nothing does.

    Raises
    ------
    CryoreconError
    """
    if not beyond_noise(log_evidence, error):
        raise CryoreconError(
            f"No signal found: images that were held out fit the map no better than an empty "
            f"one (log-evidence {log_evidence:.2f} +- {error:.2f})",
            "Check pixel size, CTF and --diameter, or give more particles",
        )


@dataclass
class Stages(ABC):
    """One run's surroundings: where it logs, its settings and its random numbers.

    Attributes
    ----------
    part : str
        What ``rounds.star`` puts before the stage's name: rounds are counted anew in each part.
    """

    job: Job
    config: RefineConfig
    generator: torch.Generator
    pixel_size_angst: float
    mask: torch.Tensor | None = None
    part: str = ""

    @abstractmethod
    def begin(self, images: ImageSet, half: torch.Tensor) -> Reconstruction:
        """A first pose of every image and a coarse map, from nothing."""

    def from_scratch(self, images: ImageSet, half: torch.Tensor) -> Reconstruction:
        """Poses and half maps from random starts."""
        state = self.begin(images, half)
        self.refine(state, images)
        return state

    def scale_maps(self, joint: torch.Tensor) -> list[torch.Tensor]:
        """Maps of an engine's scales, coarse to fine; none where it has none."""
        del joint
        return []

    @property
    def support(self) -> Support:
        """Where maps may have density."""
        return Support(self.config.diameter / 2, self.mask)

    def refine(self, state: Reconstruction, images: ImageSet) -> None:
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

    def finish(self, state: Reconstruction, images: ImageSet, number: int) -> None:
        """Rounds against the map of all images."""
        state.half_poses = state.rotations.clone(), state.offsets_px.clone()
        for joint in range(self.config.joint_rounds):
            self.round(state, images, number + joint + 1, joint=True)

    def keep(self, state: Reconstruction, images: ImageSet, *, halves: bool = True) -> None:
        """Maps from the poses as they are; half maps and their FSC too unless told otherwise."""
        state.half_poses = state.rotations.clone(), state.offsets_px.clone()
        with stage_bar(self.job.console, "Averaging", len(images)) as bar:
            for joint in (False, True) if halves else (True,):
                refine_round(
                    state, images, self.config, fsc_curve, joint=joint, n_steps=0, progress=bar
                )

    def extend(
        self,
        state: Reconstruction,
        images: ImageSet,
        half: torch.Tensor,
        rows: torch.Tensor,
        *,
        refine: bool,
    ) -> Reconstruction:
        """Poses of all images, once some of them have made a map.

        Parameters
        ----------
        state : Reconstruction
            Of some images.
        images : ImageSet
            All of them.
        half : Tensor, shape (n,), int64
        rows : Tensor, int64
            Which of all images `state` has.
        refine : bool
            Whether all poses are refined, as after a search: against the coarse map that they
            share at first, then half set against half set.
        """
        others = torch.ones(len(images), dtype=torch.bool)
        others[rows] = False
        rest = torch.nonzero(others)[:, 0]
        rotations, offsets = torch.empty(len(images), 3, 3), torch.empty(len(images), 2)
        rotations[rows], offsets[rows] = state.half_poses or (state.rotations, state.offsets_px)
        rotations[rest], offsets[rest] = self.read_poses(images.apart(rest), state)
        band = float(self.config.assign_band(images.plane.box))
        coarse = lowpass((state.maps[0] + state.maps[1]) / 2, band, 3)
        self.part = "all-particles-"
        full = Reconstruction(rotations, offsets, half, [coarse, coarse], band, self.support)
        (self.refine if refine else self.keep)(full, images)
        return full

    def read_poses(
        self, images: ImageSet, state: Reconstruction
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Poses of images that took no part, by a search against the map."""
        config, box = self.config, images.plane.box
        band = config.assign_band(box)
        joint = (state.maps[0] + state.maps[1]) / 2
        nside = config.search_nside + 1
        with stage_bar(self.job.console, "Assigning", len(images)) as bar:
            return best_grid_poses(images.within(band), joint, config, nside, self.generator, bar)

    def search_again(self, state: Reconstruction, images: ImageSet) -> float:
        """Every image against the better map; the share that found a better pose."""
        with stage_bar(self.job.console, "Searching again", len(images)) as bar:
            share = reassign(state, images, self.config, self.generator, bar)
        self.job.say(f"searched again: {100 * share:.1f} % of the images found a better pose")
        return share

    def round(self, state: Reconstruction, images: ImageSet, number: int, *, joint: bool) -> float:
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
        stage = f"{self.part}{'joint-map' if joint else 'half-maps'}"
        self.job.record_round(stage, number, self._measured(report, box))
        return report.pose_change_deg if state.band <= report.band else float("inf")

    def _measured(self, report: RoundReport, box: int) -> dict[str, float]:
        """A round's row of ``rounds.star``."""
        return {
            "cryoreconResolutionUsed": self._angst(report.band, box),
            "cryoreconPoseChange": report.pose_change_deg,
            "cryoreconOffsetChangeAngst": report.offset_change_px * self.pixel_size_angst,
            "cryoreconLogLikelihood": report.log_likelihood,
            "cryoreconHalfMapResolution": self._angst(report.agreement_band, box),
        }

    def independent_halves(self, images: ImageSet, half: torch.Tensor) -> Reconstruction:
        """Each half set from scratch on its own, the second moved onto the first.

        Rounds against the joint map follow; half maps and FSC are those from before them.
        """
        n = len(images)
        runs: list[Reconstruction] = []
        rows = [torch.nonzero(half == number)[:, 0] for number in (0, 1)]
        for number, mine in enumerate(rows):
            self.job.say(f"half set {number + 1}, {len(mine)} images, by itself")
            quarters = torch.randperm(len(mine), generator=self.generator) % 2
            own = images.apart(mine)
            self.part = f"half-set-{number + 1}-"
            runs.append(self.from_scratch(own, quarters))
            images.gain[mine] = own.gain
        self.part = ""
        self._move_second(runs)
        state = Reconstruction(
            torch.empty(n, 3, 3),
            torch.empty(n, 2),
            half,
            [run.maps[0] for run in runs],
            min(run.band for run in runs),
            runs[0].support,
        )
        for mine, run in zip(rows, runs, strict=True):
            state.rotations[mine], state.offsets_px[mine] = run.rotations, run.offsets_px
        refine_round(state, images, self.config, fsc_curve, joint=False, n_steps=0)
        self._take_out_chance(state)
        self.finish(state, images, 0)
        return state

    def _take_out_chance(self, state: Reconstruction) -> None:
        """Correct the half maps' FSC for what aligning one to the other brought."""
        box = state.maps[0].shape[-1]
        mask = state.support.on(box)
        first, second = half_maps(state, box)
        chance = chance_fsc(second, first, mask, self.pixel_size_angst, self.generator)
        state.chance, state.fsc = chance, beyond_chance(state.fsc, chance)
        self.job.say(
            f"noise aligned in place of half set 2 would agree with an FSC of up to "
            f"{float(chance[1:].max()):.2f}, which is taken out"
        )

    def symmetrise(self, state: Reconstruction, images: ImageSet, name: str) -> None:
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
        self.part = "symmetric-"
        self.finish(state, images, 0)

    def _move_second(self, runs: list[Reconstruction]) -> None:
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
