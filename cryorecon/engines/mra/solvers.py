"""Signals and densities of shifts from moments without training: spectral and least squares."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryorecon.engines.mra.problem import ShiftMoments, circulant, moment_arrays

# Largest Jacobian held at once, in numbers.
_JACOBIAN_NUMBERS = 2**25
# Relative error down to which exact moments are fitted.
_EXACT = 1e-6


@dataclass(frozen=True)
class Solution:
    """Estimates for b problems.

    Attributes
    ----------
    signal, density : Tensor, shape (b, n)
    misfit : Tensor, shape (b,)
        Mean of both moments' squared errors over what the noise is expected to make of them: 1 at
        the truth.
    """

    signal: Tensor
    density: Tensor
    misfit: Tensor


def noise_floors(target: ShiftMoments) -> tuple[Tensor, Tensor]:
    """Expected errors of both moments, no less than rounding makes of exact ones; shape (b,)."""
    first, second = target.first.norm(dim=-1), target.second.norm(dim=(-2, -1))
    return (
        target.first_noise.maximum(_EXACT * first),
        target.second_noise.maximum(_EXACT * second),
    )


def misfit(signal: Tensor, density: Tensor, target: ShiftMoments) -> Tensor:
    """See `Solution`; shape (b,)."""
    floor_first, floor_second = noise_floors(target)
    first, second = moment_arrays(signal, density)
    one = (first - target.first).square().sum(-1) / floor_first.square()
    two = (second - target.second).square().sum((-2, -1)) / floor_second.square()
    return (one + two) / 2


def solve_spectral(target: ShiftMoments, threshold: float = 1e-2) -> Solution:
    """Signal from an eigenvector of the second moment (Abbe et al. 2018).

    Divided by the modulus of the signal's transform on both sides, the second moment is circulant
    up to the signal's phases: its eigenvalues are the density and each eigenvector of a simple
    eigenvalue is the signal's phases times a wave. The one best set apart from its neighbours is
    taken. Exact for exact moments, a density without repeated values, and a signal with power at
    every frequency.

    Parameters
    ----------
    target : ShiftMoments, float64
        Single precision is not enough for the eigenvectors.
    threshold : float
        Frequencies with less than this part of the largest power are left out; so are those with
        less than four times the noise of the power.
    """
    first, second = target.fourier()
    n = first.shape[-1]
    power = second.diagonal(dim1=-2, dim2=-1).real
    least = power.amax(-1) * threshold
    exact = target.second_noise == 0
    least = torch.where(exact, power.amax(-1) * 1e-13, least.maximum(4 * target.second_noise / n))
    kept = power > least[:, None]
    modulus = power.clamp(min=1e-300).sqrt() * kept
    inverse = torch.where(kept, 1 / modulus.clamp(min=1e-150), torch.zeros_like(modulus))
    _, vectors = torch.linalg.eigh(second * inverse[:, :, None] * inverse[:, None, :])
    best: Solution | None = None
    for number in range(n):
        spectrum = _real_signal(modulus * vectors[:, :, number] * n**0.5, first)
        # Where frequencies are left out an eigenvector is no pure wave: moduli are known, though.
        spectrum = modulus * torch.polar(torch.ones_like(modulus), spectrum.angle())
        signal = torch.fft.ifft(spectrum, norm="ortho").real
        density = _density_of(torch.fft.fft(signal, norm="ortho"), second, kept, least)
        found = Solution(signal, density, misfit(signal, density, target))
        best = found if best is None else _better(best, found)
    assert best is not None
    return best


def raised(solve: Callable[[ShiftMoments], Solution], target: ShiftMoments) -> Solution:
    """Solve for the signals plus constants that give frequency 0 as much power as any other has.

    A signal without a mean, or with nearly none, lacks what its phases are told by; with one far
    above its own height all else drowns in what noise makes of it.
    """
    power = target.fourier()[1].diagonal(dim1=-2, dim2=-1).real
    n = power.shape[-1]
    constant = (power[:, 1:].amax(-1).clamp(min=0) / n).sqrt() - target.first.mean(-1)
    found = solve(target.plus(constant))
    return replace(found, signal=found.signal - constant[:, None])


def _better(one: Solution, other: Solution) -> Solution:
    """Problem by problem the one with the smaller misfit."""
    first = (one.misfit <= other.misfit)[:, None]
    return Solution(
        torch.where(first, one.signal, other.signal),
        torch.where(first, one.density, other.density),
        one.misfit.minimum(other.misfit),
    )


def _real_signal(spectrum: Tensor, first: Tensor) -> Tensor:
    """Turn by the one phase that makes the signal real, with the sign of the mean observation."""
    mate = spectrum.flip(-1).roll(1, -1)
    phase = (spectrum * mate).sum(-1).angle() / 2
    spectrum = spectrum * torch.polar(torch.ones_like(phase), -phase)[:, None]
    spectrum = (spectrum + spectrum.flip(-1).roll(1, -1).conj()) / 2
    sign = (spectrum[:, 0].real * first[:, 0].real).sign()
    return spectrum * torch.where(sign == 0, torch.ones_like(sign), sign)[:, None]


def _density_of(spectrum: Tensor, second: Tensor, kept: Tensor, least: Tensor) -> Tensor:
    """Probabilities of shifts that explain the second moment best, one frequency at a time."""
    n = spectrum.shape[-1]
    frequency = torch.arange(n, device=spectrum.device)
    lag = (frequency[:, None] - frequency) % n
    outer = spectrum[:, :, None] * spectrum.conj()[:, None, :]
    outer = outer * (kept[:, :, None] & kept[:, None, :])
    index = lag.flatten().expand(len(spectrum), -1)
    zero = torch.zeros_like(spectrum)
    above = zero.scatter_add(1, index, (second * outer.conj()).flatten(1))
    below = zero.scatter_add(1, index, (outer * outer.conj()).flatten(1)).real
    transform = above / (below + least[:, None].square())
    density = torch.fft.ifft(transform).real.clamp(min=0)
    return density / density.sum(-1, keepdim=True).clamp(min=1e-300)


@dataclass(frozen=True)
class DirectConfig:
    """Least squares over signal and density.

    Attributes
    ----------
    starts : int
        Random starts besides the spectral one.
    stages : int
        How often the weight of smoothness may fall before a start is given up.
    steps : int
        Levenberg-Marquardt steps a stage.
    fall : float
        The weight's factor from stage to stage.
    """

    starts: int = 4
    stages: int = 40
    steps: int = 3
    fall: float = 0.3

    def __post_init__(self) -> None:
        if self.starts < 0 or self.stages < 1 or self.steps < 1 or not 0 < self.fall < 1:
            raise ValueError("needs counts of 1 or more and a fall in (0, 1)")


def solve_direct(
    target: ShiftMoments,
    generator: torch.Generator,
    config: DirectConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """The smoothest signal and density that explain the moments to within their noise.

    Levenberg-Marquardt over the samples v and over p, with density ``p^2 / sum p^2``. Smoothness,
    the energy of both derivatives, begins with a large weight, which falls until the squared errors
    of the moments are what noise is expected to make of them (the discrepancy principle): nothing
    is gained by fitting noise. Of all starts the smoothest counts that came so far, else the one
    that came nearest.

    Parameters
    ----------
    target : ShiftMoments, float64
    progress : callable
        Told of starts done and their number.
    """
    config = config or DirectConfig()
    signals, densities = _starts(target, generator, config.starts)
    n_starts, b, n = signals.shape
    tiled = ShiftMoments(
        target.first.repeat(n_starts, 1),
        target.second.repeat(n_starts, 1, 1),
        target.first_noise.repeat(n_starts),
        target.second_noise.repeat(n_starts),
    )
    flat = signals.flatten(0, 1), densities.flatten(0, 1)
    chunk = max(1, _JACOBIAN_NUMBERS // (2 * n**3))
    parts = []
    for begin in range(0, n_starts * b, chunk):
        rows = slice(begin, begin + chunk)
        parts.append(_Descent(tiled.take(rows), flat[0][rows], flat[1][rows]).run(config))
        if progress is not None:
            progress(min(begin + chunk, n_starts * b), n_starts * b)
    signal, density, errors, rough = (torch.cat(column) for column in zip(*parts, strict=True))
    reached = errors <= 1.0 + 1e-9
    score = torch.where(reached, rough / rough.amax(), 2 + errors).reshape(n_starts, b)
    best = score.argmin(0) * b + torch.arange(b, device=score.device)
    return Solution(signal[best], density[best], errors[best])


def _starts(target: ShiftMoments, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Spectral and smooth random signals with near-uniform densities, (count + 1, b, n) each."""
    spectral = solve_spectral(target)
    b, n = spectral.signal.shape
    k = torch.arange(n // 2 + 1)
    falling = (1 / (1 + k.double())).to(target.first)

    def smooth() -> Tensor:
        noise = torch.randn(
            count, b, n, generator=generator, dtype=torch.float64, device=generator.device
        )
        if count == 0:
            return noise.to(target.first)
        return torch.fft.irfft(torch.fft.rfft(noise.to(target.first)) * falling, n=n)

    energy = target.second.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-300)
    signal = smooth()
    signal = signal / signal.norm(dim=-1, keepdim=True) * energy.sqrt()[:, None]
    density = smooth().div(0.5).exp()
    signals = torch.cat([spectral.signal[None], signal])
    # A density of exactly 0 could not grow again: p enters squared.
    floored = torch.cat([spectral.density[None] + 0.1 / n, density])
    return signals, floored / floored.sum(-1, keepdim=True)


