"""The stages that every ab initio run goes through, told to the log as they go."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import (
    Reconstruction,
    best_grid_poses,
    telling_grid,
    with_room,
)
from cryorecon.engines.rivals import PosePair
from cryorecon.engines.rounds import agreement_band, refine_round
from cryorecon.errors import CryoreconError
from cryorecon.image_table import image_table, kept
from cryorecon.maps.align import align_maps
from cryorecon.maps.chance import beyond_chance, chance_fsc
from cryorecon.maps.fsc import fsc_curve
from cryorecon.maps.poses import mirror_poses, rotate_poses, shift_origins
from cryorecon.maps.symmetry import find_symmetry
from cryorecon.physics.fourier import lowpass
from cryorecon.physics.symmetry import symmetry_group
from cryorecon.ranks import Ranks
from cryorecon.run.parts import HALF_SETS, Place
from cryorecon.run.refining import Refining

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
class Stages(Refining):
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

    def independent_halves(self, images: ImageSet, half: torch.Tensor) -> Reconstruction:
        """Each half set from scratch on its own, the second moved onto the first.

        Rounds against the joint map follow; half maps and FSC are those from before them.
        """

        def begin() -> Reconstruction:
            return self._both_halves(images, half)

        return self.go_through("both", images, begin, self.finish, instead_of=HALF_SETS)

    def _both_halves(self, images: ImageSet, half: torch.Tensor) -> Reconstruction:
        rows = [torch.nonzero(half == number)[:, 0] for number in (0, 1)]
        seeds = torch.randint(2**62, (2,), generator=self.generator).tolist()
        if images.ranks.count == 1:
            runs = [self._one_half(k, images, rows[k], seeds[k], images.ranks) for k in (0, 1)]
        else:
            runs = self._halves_at_once(images, rows, seeds)
        aligned = runs[1].maps[0], runs[0].maps[0]
        self._move_second(runs, images.ranks)
        n = len(images)
        maps, band = [run.maps[0] for run in runs], min(run.band for run in runs)
        rotations, offsets = image_table(n, 3, 3), image_table(n, 2)
        state = Reconstruction(rotations, offsets, half, maps, band, self.support)
        for mine, run in zip(rows, runs, strict=True):
            state.rotations[mine], state.offsets_px[mine] = run.rotations, run.offsets_px
            state.rivals.put(mine, run.rivals)
        state.offset_range = max(run.offset_range for run in runs)
        refine_round(state, images, self.config, fsc_curve, joint=False, n_steps=0)
        self._take_out_chance(state, aligned)
        return state

    def _one_half(
        self, number: int, images: ImageSet, mine: torch.Tensor, seed: int, ranks: Ranks
    ) -> Reconstruction:
        """A half set from scratch, with random numbers of its own."""
        self.job.say(f"half set {number + 1}, {len(mine)} images, by itself")
        generator, self.generator = self.generator, torch.Generator().manual_seed(seed)
        first = mine if self.first_with_image is None else self.first_with_image[mine]
        shown, image = first.unique(return_inverse=True)
        quarters = (torch.randperm(len(shown), generator=self.generator) % 2)[image]
        own = images.apart(mine, ranks)
        run = self.from_scratch(own, quarters, HALF_SETS[number])
        images.gain[mine] = own.gain
        self.generator = generator
        return run

    def _halves_at_once(
        self, images: ImageSet, rows: list[torch.Tensor], seeds: list[int]
    ) -> list[Reconstruction]:
        """Both half sets from scratch, each by a team of processes; all learn what both found."""
        ranks, job, box = images.ranks, self.job, images.plane.box
        number, team = ranks.split()
        job.say("both half sets at the same time, each by half of the processes")
        self.job = job.for_team(number, team)
        run = self._one_half(number, images, rows[number], seeds[number], team)
        self.job = job
        runs = []
        for k, source in enumerate((0, ranks.count // 2)):
            n = len(rows[k])
            blank = image_table(n, 3, 3), image_table(n, 2), torch.zeros(n, dtype=torch.int64)
            nothing = torch.empty(box, box, box, device=images.device)
            other = Reconstruction(*blank, [nothing] * 2, 0.0, self.support)
            found = run if k == number else other
            gain = images.gain[rows[k]]
            poses = found.rotations, found.offsets_px, *found.rivals.tables()
            ranks.same(*poses, found.maps[0], gain, source=source)
            found.band, found.offset_range = ranks.numbers(
                found.band, found.offset_range, source=source
            )
            images.gain[rows[k]] = gain
            runs.append(found)
        job.hear(ranks.count // 2)
        return runs

    def _take_out_chance(
        self, state: Reconstruction, aligned: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Correct the half maps' FSC for what aligning one to the other brought.

        Parameters
        ----------
        aligned : tuple of two Tensors, shape (N, N, N)
            The second half set's map and the first's, as they were aligned.
        """
        joint = state.maps[0]
        ranks, mask = self.job.ranks, state.support.on(joint.shape[-1], device=joint.device)
        first, second = state.halves
        chance, drawn = torch.empty_like(state.fsc), self.generator.get_state()
        if ranks.first:
            chance = chance_fsc(
                second, first, mask, self.pixel_size_angst, self.generator, aligned=aligned
            )
            drawn = self.generator.get_state()
        ranks.same(chance, drawn)
        self.generator.set_state(drawn)
        state.chance, state.fsc = chance, beyond_chance(state.fsc, chance)
        self.job.say(
            f"noise aligned in place of half set 2 would agree with an FSC of up to "
            f"{float(chance[1:].max()):.2f}, which is taken out"
        )

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

    def _move_second(self, runs: list[Reconstruction], ranks: Ranks) -> None:
        first, second = runs
        if ranks.first:
            self._moved(second, first)
        ranks.same(second.rotations, second.offsets_px, *second.rivals.tables())

    def _moved(self, second: Reconstruction, first: Reconstruction) -> None:
        found = align_maps(second.maps[0], first.maps[0], self.pixel_size_angst)
        self.job.say(
            f"half set 2 moved onto half set 1{', as its mirror image' if found.flipped else ''}"
        )

        def move(rotations: torch.Tensor, offsets_px: torch.Tensor) -> PosePair:
            poses = rotations.double()
            poses = mirror_poses(poses) if found.flipped else poses
            poses = rotate_poses(poses, found.rotation.double().cpu())
            offsets = shift_origins(offsets_px.double(), poses, found.shift_px.double().cpu())
            return poses.float(), offsets.float()

        second.rotations, second.offsets_px = move(second.rotations, second.offsets_px)
        second.rivals.move(move)
