"""How engine amortized begins: an encoder and a decoder are trained, then poses are read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from cryorecon.engines.amortized import Amortized, AmortizedConfig, StepReport
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import (
    TOLD_APART,
    Reconstruction,
    RefineConfig,
    offsets_for,
)
from cryorecon.engines.rmfn import RmfnConfig, Search
from cryorecon.engines.search import evidence
from cryorecon.engines.shrinking import ShrinkingBatch
from cryorecon.errors import CryoreconError
from cryorecon.image_table import kept
from cryorecon.physics.masks import on_centre
from cryorecon.physics.rotations import so3_grid
from cryorecon.run.checkpoint import Entry
from cryorecon.run.climbing import Climb, ClimbingStages
from cryorecon.run.parts import Place
from cryorecon.run.stages import refuse_noise

_READ_AT_ONCE = 500
# Lines of the log that the training takes.
_LINES = 8


@dataclass
class AmortizedStages(ClimbingStages):
    """A run of engine amortized.

    Attributes
    ----------
    trained : Amortized
        Of the last training.
    read : tuple of Tensor
        Rotations and offsets as the encoder read them at the end of the last training.
    hard : bool
        Whether the encoder cannot tell poses apart, so that its map was searched on from.
    """

    config: AmortizedConfig
    trained: Amortized | None = None
    read: tuple[torch.Tensor, torch.Tensor] | None = None
    hard: bool = False

    def begin(self, images: ImageSet, half: torch.Tensor) -> Reconstruction:
        """Train, judge by images that took no part, and read every image's pose."""
        n_held = self.counts(images)[0]
        saved = self.job.checkpoint.get(self.part)
        drawn = torch.randperm(len(images), generator=self.generator)
        order = drawn if saved is None else saved["order"]
        seen, held = order[n_held:].sort().values, order[:n_held]
        self.trained = self._new(images.apart(seen))
        if saved is not None:
            self.trained.load(saved["training"])
            self.generator.set_state(saved["generator"])
        self._train(self.trained, order)
        poses = self._judge(self.trained, images, held)
        rotations, offsets = self.read_poses(images)
        self.read = kept(rotations), kept(offsets)
        volume, band = self.trained.volume(), self.trained.band
        self.hard = poses > TOLD_APART and self.config.finish and self.config.search_on
        if self.hard:
            climb = Climb(**saved["climb"]) if saved is not None and "climb" in saved else Climb()
            return self._searched_on(self.trained, climb, order, images, half)
        return Reconstruction(rotations, offsets, half, [volume, volume], band, self.support)

    @property
    def search_config(self) -> RmfnConfig:
        """Settings of engine rmfn, where both engines have one these."""
        shared = dataclasses.fields(RefineConfig)
        return RmfnConfig(**{field.name: getattr(self.config, field.name) for field in shared})

    def _searched_on(
        self,
        run: Amortized,
        climb: Climb,
        order: torch.Tensor,
        images: ImageSet,
        half: torch.Tensor,
    ) -> Reconstruction:
        """Poses by a search from the decoder's map: the encoder cannot tell these apart."""
        self.job.say("many poses are likely for each image: the map is searched on from")

        def pack() -> Entry:
            return {**self._packed(run, order), "climb": dict(vars(climb))}

        def keep() -> None:
            self.job.checkpoint.put(self.part, pack)

        def trained() -> tuple[torch.Tensor, torch.Tensor]:
            return run.volume(), torch.ones(1, device=images.device)

        def anew() -> tuple[torch.Tensor, torch.Tensor]:
            return self._from_random_poses(climb, images)

        # What the training has not seen, no search sees either.
        n_held, least = self.counts(images)[0], self.search_config.search_images
        climb.order = self.shortened(order.roll(-n_held), least, images)
        volume, band = self.finer(climb, [trained, anew], images, keep)
        return self.assigned(on_centre(volume, band), band, images, half)

    def _from_random_poses(
        self, climb: Climb, images: ImageSet
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A map as engine rmfn begins, for a training may have gone to a wrong one."""
        config, box = self.search_config, images.plane.box
        band = config.search_band(box)
        rows, held = self.seen_and_held(climb, config.search_images, images)
        seen, unseen = images.select(rows, band), images.select(held, band)
        n = len(rows)
        self.job.say(f"searching from random poses at {self._angst(band, box):.1f} A, too")
        starts = []
        for number in range(1, config.n_starts + 1):
            search = Search(config, seen, self.generator, self.mask, images.ranks)
            title = f"Search {number}/{config.n_starts}"
            with self.job.bar(title, n * len(config.temperatures)) as bar:
                for epoch, temperature in enumerate(config.temperatures):
                    where = f"start {number}, epoch {epoch + 1}"
                    self.epoch(search, temperature, where, n * epoch, bar)
            search.judge(unseen)
            starts.append(search)
        best = max(starts, key=lambda search: search.log_evidence)
        with torch.no_grad():
            return best.network.volume(0), best.excess

    def _packed(self, run: Amortized, order: torch.Tensor) -> Entry:
        generator = self.generator.get_state()
        return {"order": order, "training": run.state(), "generator": generator}

    def _new(self, images: ImageSet, generator: torch.Generator | None = None) -> Amortized:
        return Amortized(
            self.config,
            images,
            self.pixel_size_angst,
            generator or self.generator,
            self.mask,
        )

    def engine_state(self) -> Entry:
        """Both networks, and the poses that the encoder has read."""
        assert self.trained is not None
        return {"trained": self.trained.weights(), "read": self.read, "hard": self.hard}

    def load_engine(self, state: Entry, images: ImageSet) -> None:
        """Go on from what :meth:`engine_state` gave."""
        # What a fresh network draws is thrown away.
        self.trained = self._new(images, torch.Generator())
        self.trained.load_weights(state["trained"])
        self.read, self.hard = state["read"], state["hard"]

    def refine(self, state: Reconstruction, images: ImageSet, place: Place) -> None:
        """Local refinement of the table of poses, unless the encoder has the last word."""
        if self.config.finish:
            super().refine(state, images, place)
        else:
            self.keep(state, images)

    def finish(self, state: Reconstruction, images: ImageSet, place: Place) -> None:
        """Rounds against the map of all images, or that map alone."""
        if self.config.finish:
            super().finish(state, images, place)
        else:
            self.keep(state, images, halves=False)

    def read_poses(
        self, images: ImageSet, state: Reconstruction | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's poses of images that it may never have seen; of hard sets the map's."""
        if state is not None and self.hard:
            return super().read_poses(images, state)
        assert self.trained is not None
        trained, parts = self.trained, ShrinkingBatch(_READ_AT_ONCE, self.job.say)
        everyone, found = torch.arange(len(images)), []
        with self.job.bar("Reading poses", len(images)) as bar:
            for block in everyone.split(_READ_AT_ONCE):
                rows = images.mine(block)
                if len(rows) > 0:
                    found += parts(rows, lambda part: trained.read_poses(images, part)[:2])
                bar(int(block[-1]) + 1)
        # To the CPU at the end: each copy would wait for the device.
        all_parts = found or [(torch.zeros(0, 3, 3), torch.zeros(0, 2))]
        mine = (torch.cat(part).cpu() for part in zip(*all_parts, strict=True))
        rotations, offsets = images.everyones(everyone, *mine)
        self.job.say(f"the encoder has read the poses of {len(images)} images")
        return kept(rotations), kept(offsets)

    def _train(self, run: Amortized, order: torch.Tensor) -> None:
        config, box = self.config, run.images.plane.box
        size = config.encoder_size(box)
        self.job.say(
            f"training on {len(run.images)} images: {config.encoder} encoder of {size} px with "
            f"{config.heads * (2 if config.symmetric else 1)} guesses, {config.decoder} decoder"
        )
        if run.seen:
            self.job.say(f"the training goes on after {run.seen} images")

        def pack() -> Entry:
            return self._packed(run, order)

        run.parts.tell = self.job.say
        reports: list[StepReport] = []
        lines_told = int(run.progress * _LINES)
        with self.job.bar("Training", config.images_seen) as bar:
            while run.seen < config.images_seen:
                reports.append(self._step(run))
                text = self._describe(reports[-50:], run)
                bar(run.seen, text)
                if run.progress >= (lines_told + 1) / _LINES:
                    lines_told += 1
                    self.job.say(f"{run.seen} images seen, {text}")
                self.job.checkpoint.put(self.part, pack, force=run.seen >= config.images_seen)

    def _describe(self, reports: list[StepReport], run: Amortized) -> str:
        gain = sum(report.gain for report in reports) / len(reports)
        text = f"{self._angst(run.band, run.images.plane.box):.1f} A, log-likelihood {gain:.1f}"
        if self.config.reverse > 0:
            reverse = sum(report.reverse_deg for report in reports) / len(reports)
            text += f", its own projections are read to {reverse:.1f} deg"
        return text

    def _step(self, run: Amortized) -> StepReport:
        try:
            return run.step()
        except FloatingPointError as error:
            raise CryoreconError(
                f"The training diverged: {error}",
                "Lower the rates: --set encoder_rate=3e-4 --set decoder_rate=0.02; the last good "
                "state is kept",
            ) from error

    def _judge(self, run: Amortized, images: ImageSet, held: torch.Tensor) -> float:
        """Whether there is a signal; how many poses an image leaves likely."""
        config, box = self.config, images.plane.box
        band = config.search_band(box)
        grid = so3_grid(config.search_nside, torch.float32)[0]
        batch = images.select(held, band)
        found = evidence(batch, run.volume(), grid, offsets_for(config, box, band))
        mean, error, poses = images.ranks.numbers(*found)
        self.job.say(f"log-evidence {mean:.2f} an image of {len(held)} held out")
        refuse_noise(mean, error)
        return poses
