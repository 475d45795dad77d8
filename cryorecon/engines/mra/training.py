"""Supervised training of encoders from moments to signal and density (Khoo et al. 2024, 5.1.1)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cryorecon.engines.mra.problem import (
    ShiftMoments,
    canonical,
    exact_moments,
    first_phase,
    moved,
    orbit_error,
    shifted,
)
from cryorecon.networks.moment_encoders import MomentEncoder, MomentEncoderConfig
from cryorecon.physics.mixtures import MixtureConfig, draw_mixtures

# Distance of the seeds of neighbouring epochs and batches: any odd number far above their counts.
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained, on what, and how.

    Attributes
    ----------
    mixture : MixtureConfig
        Family of signals and of densities.
    encoder : MomentEncoderConfig
        Shape of both networks; ``encoder.n`` is the number of points.
    pairs : int
        Pairs of signal and density an epoch.
    epochs : int
    fresh : bool
        Every epoch draws pairs of its own; else the same pairs come back in another order.
    batch : int
    frame : bool
        The observations' frame is moved to where the mean one has its first harmonic's crest at
        sample 0, and the signal's energy is taken out; else the networks see moments as they are.
    loss : "orbit" or "squared"
        Mean relative error after the best shift (equation 21), or mean squared error.
    schedule : "cosine" or "steps"
        The rate falls to 0 along half a cosine after a short rise, or is `learning_rate`, a tenth
        and a hundredth of it for a third of the epochs each.
    learning_rate : float
        Of Adam.
    seed : int
        Of weights and pairs.
    """

    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    encoder: MomentEncoderConfig = field(default_factory=MomentEncoderConfig)
    pairs: int = 50_000
    epochs: int = 24
    fresh: bool = True
    batch: int = 256
    frame: bool = True
    loss: Literal["orbit", "squared"] = "orbit"
    schedule: Literal["cosine", "steps"] = "cosine"
    learning_rate: float = 6e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.pairs, self.epochs, self.batch) < 1 or not 0 < self.learning_rate < math.inf:
            raise ValueError("needs pairs, epochs, a batch and a positive rate")

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch; the last may be smaller."""
        return -(-self.pairs // self.batch)


def paper_training(components: int, n: int, pairs: int, epochs: int, seed: int) -> TrainingConfig:
    """The paper's way: moments over frequencies as they are, fixed pairs, three falling rates.

    Its figure A.11 gives the six channels after stacking; other widths and the batch are ours.
    """
    encoder = MomentEncoderConfig(
        n, "fourier", "rows", branch=(16, 8, 3), merged=(6, 6), hidden=(4 * n,), kernel=5
    )
    return TrainingConfig(
        MixtureConfig(components), encoder, pairs, epochs, False, 256, False, "squared", "steps",
        1e-4, seed,
    )  # fmt: skip


def config_from(plain: dict[str, Any]) -> TrainingConfig:
    """A config from ``dataclasses.asdict`` of one, as files hold it.

    Raises
    ------
    TypeError, ValueError
        If keys or values do not fit.
    """
    plain = dict(plain)
    encoder: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in dict(plain.pop("encoder")).items()
    }
    return TrainingConfig(
        mixture=MixtureConfig(**plain.pop("mixture")),
        encoder=MomentEncoderConfig(**encoder),
        **plain,
    )


def draw_pairs(
    config: MixtureConfig,
    count: int,
    n: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Signals, and densities that sum to 1, shape (count, n) each."""
    signal = draw_mixtures(config, count, n, generator, dtype)
    density = draw_mixtures(config, count, n, generator, dtype)
    return signal, density / density.sum(-1, keepdim=True)


