"""The stages that every ab initio run goes through, told to the log as they go."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cryorecon.engines.half_maps import agreement_band
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import (
    Reconstruction,
    best_grid_poses,
    telling_grid,
    with_room,
)
from cryorecon.engines.rivals import PosePair
from cryorecon.engines.rounds import refine_round
from cryorecon.errors import CryoreconError
from cryorecon.image_table import image_table, kept
from cryorecon.maps.chance import beyond_chance
from cryorecon.maps.fsc import fsc_curve
from cryorecon.maps.poses import rotate_poses, shift_origins
from cryorecon.maps.symmetry import find_symmetry
from cryorecon.physics.fourier import lowpass
from cryorecon.physics.symmetry import symmetry_group
from cryorecon.run.independent_halves import HalfSets
from cryorecon.run.parts import Place

# The axes are looked for where half maps agree by more than this; copies that correlate less are
# doubtful.
_SYMMETRY_FSC = 0.5
_DOUBTFUL = 0.5
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
class Stages(HalfSets):
    """What runs of all engines go through."""

    @abstractmethod
    def begin(self, images: ImageSet, half: torch.Tensor) -> Reconstruction:
        """A first pose of every image and a coarse map, from nothing."""

    def from_scratch(
        self, images: ImageSet, half: torch.Tensor, part: str = "map"
    ) -> Reconstruction:
        """Poses and half maps from random starts."""
        return self.go_through(part, images, lambda: self.begin(images, half), self.refine)

    def scale_maps(self, joint: torch.Tensor) -> list[torch.Tensor]:
        """Maps of an engine's scales, coarse to fine; none where it has none."""
        del joint
        return []

    def extend(
        self,
        first: Callable[[], Reconstruction],
        images: ImageSet,
        half: torch.Tensor,
        rows: torch.Tensor,
        *,
        refine: bool,
    ) -> Reconstruction:
        """Poses of all images, once some of them have made a map.

        Parameters
        ----------
        first : callable
            Gives the state of some images.
        images : ImageSet
            All of them.
        half : Tensor, shape (n,), int64
        rows : Tensor, int64
            Which of all images `first` has.
        refine : bool
            Whether all poses are refined, as after a search: against the coarse map that they
            share at first, then half set against half set.
        """

        def begin() -> Reconstruction:
            return self._joined(first(), images, half, rows)

        work = self.refine if refine else self._keep_part
        return self.go_through("all", images, begin, work, instead_of=("map",))

    def _joined(
        self, state: Reconstruction, images: ImageSet, half: torch.Tensor, rows: torch.Tensor
    ) -> Reconstruction:
        others = torch.ones(len(images), dtype=torch.bool)
        others[rows] = False
        rest = torch.nonzero(others)[:, 0]
        rotations, offsets = image_table(len(images), 3, 3), image_table(len(images), 2)
        rotations[rows], offsets[rows] = state.half_poses or (state.rotations, state.offsets_px)
        rotations[rest], offsets[rest] = self.read_poses(images.apart(rest), state)
        band = float(self.config.assign_band(images.plane.box))
        coarse = lowpass((state.maps[0] + state.maps[1]) / 2, band, 3)
        joined = Reconstruction(rotations, offsets, half, [coarse, coarse], band, self.support)
        joined.rivals.put(rows, state.rivals)
        joined.offset_range = state.offset_range
        return joined

    def _keep_part(self, state: Reconstruction, images: ImageSet, place: Place) -> None:
        del place
        self.keep(state, images)

    def read_poses(
        self, images: ImageSet, state: Reconstruction
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Poses of images that took no part, by a search against the map."""
        joint = (state.maps[0] + state.maps[1]) / 2
        config = with_room(self.config, state, images.plane.box)
        grid = telling_grid(images, joint, config, agreement_band(state.fsc))
        with self.job.bar("Assigning", len(images)) as bar:
            return best_grid_poses(images, joint, config, grid, self.generator, bar)

    def symmetrise(
        self,
        first: Callable[[], Reconstruction],
        images: ImageSet,
        name: str,
        *,
        independent: bool,
    ) -> Reconstruction:
        """Find the axes in the map, move poses onto them, and go on with every image's copies.

        The half maps are made anew from the poses before any joint round.

        Parameters
        ----------
        first : callable
            Gives the state without symmetry.
        independent : bool
            Whether half sets have not seen each other: then neither is searched in the other's map.
        """

        def begin() -> Reconstruction:
            self.axes_follow = not independent
            state = first()
            self.axes_follow = False
            return self._on_axes(state, images, name)

        work = self.finish if independent else self.refine
        return self.go_through("symmetry", images, begin, work, ("map", "all", "both"))

    def _on_axes(self, state: Reconstruction, images: ImageSet, name: str) -> Reconstruction:
        group = symmetry_group(name)
        if images.ranks.first:
            self._turn(state, group, name)
        images.ranks.same(state.rotations, state.offsets_px, *state.rivals.tables())
        state.group = group.float()
        refine_round(state, images, self.config, fsc_curve, joint=False, n_steps=0)
        if state.chance is not None:
            state.fsc = beyond_chance(state.fsc, state.chance)
        return state

    def _turn(self, state: Reconstruction, group: torch.Tensor, name: str) -> None:
        """Move the poses from before any joint round onto the axes that the map shows."""
        box = state.maps[0].shape[-1]
        limit = agreement_band(state.fsc, _SYMMETRY_FSC)
        fit = find_symmetry((state.maps[0] + state.maps[1]) / 2, group, limit)
        self.job.say(
            f"{name}: turned copies of the map correlate {fit.correlation:.2f} up to "
            f"{self._angst(fit.band, box):.1f} A (1: symmetric, 0: not)"
        )
        if fit.correlation < _DOUBTFUL:
            self.job.say(f"WARNING: the map hardly has {name}; see initial_model_C1.mrc")

        def move(rotations: torch.Tensor, offsets_px: torch.Tensor) -> PosePair:
            poses = rotate_poses(rotations.double(), fit.rotation.cpu())
            return poses, shift_origins(offsets_px.double(), poses, fit.shift_px.cpu())

        poses = move(*(state.half_poses or (state.rotations, state.offsets_px)))
        state.rotations, state.offsets_px = map(kept, poses)
        state.rivals.move(move)
        state.rivals.fold(state.rotations, group)
