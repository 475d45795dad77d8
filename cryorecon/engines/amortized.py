"""Engine amortized: an encoder learns to read poses off images while a decoder learns the map.

CryoAI (Levy et al. 2022) done whole, with what its successors found: several guesses an image of
which the likeliest takes the gradient (symmetric loss, and CryoSPIN's heads), and the reverse
task (ACE-EM), in which projections of the current map, whose poses are known, teach the encoder.
No state belongs to an image; images come in a stream and are seen a few dozen times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cryorecon.engines.decoders import Decoder, DecoderKind, new_decoder
from cryorecon.engines.numbers import refuse_senseless
from cryorecon.engines.observations import ImageSet, Observations, power_ratio
from cryorecon.engines.pose_reader import Guesses, PoseReader
from cryorecon.engines.reconstruction import RefineConfig
from cryorecon.engines.reverse_task import ReverseTask
from cryorecon.engines.shrinking import ShrinkingBatch
from cryorecon.engines.stream import Stream, read_ahead
from cryorecon.networks.encoders import LEAST_INPUT_PX, EncoderConfig, Kind, PoseEncoder
from cryorecon.physics.fourier import max_band, shift_phases
from cryorecon.physics.masks import Support
from cryorecon.physics.projection import Transform, extract_slices
from cryorecon.physics.rotations import random_rotations

Loss = Literal["likelihood", "l2"]


@dataclass(frozen=True)
class AmortizedConfig(RefineConfig):
    """Settings of the engine, besides those that all engines share.

    Attributes
    ----------
    encoder : "dense", "small" or "paper"
    input_size : int
        Side, in pixels, of the images that the encoder sees; 0 takes just what the last band
        needs. May be larger than what the decoder resolves.
    heads : int
        Guesses of the pose an image and path.
    symmetric : bool
        Whether an image turned by pi is a second path (the paper's symmetric loss).
    decoder : str
        "grid", "log-grid", "rmfn", "fouriernet", "siren" or "positional".
    width : int
        Hidden units of decoders that are networks.
    loss : "likelihood" or "l2"
        Whitened by the noise spectrum, or the plain squared error.
    reverse : float
        Weight of the reverse task; 0 leaves it out.
    reweighted : bool
        Whether the encoder sees images multiplied by their CTF.
    images_seen : int
        Length of the training, whatever the number of images.
    batch : int
    first_cycles, last_cycles : float
        Bands of the start and the end in cycles per particle diameter.
    march : float
        Share of the training in which the band grows.
    encoder_rate, decoder_rate : float
        Of Adam; the decoder's is for parameters near 1. Both fall to a tenth at the end.
    offset_spread : float
        Standard deviation of the reverse task's offsets relative to the largest offset.
    finish : bool
        Whether a table of poses, from the encoder, is refined at the end.
    search_on : bool
        Whether, before that, engine rmfn's search goes on from the map of images that leave many
        poses likely, and gives these poses.
    """

    encoder: Kind = "dense"
    input_size: int = 0
    heads: int = 4
    symmetric: bool = True
    decoder: DecoderKind = "grid"
    width: int = 256
    loss: Loss = "likelihood"
    reverse: float = 1.0
    reweighted: bool = True
    images_seen: int = 150_000
    batch: int = 64
    first_cycles: float = 4.0
    last_cycles: float = 6.4
    march: float = 0.7
    encoder_rate: float = 1e-3
    decoder_rate: float = 5e-2
    offset_spread: float = 0.5
    finish: bool = True
    search_on: bool = True

    def __post_init__(self) -> None:
        refuse_senseless(self, "search_nside heads width images_seen batch", "")

    def band(self, box: int, progress: float) -> float:
        """Radius, in cycles per box, at some share of the training."""
        first, last = (c / self.diameter for c in (self.first_cycles, self.last_cycles))
        grown = first + (last - first) * min(1.0, progress / max(self.march, 1e-9))
        return min(grown, float(max_band(box)))

    def encoder_size(self, box: int) -> int:
        """Side of the encoder's images in pixels."""
        if self.input_size:
            return self.input_size
        least = max(8, LEAST_INPUT_PX[self.encoder])
        return max(least, 2 * int(self.band(box, 1.0)) + 4)


@dataclass(frozen=True)
class StepReport:
    """Means over a batch.

    Attributes
    ----------
    gain : float
        Log-likelihood of the winning guess against an empty image.
    reverse_deg : float
        How far the best guess lies from the pose of projections of the map, the median; NaN if
        the reverse task is left out.
    """

    gain: float
    reverse_deg: float


class Amortized:
    """Encoder, decoder and their optimiser.

    Parameters
    ----------
    images : ImageSet
        All that the run learns from; the networks live where their batches are taken to.
    pixel_size_angst : float
        Of the images.
    generator : torch.Generator
        On the CPU.
    mask : Tensor, shape (N, N, N), optional
        Multiplies the soft sphere of the particle's diameter.
    """

    def __init__(
        self,
        config: AmortizedConfig,
        images: ImageSet,
        pixel_size_angst: float,
        generator: torch.Generator,
        mask: Tensor | None = None,
    ) -> None:
        self.config, self.generator, device = config, generator, images.device
        self.device = device
        box = images.plane.box
        shape = EncoderConfig(
            config.encoder,
            config.encoder_size(box),
            config.heads,
            shift_scale_angst=config.offset_range * box * pixel_size_angst,
        )
        self.reader = PoseReader(
            PoseEncoder(shape, generator).to(device),
            config.diameter,
            pixel_size_angst,
            symmetric=config.symmetric,
            reweighted=config.reweighted,
        )
        spread_px = config.offset_range * box
        self.reverse = ReverseTask(self.reader, spread_px, config.offset_spread * spread_px)
        reach = min(int(config.band(box, 1.0)) + 1, max_band(box))
        # Beyond what the encoder sees and the decoder resolves, images are not loaded.
        self.reach = float(max(reach, min(max_band(shape.input_size), max_band(box))))
        self.images = images.within(self.reach)
        support = Support(config.diameter / 2, mask)
        decoder = new_decoder(config.decoder, box, reach, support, config.width, generator)
        self.decoder: Decoder = decoder.to(device)
        self.optimizer = torch.optim.Adam(
            [
                {"params": list(self.reader.encoder.parameters()), "lr": config.encoder_rate},
                {"params": list(self.decoder.parameters()), "lr": config.decoder_rate},
            ],
            fused=device.type in ("cpu", "cuda"),
        )
        self.seen = 0
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.signal = 1.0
        self.parts = ShrinkingBatch(config.batch)
        self._rows = Stream(len(images), config.batch, images.pixels, generator)
        self._ahead = read_ahead(self.images)
        self._match_scale()

    @property
    def progress(self) -> float:
        """Share of the training done."""
        return min(1.0, self.seen / self.config.images_seen)

    @property
    def band(self) -> float:
        """Radius in use, in cycles per box."""
        return self.config.band(self.images.plane.box, self.progress)

    def volume(self) -> Tensor:
        """The decoder's map on the images' grid, shape (N, N, N)."""
        with torch.no_grad():
            return self.decoder.volume(self.band)

    def step(self) -> StepReport:
        """Show one mini-batch; encoder and decoder follow.

        Where a device's memory does not hold the whole batch, gradients add up over parts of it.

        Raises
        ------
        FloatingPointError
            If the loss is not finite; no parameter has changed then.
        """
        rows = next(self._rows)
        # For the whole batch, whoever works on which part of it.
        wanted = self.config.reverse > 0
        plane = self.images.plane
        drawn = self.reverse.draw(len(rows), plane, self.generator) if wanted else ()

        def work(part: Tensor) -> Tensor:
            if len(part) == 0:
                return torch.zeros(2)
            known = tuple(values[part] for values in drawn)
            return torch.tensor(self._learn(rows[part], len(part) / len(rows), known))

        self.optimizer.zero_grad()
        mine = self.images.ranks.share(torch.arange(len(rows)))
        found = torch.stack(self.parts(mine, work, self.optimizer.zero_grad)).sum(0)
        # Only now: the blocks of this batch may be those that were expected before.
        self._ahead.expect(self._rows.upcoming)
        self._add_up(found)
        torch.nn.utils.clip_grad_norm_(self.reader.encoder.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.seen += len(rows)
        return StepReport(*found.tolist())

    def _add_up(self, report: Tensor) -> None:
        """Gradients and report of the batch, where several processes have worked on it."""
        ranks = self.images.ranks
        if ranks.count == 1:
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        whole = torch.nn.utils.parameters_to_vector([p.grad for p in parameters])
        ranks.add_up(whole, report)
        sizes = [p.numel() for p in parameters]
        for parameter, part in zip(parameters, whole.split(sizes), strict=True):
            parameter.grad.copy_(part.view_as(parameter))

    def _learn(self, rows: Tensor, share: float, drawn: tuple[Tensor, ...]) -> tuple[float, float]:
        """Gradients of a share of a batch; its share of the step's report."""
        whole = self._ahead.select(rows)
        batch = whole.within(self.band)
        transform = self.decoder.transform(self.band)
        guesses = self.reader(whole)
        rotations, offsets = guesses.chosen(self._winners(batch, guesses, transform))
        gain = self._gain(batch, rotations, offsets, transform).mean()
        loss = -gain / self.signal
        reverse_deg = torch.full_like(loss, torch.nan)
        if self.config.reverse > 0:
            reverse, reverse_deg = self.reverse.loss(whole, transform, drawn, self.band)
            loss = loss + self.config.reverse * reverse
        (loss * share).backward()
        # One copy, when all is under way: each waits for the device.
        found = torch.stack([value.detach().double() for value in (loss, gain, reverse_deg)])
        total, likelihood, angle = found.tolist()
        if not math.isfinite(total):
            number = self.seen // self.config.batch + 1
            raise FloatingPointError(f"loss {total} in batch {number}, after {self.seen} images")
        return likelihood * share, angle * share

    def read_poses(self, images: ImageSet, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's likeliest guess for some images; no gradients, no search.

        Returns
        -------
        rotations : Tensor, shape (b, 3, 3)
        offsets_px : Tensor, shape (b, 2)
        gain : Tensor, shape (b,)
            Log-likelihood against an empty image.
        """
        with torch.no_grad():
            whole = images.select(rows, self.reach)
            batch = whole.within(self.band)
            transform = self.decoder.transform(self.band)
            guesses = self.reader(whole)
            best = self._winners(batch, guesses, transform)
            rotations, offsets = guesses.chosen(best)
            gain = self._gain(batch, rotations, offsets, transform)
        return rotations, offsets, gain

    def weights(self) -> dict[str, Any]:
        """What reading poses takes: both networks and how far the training has come."""
        return {
            "encoder": self.reader.encoder.state_dict(),
            "decoder": self.decoder.state_dict(),
            "seen": self.seen,
            "signal": self.signal,
        }

    def load_weights(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`weights` gave."""
        self.reader.encoder.load_state_dict(state["encoder"])
        self.decoder.load_state_dict(state["decoder"])
        self.seen, self.signal = state["seen"], state["signal"]

    def state(self) -> dict[str, Any]:
        """Between two steps: all that training has changed, by reference."""
        return {
            **self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "stream": self._rows.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave; the generator is the caller's."""
        self.load_weights(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self._rows.load(state["stream"])

    def _winners(self, batch: Observations, guesses: Guesses, transform: Transform) -> Tensor:
        """Index of each image's likeliest guess, shape (b,); no gradients."""
        with torch.no_grad():
            b, c = guesses.offsets_px.shape[:2]
            slices = extract_slices(transform, guesses.rotations.flatten(0, 1), batch.plane)
            slices = slices.unflatten(0, (b, c))
            predicted = slices * shift_phases(guesses.offsets_px, batch.plane)
            return self._score(batch, predicted.to(slices.dtype)).argmax(-1)

    def _score(self, batch: Observations, predicted: Tensor) -> Tensor:
        """Log-likelihood against an empty image of predictions without CTF: (b, c, m) to (b, c)."""
        if self.config.loss == "l2":
            multiplicity = batch.plane.multiplicity.to(batch.ctf)
            flat = batch.precision().mean(-1, keepdim=True) * multiplicity / multiplicity.mean()
            matched, weight = batch.coefficients * batch.ctf * flat, batch.ctf**2 * flat
        else:
            matched, weight = batch.matched()
        overlap = (matched[:, None] * predicted.conj()).real
        return (2 * overlap - weight[:, None] * predicted.abs().square()).sum(-1)

    def _gain(
        self, batch: Observations, rotations: Tensor, offsets_px: Tensor, transform: Transform
    ) -> Tensor:
        """Score of one pose an image, with gradients; shape (b,)."""
        slices = self.decoder.slices(transform, rotations, batch.plane)
        predicted = slices * shift_phases(offsets_px, batch.plane).to(slices.dtype)
        return self._score(batch, predicted[:, None])[:, 0]

    def _rate(self, step: int) -> float:
        """Constant while the band grows, then down to a tenth."""
        del step
        late = (self.progress - self.config.march) / max(1 - self.config.march, 1e-9)
        return 0.1 ** max(0.0, min(1.0, late))

    def _match_scale(self) -> None:
        """Give the decoder the power that the images hold beyond their noise, at the first band."""
        n = len(self.images)
        rows = torch.arange(n)[:: max(1, n // 500)]
        batch = self.images.select(rows, self.band)
        turns = random_rotations(100, self.generator, torch.float32).to(self.device)
        with torch.no_grad():
            slices = self.decoder.slices(self.decoder.transform(self.band), turns, batch.plane)
        found = power_ratio(batch, slices.abs().square().mean(0))
        ratio, seen = self.images.ranks.numbers(*found)
        self.decoder.scale.mul_(ratio**0.5)
        self.signal = max(seen, 1.0)