class _Descent:
    """Many problems at once, each with its own damping and weight of smoothness."""

    def __init__(self, target: ShiftMoments, signal: Tensor, density: Tensor) -> None:
        self.target = target
        self.floors = noise_floors(target)
        n = signal.shape[-1]
        energy = target.second.diagonal(dim1=-2, dim2=-1).sum(-1)
        self.scale = energy.clamp(min=1e-300).sqrt()
        self.values = torch.cat([signal / self.scale[:, None], density.sqrt()], -1)
        index = torch.arange(n, device=signal.device)
        row, column = torch.triu_indices(n, n, device=signal.device)
        self.pairs = row, column
        # Of a symmetric moment half is enough; entries off the diagonal count twice.
        self.counts = torch.where(row == column, 1.0, 2.0**0.5).to(signal)
        self.ahead = ((column - row)[:, None] + index) % n
        self.behind = ((row - column)[:, None] + index) % n
        k = torch.fft.fftfreq(n, 1 / n, dtype=signal.dtype, device=signal.device)
        wave = torch.fft.fft(torch.eye(n, dtype=signal.dtype, device=signal.device), norm="ortho")
        derivative = (wave.conj().mT * k.square() @ wave).real
        self.roughness = torch.block_diag(derivative, derivative)
        self.damping = torch.full_like(energy, 1e-2)

    def parts(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and density of a table of values, shape (b, 2 n)."""
        v, p = values.chunk(2, -1)
        square = p.square()
        return v * self.scale[:, None], square / square.sum(-1, keepdim=True)

    def residual(self, values: Tensor) -> Tensor:
        """Errors of both moments over their floors; the squared norm is 2 at the truth.

        Returns
        -------
        Tensor, shape (b, n + n (n + 1) / 2)
        """
        first, second = moment_arrays(*self.parts(values))
        one = (first - self.target.first) / self.floors[0][:, None]
        two = (second - self.target.second)[:, self.pairs[0], self.pairs[1]]
        return torch.cat([one, two * (self.counts / self.floors[1][:, None])], -1)

    def rough(self, values: Tensor) -> Tensor:
        """Energy of the derivatives, shape (b,)."""
        return ((values @ self.roughness) * values).sum(-1)

    def jacobian(self, values: Tensor) -> Tensor:
        """Derivatives of the residual, shape (b, n + n (n + 1) / 2, 2 n)."""
        signal, density = self.parts(values)
        p = values.chunk(2, -1)[1]
        n = signal.shape[-1]
        row, column = self.pairs
        copies, weights = circulant(signal), circulant(density)
        # d M2[a, c] / d v_j = rho[a - j] v[c - a + j] + rho[c - j] v[a - c + j].
        ahead, behind = signal[:, self.ahead], signal[:, self.behind]
        by_second = weights[:, row] * ahead + weights[:, column] * behind
        by_signal = torch.cat([weights, by_second], 1)
        by_density = torch.cat([copies, copies[:, row] * copies[:, column]], 1)
        by_p = (by_density - by_density @ density[..., None]) * (2 * p)[:, None, :]
        jacobian = torch.cat([by_signal * self.scale[:, None, None], by_p], -1)
        jacobian[:, :n] /= self.floors[0][:, None, None]
        jacobian[:, n:] *= self.counts[:, None] / self.floors[1][:, None, None]
        return jacobian

    def step(self, values: Tensor, weight: Tensor) -> Tensor:
        """One damped step for every problem; those it would worsen stay and are damped more."""
        residual, jacobian = self.residual(values), self.jacobian(values)
        normal = jacobian.mT @ jacobian + weight[:, None, None] * self.roughness
        gradient = (jacobian.mT @ residual[..., None])[..., 0]
        gradient = gradient + weight[:, None] * (values @ self.roughness)
        size = normal.diagonal(dim1=-2, dim2=-1)
        ridge = self.damping[:, None] * size + 1e-12 * size.amax(-1, keepdim=True)
        move = torch.linalg.solve(normal + torch.diag_embed(ridge), -gradient)
        trial = values + move
        v, p = trial.chunk(2, -1)
        trial = torch.cat([v, p / p.norm(dim=-1, keepdim=True)], -1)
        before = residual.square().sum(-1) + weight * self.rough(values)
        after = self.residual(trial).square().sum(-1) + weight * self.rough(trial)
        better = after < before
        self.damping = torch.where(better, self.damping / 5, self.damping * 4).clamp(1e-9, 1e6)
        return torch.where(better[:, None], trial, values)

    def run(self, config: DirectConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Signal, density, misfit and roughness of every problem."""
        found = self.values.clone()
        misfits = self.misfits(found)
        weight = 2 * misfits / self.rough(found).clamp(min=1e-12)
        for _ in range(config.stages):
            going = (misfits > 1).nonzero()[:, 0]
            if not len(going):
                break
            self.values = found
            part = self.taken(going)
            for _ in range(config.steps):
                part.values = part.step(part.values, weight[going])
            found[going], self.damping[going] = part.values, part.damping
            misfits[going] = part.misfits(part.values)
            weight = weight * config.fall
        return (*self.parts(found), misfits, self.rough(found))

    def misfits(self, values: Tensor) -> Tensor:
        """See `Solution`; shape (b,)."""
        return self.residual(values).square().sum(-1) / 2

    def taken(self, rows: Tensor) -> _Descent:
        """Some of the problems."""
        part = copy.copy(self)
        part.target, part.scale = self.target.take(rows), self.scale[rows]
        part.floors = self.floors[0][rows], self.floors[1][rows]
        part.values, part.damping = self.values[rows], self.damping[rows]
        return part