class EncoderPair(nn.Module):
    """One network for the signal, one for the density, of one shape.

    Parameters
    ----------
    config : TrainingConfig
        Tells their shape and what they see.
    """

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        self.signal = MomentEncoder(dataclasses.replace(config.encoder, output="signal"), generator)
        self.density = MomentEncoder(
            dataclasses.replace(config.encoder, output="density"), generator
        )

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and density in the networks' frame, from what `inputs` gives."""
        return self.signal(first, second), self.density(first, second)

    def inputs(self, target: ShiftMoments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the networks see of moments, and the way back.

        Returns
        -------
        first, second : Tensor
            For `forward`.
        crest, scale : Tensor, shape (b,)
            Moving the signal by `crest` samples and multiplying it by `scale` undoes the frame.
        """
        crest = torch.zeros_like(target.first_noise)
        scale = torch.ones_like(crest)
        if self.config.frame:
            crest = first_phase(target.first)
            energy = target.second.diagonal(dim1=-2, dim2=-1).sum(-1)
            scale = energy.clamp(min=torch.finfo(energy.dtype).tiny).sqrt()
            target = moved(target, -crest)
        target = ShiftMoments(
            target.first / scale[:, None],
            target.second / scale[:, None, None].square(),
            target.first_noise,
            target.second_noise,
        )
        if self.config.encoder.domain == "fourier":
            return *target.fourier(), crest, scale
        return target.first, target.second, crest, scale

    def read(self, target: ShiftMoments) -> tuple[Tensor, Tensor]:
        """Signals and densities of moments as they are, shape (b, n) each, without gradients."""
        dtype = next(self.parameters()).dtype
        with torch.no_grad():
            first, second, crest, scale = self.inputs(target.to(dtype))
            signal, density = self(first, second)
        back = shifted(signal, crest) * scale[:, None]
        return back.to(target.first), density.to(target.first)


class Training:
    """Both networks with their optimiser; every batch follows from the seed and its number.

    Parameters
    ----------
    config : TrainingConfig
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.pair = EncoderPair(config)
        self.optimiser = torch.optim.Adam(
            self.pair.parameters(), lr=config.learning_rate, fused=True
        )
        self.step = 0
        self._fixed: tuple[Tensor, Tensor] | None = None
        self._order: tuple[int, Tensor] | None = None

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.step // self.config.steps_per_epoch

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """The pairs of the next batch."""
        config = self.config
        epoch, number = divmod(self.step, config.steps_per_epoch)
        count = min(config.batch, config.pairs - number * config.batch)
        n = config.encoder.n
        if config.fresh:
            drawn = self._generator(1 + self.step)
            return draw_pairs(config.mixture, count, n, drawn)
        if self._fixed is None:
            self._fixed = draw_pairs(config.mixture, config.pairs, n, self._generator(0))
        if self._order is None or self._order[0] != epoch:
            generator = self._generator(1 + epoch)
            self._order = epoch, torch.randperm(config.pairs, generator=generator)
        rows = self._order[1][number * config.batch :][:count]
        return self._fixed[0][rows], self._fixed[1][rows]

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.config.seed + 1) * _SEED_STRIDE + number)

    def rate(self) -> float:
        """Learning rate of the next step."""
        config = self.config
        part = self.step / (config.epochs * config.steps_per_epoch)
        if config.schedule == "steps":
            return config.learning_rate * 0.1 ** min(2, int(3 * part))
        warm = min(1.0, (self.step + 1) / 100)
        return config.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, part)))

    def advance(self) -> tuple[float, float]:
        """One batch; the losses of signal and density on it."""
        signal, density = self._pairs()
        if self.config.frame:
            # Both crests at sample 0: then the mean observation's is there too.
            signal = shifted(signal, -first_phase(signal))
            density = shifted(density, -first_phase(density))
            signal = signal / signal.norm(dim=-1, keepdim=True)
            target = exact_moments(signal, density)
        else:
            target = exact_moments(signal, density)
            signal, density = canonical(signal, density)
        first, second = target.first, target.second
        if self.config.encoder.domain == "fourier":
            first, second = target.fourier()
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        guess, shifts = self.pair(first, second)
        losses = self._loss(guess, signal), self._loss(shifts, density)
        self.optimiser.zero_grad()
        (losses[0] + losses[1]).backward()
        if self.config.loss == "orbit":
            for network in (self.pair.signal, self.pair.density):
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return float(losses[0].detach()), float(losses[1].detach())

    def _loss(self, estimate: Tensor, truth: Tensor) -> Tensor:
        if self.config.loss == "squared":
            # Relative to the truth's energy: densities are small numbers.
            return (estimate - truth).square().sum() / truth.square().sum()
        return orbit_error(estimate, truth).mean()

    def state(self) -> dict[str, Any]:
        """All that a continued training needs; tensors and plain values only."""
        return {
            "config": dataclasses.asdict(self.config),
            "networks": self.pair.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> Training:
        """Where `state` was taken; goes on exactly as it would have."""
        training = Training(config_from(state["config"]))
        training.pair.load_state_dict(state["networks"])
        training.optimiser.load_state_dict(state["optimiser"])
        training.step = int(state["step"])
        return training


def held_out_errors(pair: EncoderPair, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Errors of equation 21 on pairs that training has not seen, shape (count,) each."""
    config = pair.config
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for begin in range(0, count, 1000):
        size = min(1000, count - begin)
        truth = draw_pairs(config.mixture, size, config.encoder.n, generator)
        found = pair.read(exact_moments(*truth))
        parts.append([orbit_error(z, t) for z, t in zip(found, truth, strict=True)])
    signal, density = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    return signal, density


def errors_of_the_mean(config: TrainingConfig, count: int, seed: int) -> tuple[float, float]:
    """Mean errors of equation 21 of one guess for all: what an encoder that reads nothing has.

    The guess is the mean of other pairs, their first harmonics' crests at sample 0.

    Returns
    -------
    signal, density : float
    """
    generator = torch.Generator().manual_seed(seed)
    count, n = min(count, 1000), config.encoder.n
    seen, unseen = (draw_pairs(config.mixture, c, n, generator) for c in (1000, count))
    means = (shifted(s, -first_phase(s)).mean(0) for s in seen)
    signal, density = (
        float(orbit_error(mean.expand_as(truth), truth).mean())
        for mean, truth in zip(means, unseen, strict=True)
    )
    return signal, density
