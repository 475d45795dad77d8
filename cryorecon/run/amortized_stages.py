"""How engine amortized begins: an encoder and a decoder are trained, then poses are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cryorecon.engines.amortized import Amortized, AmortizedConfig, StepReport
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.reconstruction import Reconstruction, offsets_for
from cryorecon.engines.search import evidence
from cryorecon.errors import CryoreconError
from cryorecon.physics.rotations import so3_grid
from cryorecon.run.progress import stage_bar
from cryorecon.run.stages import HELD_OUT, Stages, refuse_noise

_READ_AT_ONCE = 500
# Lines of the log that the training takes.
_LINES = 8


@dataclass
class AmortizedStages(Stages):
    """A run of engine amortized.

    Attributes
    ----------
    trained : Amortized
        Of the last training.
    device : str
        Where the networks are trained.
    read : tuple of Tensor
        Rotations and offsets as the encoder read them at the end of the last training.
    """

    config: AmortizedConfig
    trained: Amortized | None = None
    device: str = "cpu"
    read: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin(self, images: ImageSet, half: torch.Tensor) -> Reconstruction:
        """Train, judge by images that took no part, and read every image's pose."""
        n_held = min(HELD_OUT, len(images) // 5)
        order = torch.randperm(len(images), generator=self.generator)
        seen, held = order[n_held:].sort().values, order[:n_held]
        self.trained = Amortized(
            self.config,
            images.apart(seen),
            self.pixel_size_angst,
            self.generator,
            self.mask,
            self.device,
        )
        self._train(self.trained)
        self._judge(self.trained, images, held)
        rotations, offsets = self.read_poses(images)
        self.read = rotations.clone(), offsets.clone()
        volume, band = self.trained.volume(), self.trained.band
        return Reconstruction(rotations, offsets, half, [volume, volume], band, self.support)

    def refine(self, state: Reconstruction, images: ImageSet) -> None:
        """Local refinement of the table of poses, unless the encoder has the last word."""
        if self.config.finish:
            super().refine(state, images)
        else:
            self.keep(state, images)

    def finish(self, state: Reconstruction, images: ImageSet, number: int) -> None:
        """Rounds against the map of all images, or that map alone."""
        if self.config.finish:
            super().finish(state, images, number)
        else:
            self.keep(state, images, halves=False)

    def read_poses(
        self, images: ImageSet, state: Reconstruction | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's poses of images that it may never have seen."""
        del state
        assert self.trained is not None
        rotations, offsets = torch.empty(len(images), 3, 3), torch.empty(len(images), 2)
        with stage_bar(self.job.console, "Reading poses", len(images)) as bar:
            for rows in torch.arange(len(images)).split(_READ_AT_ONCE):
                rotations[rows], offsets[rows], _ = self.trained.read_poses(images, rows)
                bar(int(rows[-1]) + 1)
        self.job.say(f"the encoder has read the poses of {len(images)} images")
        return rotations, offsets

    def _train(self, run: Amortized) -> None:
        config, box = self.config, run.images.plane.box
        size = config.encoder_size(box)
        self.job.say(
            f"training on {len(run.images)} images: {config.encoder} encoder of {size} px with "
            f"{config.heads * (2 if config.symmetric else 1)} guesses, {config.decoder} decoder"
        )
        reports: list[StepReport] = []
        lines_told = 0
        with stage_bar(self.job.console, "Training", config.images_seen) as bar:
            while run.seen < config.images_seen:
                reports.append(self._step(run))
                text = self._describe(reports[-50:], run)
                bar(run.seen, text)
                if run.progress >= (lines_told + 1) / _LINES:
                    lines_told += 1
                    self.job.say(f"{run.seen} images seen, {text}")

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
                "Lower the rates: --set encoder_rate=3e-4 --set decoder_rate=0.02",
            ) from error

    def _judge(self, run: Amortized, images: ImageSet, held: torch.Tensor) -> None:
        config, box = self.config, images.plane.box
        band = config.search_band(box)
        grid = so3_grid(config.search_nside, torch.float32)[0]
        batch = images.select(held, band)
        mean, error = evidence(batch, run.volume(), grid, offsets_for(config, box, band))
        self.job.say(f"log-evidence {mean:.2f} an image of {len(held)} held out")
        refuse_noise(mean, error)
