"""Reconstruction by an encoder: its weights move until its output explains the moments (5.1.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from cryorecon.engines.mra.problem import ShiftMoments, moment_arrays, shifted
from cryorecon.engines.mra.solvers import Solution, misfit
from cryorecon.engines.mra.training import EncoderPair

# Shifts tried a sample when signal and density are brought together.
_FINENESS = 4


@dataclass(frozen=True)
class RefineConfig:
    """Minimising equation 26 over an encoder's weights.

    Attributes
    ----------
    iterations : int
        At most.
    learning_rate : float
        Of Adam.
    second_weight : float
        Lambda of equation 26.
    stop_at_noise : bool
        Keep each problem's values from when its moments are first as near as noise is expected to
        leave them (the discrepancy principle); else go on to the end.
    """

    iterations: int = 3000
    learning_rate: float = 1e-4
    second_weight: float = 1.0
    stop_at_noise: bool = True

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.learning_rate <= 0 or self.second_weight < 0:
            raise ValueError("needs iterations, a positive rate and weight")


def loss_of(
    signal: Tensor, density: Tensor, first: Tensor, second: Tensor, second_weight: float
) -> Tensor:
    """Equation 26, shape (...)."""
    one, two = moment_arrays(signal, density)
    return (one - first).norm(dim=-1) + second_weight * (two - second).norm(dim=(-2, -1))


def together(signal: Tensor, density: Tensor, target: ShiftMoments, second_weight: float) -> Tensor:
    """Shift of the signal, in samples, with which the pair explains the moments best; shape (b,).

    Each network knows its output only up to a shift of its own.
    """
    n = signal.shape[-1]
    tried = torch.arange(n * _FINENESS, dtype=signal.dtype, device=signal.device) / _FINENESS
    losses = [
        loss_of(
            shifted(signal, by.expand(len(signal))), density, target.first, target.second,
            second_weight,
        )
        for by in tried
    ]  # fmt: skip
    return tried[torch.stack(losses).argmin(0)]


def solve_encoder(
    pair: EncoderPair,
    target: ShiftMoments,
    config: RefineConfig | None = None,
    progress: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Solution:
    """Refine the encoder's estimate of each problem, with weights of its own for each.

    Parameters
    ----------
    pair : EncoderPair
        Trained, or as drawn for comparison; not changed.
    target : ShiftMoments
    progress : callable
        Told of iterations done, signals and densities, before each step and at the end.
    """
    config = config or RefineConfig()
    exact, target = target, target.to(next(pair.parameters()).dtype)
    first, second, crest, scale = pair.inputs(target)
    with torch.no_grad():
        offset = together(*pair.read(target), target, config.second_weight)
    back = crest + offset
    weights = {
        name: value.detach().expand(len(first), *value.shape).clone().requires_grad_()
        for name, value in pair.named_parameters()
    }
    optimiser = torch.optim.Adam(list(weights.values()), lr=config.learning_rate, fused=True)

    def output() -> tuple[Tensor, Tensor]:
        def one(own: dict[str, Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            signal, density = functional_call(pair, own, (a[None], b[None]))
            return signal[0], density[0]

        signal, density = vmap(one)(weights, first, second)
        return shifted(signal, back) * scale[:, None], density

    kept = _Kept(exact, config.stop_at_noise)
    for done in range(config.iterations):
        signal, density = output()
        if progress is not None:
            progress(done, signal.detach(), density.detach())
        if kept.offer(signal.detach(), density.detach()):
            return kept.solution()
        losses = loss_of(signal, density, target.first, target.second, config.second_weight)
        optimiser.zero_grad()
        losses.sum().backward()
        optimiser.step()
    signal, density = (value.detach() for value in output())
    if progress is not None:
        progress(config.iterations, signal, density)
    kept.offer(signal, density)
    return kept.solution()


class _Kept:
    """Each problem's values at the noise floor, or the last ones."""

    def __init__(self, target: ShiftMoments, stop_at_noise: bool) -> None:
        self.target, self.stop_at_noise = target, stop_at_noise
        b = len(target.first)
        self.reached = torch.zeros(b, dtype=torch.bool, device=target.first.device)
        self.signal = torch.zeros_like(target.first)
        self.density = torch.zeros_like(target.first)
        self.misfit = torch.zeros_like(target.first_noise)

    def offer(self, signal: Tensor, density: Tensor) -> bool:
        """Take values of the problems not yet there; whether all are."""
        signal, density = signal.to(self.signal), density.to(self.density)
        here = misfit(signal, density, self.target)
        going = ~self.reached
        self.signal = torch.where(going[:, None], signal, self.signal)
        self.density = torch.where(going[:, None], density, self.density)
        self.misfit = torch.where(going, here, self.misfit)
        if self.stop_at_noise:
            self.reached |= here <= 1
        return bool(self.reached.all())

    def solution(self) -> Solution:
        return Solution(self.signal, self.density, self.misfit)
