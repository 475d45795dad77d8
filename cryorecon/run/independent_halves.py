"""Half sets from scratch, each on its own, and how they come together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import Reconstruction
from cryorecon.engines.rivals import PosePair
from cryorecon.engines.rounds import refine_round
from cryorecon.image_table import image_table
from cryorecon.maps.align import align_maps
from cryorecon.maps.chance import beyond_chance, chance_fsc
from cryorecon.maps.fsc import fsc_curve
from cryorecon.maps.poses import mirror_poses, rotate_poses, shift_origins
from cryorecon.ranks import Ranks
from cryorecon.run.checkpoint import frozen
from cryorecon.run.parts import HALF_SETS
from cryorecon.run.refining import Refining


@dataclass
class HalfSets(Refining):
    """What runs go through whose half sets must not see each other."""

    @abstractmethod
    def from_scratch(
        self, images: ImageSet, half: torch.Tensor, part: str = "map"
    ) -> Reconstruction:
        """Poses and half maps from random starts."""

    def independent_halves(self, images: ImageSet, half: torch.Tensor) -> Reconstruction:
        """Each half set from scratch on its own, the second moved onto the first.

        Rounds against the joint map follow; half maps and FSC are those from before them.
        """

        def begin() -> Reconstruction:
            return self._both_halves(images, half)

        return self.go_through("both", images, begin, self.finish, instead_of=HALF_SETS)

    def _both_halves(self, images: ImageSet, half: torch.Tensor) -> Reconstruction:
        runs = self._each(images, half)
        aligned = runs[1].maps[0], runs[0].maps[0]
        self._move_second(runs, images.ranks)
        state = self._together(runs, images, half)
        self._take_out_chance(state, aligned)
        return state

    def _each(self, images: ImageSet, half: torch.Tensor) -> list[Reconstruction]:
        """Both half sets from scratch: one after the other, or each by half of the processes."""
        rows = [torch.nonzero(half == number)[:, 0] for number in (0, 1)]
        seeds = torch.randint(2**62, (2,), generator=self.generator).tolist()

        def one(number: int, ranks: Ranks) -> Reconstruction:
            mine, drawn = rows[number], torch.Generator().manual_seed(seeds[number])
            self.job.say(f"half set {number + 1}, {len(mine)} images, by itself")
            own = images.apart(mine, ranks)
            generator, self.generator = self.generator, drawn
            run = self.from_scratch(own, self._quarters(mine), HALF_SETS[number])
            self.generator = generator
            images.gain[mine] = own.gain
            return run

        if images.ranks.count > 1:
            return self._at_once(images, rows, one)
        first = one(0, images.ranks)
        # The run goes on with what the engine has learned of the first half set, as the process
        # does that writes where there are several.
        engine = frozen(self.engine_state())
        second = one(1, images.ranks)
        self.load_engine(engine, images)
        return [first, second]

    def _quarters(self, mine: torch.Tensor) -> torch.Tensor:
        """A half set's halves, drawn at random; particles that are the same are in one."""
        first = mine if self.first_alike is None else self.first_alike[mine]
        shown, image = first.unique(return_inverse=True)
        return (torch.randperm(len(shown), generator=self.generator) % 2)[image]

    def _at_once(
        self,
        images: ImageSet,
        rows: list[torch.Tensor],
        one: Callable[[int, Ranks], Reconstruction],
    ) -> list[Reconstruction]:
        """Both half sets, each by a team of processes; all learn what both found."""
        ranks, job, box = images.ranks, self.job, images.plane.box
        number, team = ranks.split()
        job.say("both half sets at the same time, each by half of the processes")
        self.job = job.for_team(number, team)
        run = one(number, team)
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

    def _together(
        self, runs: list[Reconstruction], images: ImageSet, half: torch.Tensor
    ) -> Reconstruction:
        """Both half sets in one table, and their half maps."""
        n = len(images)
        maps, band = [run.maps[0] for run in runs], min(run.band for run in runs)
        rotations, offsets = image_table(n, 3, 3), image_table(n, 2)
        state = Reconstruction(rotations, offsets, half, maps, band, self.support)
        for number, run in enumerate(runs):
            mine = torch.nonzero(half == number)[:, 0]
            state.rotations[mine], state.offsets_px[mine] = run.rotations, run.offsets_px
            state.rivals.put(mine, run.rivals)
        state.offset_range = max(run.offset_range for run in runs)
        refine_round(state, images, self.config, fsc_curve, joint=False, n_steps=0)
        return state

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
