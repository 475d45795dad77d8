"""The parts of an ab initio run, each kept so that a continued job takes it up where it was."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import Reconstruction, RefineConfig
from cryorecon.engines.rivals import Rivals
from cryorecon.image_table import kept
from cryorecon.physics.masks import Support
from cryorecon.run.checkpoint import Entry
from cryorecon.run.job import Job

# All images are searched again after this round.
FIRST_NEW_SEARCH = 3
# What a state is made anew with, or kept as tables.
_NOT_KEPT = ("support", "rivals")
HALF_SETS = ("half set 1", "half set 2")


@dataclass
class Place:
    """How far the rounds of a part of the run have come.

    Attributes
    ----------
    number : int
        Rounds against half maps that are done.
    search_after : int
        Round after which images are searched again; -1: no more.
    settled : bool
        Whether the half maps' rounds have ended.
    joint : int
        Rounds against the joint map that are done; -1 before they begin.
    joint_settled : bool
        Whether poses have stopped moving in them.
    done : bool
    likelihood, searched_at : float
        Mean log-likelihood in the last round, and in the one before the last new search.
    """

    number: int = 0
    search_after: int = FIRST_NEW_SEARCH
    settled: bool = False
    joint: int = -1
    joint_settled: bool = False
    done: bool = False
    likelihood: float = 0.0
    searched_at: float = 0.0


@dataclass
class Parts(ABC):
    """One run's surroundings: where it logs, its settings and its random numbers.

    A run goes through parts: "map", or "half set 1", "half set 2" and "both"; then "all" if
    others than the first images join, and "symmetry". Each part has one entry of the job's
    checkpoint, so that a continued job takes up the part that it was in.

    Attributes
    ----------
    part : str
        The one that is going on.
    first_alike : Tensor, shape (n,), int64, optional
        First particle that is the same, of each; None if all differ.
    axes_follow : bool
        Whether a symmetric part follows: poses are searched anew there alone, since what is found
        in a map that is not symmetric yet are mostly copies.
    """

    job: Job
    config: RefineConfig
    generator: torch.Generator
    pixel_size_angst: float
    mask: torch.Tensor | None = None
    part: str = "map"
    first_alike: torch.Tensor | None = None
    axes_follow: bool = False

    @abstractmethod
    def engine_state(self) -> Entry:
        """What the engine itself holds once every image has a pose, by reference."""

    @abstractmethod
    def load_engine(self, state: Entry, images: ImageSet) -> None:
        """Go on from what :meth:`engine_state` gave."""

    def go_through(
        self,
        part: str,
        images: ImageSet,
        begin: Callable[[], Reconstruction],
        work: Callable[[Reconstruction, ImageSet, Place], None],
        instead_of: tuple[str, ...] = (),
    ) -> Reconstruction:
        """Go through a part of the run, from its beginning or from where it was left.

        Parameters
        ----------
        begin : callable
            Gives the state that the part starts from; may go through other parts.
        work : callable
            What is done with it, step by step.
        instead_of : tuple of str
            Parts that need not be kept from then on.
        """
        checkpoint = self.job.checkpoint
        self.part = part
        saved = checkpoint.get(part)
        if saved is not None and "state" in saved:
            state, place = self._unpack(saved, images)
        else:
            state = begin()
            place = Place(search_after=-1 if self.axes_follow else FIRST_NEW_SEARCH)
            self.part = part
            checkpoint.drop(*instead_of)
            self.save(state, images, place, force=True)
        if not place.done:
            work(state, images, place)
            place.done = True
            self.save(state, images, place, force=True)
        return state

    def save(
        self, state: Reconstruction, images: ImageSet, place: Place, *, force: bool = False
    ) -> None:
        """Keep the state of the part that is going on, if it is time to."""

        def pack() -> Entry:
            names = [f.name for f in dataclasses.fields(state) if f.name not in _NOT_KEPT]
            return {
                "state": {name: getattr(state, name) for name in names},
                "rivals": list(state.rivals.tables()),
                "place": dataclasses.asdict(place),
                "noise_power": images.noise_power,
                "gain": images.gain,
                "engine": self.engine_state(),
                "generator": self.generator.get_state(),
            }

        hold = place.done and self.part in HALF_SETS
        self.job.checkpoint.put(self.part, pack, force=force, hold=hold)

    def _unpack(self, saved: Entry, images: ImageSet) -> tuple[Reconstruction, Place]:
        images.noise_power.copy_(saved["noise_power"])
        images.gain.copy_(saved["gain"])
        self.load_engine(saved["engine"], images)
        self.generator.set_state(saved["generator"])
        place = Place(**saved["place"])
        state = Reconstruction(**saved["state"], support=self.support)
        state.rotations, state.offsets_px = kept(state.rotations), kept(state.offsets_px)
        state.log_likelihood = kept(state.log_likelihood)
        state.rivals = Rivals(*saved["rivals"]).copied()
        if state.half_poses is not None:
            state.half_poses = kept(state.half_poses[0]), kept(state.half_poses[1])
        state.maps = [volume.to(images.device) for volume in state.maps]
        state.halves = [volume.to(images.device) for volume in state.halves]
        what = "done" if place.done else f"{place.number} rounds done"
        joint = f", {place.joint} of them joint" if place.joint > 0 and not place.done else ""
        self.job.say(f"{self.part}: taken from the checkpoint, {what}{joint}")
        return state, place

    @property
    def support(self) -> Support:
        """Where maps may have density."""
        return Support(self.config.diameter / 2, self.mask)
