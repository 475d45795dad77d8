"""Multireference alignment in one dimension: the model, its moments, errors of estimates.

Observations are circularly shifted copies of one signal with white noise (Khoo, Paul, Sharon 2024,
equations 2 and 23). Moments are kept over samples rather than frequencies: the unitary Fourier
transform of the paper changes no Frobenius norm, and real arrays are half as large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_UPSAMPLING = 16


@dataclass(frozen=True)
class ShiftMoments:
    """First and second moments of b problems.

    Attributes
    ----------
    first : Tensor, shape (b, n)
        Mean observation.
    second : Tensor, shape (b, n, n)
        Mean outer product of an observation with itself, the noise's share subtracted.
    first_noise, second_noise : Tensor, shape (b,)
        Expected Frobenius norm of their statistical error; 0 for exact moments.
    """

    first: Tensor
    second: Tensor
    first_noise: Tensor
    second_noise: Tensor

    def take(self, rows: Tensor | slice) -> ShiftMoments:
        """Some of the problems."""
        return ShiftMoments(
            self.first[rows], self.second[rows], self.first_noise[rows], self.second_noise[rows]
        )

    def to(self, dtype: torch.dtype) -> ShiftMoments:
        """The same in another precision."""
        return ShiftMoments(
            self.first.to(dtype),
            self.second.to(dtype),
            self.first_noise.to(dtype),
            self.second_noise.to(dtype),
        )

    def plus(self, constant: float | Tensor) -> ShiftMoments:
        """Moments of observations that have a constant added, shape (b,) or one for all.

        Errors are those of sums of independent ones, which is no less than they are.
        """
        added = torch.as_tensor(constant).to(self.first).expand(len(self.first))[:, None]
        cross = added[..., None] * self.first[:, :, None].expand_as(self.second)
        second = self.second + cross + cross.mT + added[..., None].square()
        n = self.first.shape[-1]
        crossed = 2 * added[:, 0].abs() * n**0.5 * self.first_noise
        return ShiftMoments(
            self.first + added, second, self.first_noise, self.second_noise.hypot(crossed)
        )

    def fourier(self) -> tuple[Tensor, Tensor]:
        """Equation 6: ``F M1`` and ``F M2 F*`` with the unitary transform F, complex."""
        first = torch.fft.fft(self.first, norm="ortho")
        half = torch.fft.fft(self.second, dim=-2, norm="ortho")
        return first, torch.fft.ifft(half, dim=-1, norm="ortho")


def concatenated(parts: list[ShiftMoments]) -> ShiftMoments:
    """Problems of several sets as one set."""
    return ShiftMoments(
        torch.cat([p.first for p in parts]),
        torch.cat([p.second for p in parts]),
        torch.cat([p.first_noise for p in parts]),
        torch.cat([p.second_noise for p in parts]),
    )


def shifted(signal: Tensor, by: Tensor) -> Tensor:
    """Move periodic signals by any number of samples, as trigonometric polynomials (equation 3).

    Parameters
    ----------
    signal : Tensor, shape (..., n)
    by : Tensor, shape (...)
        In samples, positive towards larger indices.
    """
    n = signal.shape[-1]
    k = torch.arange(n // 2 + 1, dtype=signal.dtype, device=signal.device)
    angle = (-2 * math.pi / n) * k * by[..., None].to(signal)
    return torch.fft.irfft(torch.fft.rfft(signal) * torch.polar(torch.ones_like(angle), angle), n=n)


def circulant(signal: Tensor) -> Tensor:
    """All shifted copies, one a column: shape (..., n) to (..., n, n)."""
    n = signal.shape[-1]
    index = torch.arange(n, device=signal.device)
    return signal[..., (index[:, None] - index) % n]


def exact_moments(signal: Tensor, density: Tensor) -> ShiftMoments:
    """Moments of noise-free observations (equation 25).

    Parameters
    ----------
    signal, density : Tensor, shape (b, n)
        The density holds the probability of each whole shift; its rows sum to 1.
    """
    first, second = moment_arrays(signal, density)
    none = first.new_zeros(len(first))
    return ShiftMoments(first, second, none, none)


def moment_arrays(signal: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
    """The two arrays of `exact_moments`, differentiable, shapes (..., n) and (..., n, n)."""
    n = signal.shape[-1]
    # Windows v[a + m] are a view of the signal written twice; circulant's copies are v[a - l].
    windows = torch.cat([signal, signal[..., :-1]], -1).unfold(-1, n, 1)
    weighted = windows * density.flip(-1).roll(1, -1)[..., None, :]
    return weighted.sum(-1), weighted @ windows.mT


def observe(
    signal: Tensor, density: Tensor, count: int, noise_std: float, generator: torch.Generator
) -> Tensor:
    """Draw observations of one problem (equation 23).

    Parameters
    ----------
    signal, density : Tensor, shape (n,)

    Returns
    -------
    Tensor, shape (count, n), dtype of the signal
    """
    n = len(signal)
    drawn = torch.multinomial(density, count, replacement=True, generator=generator)
    noise = torch.randn(count, n, generator=generator, dtype=signal.dtype, device=signal.device)
    return circulant(signal).mT[drawn] + noise_std * noise


class ShiftMomentSums:
    """Sums over observations that come block by block; memory does not grow with their number.

    Attributes
    ----------
    baseline : float
        What is taken from all values first; 0 unless set before the first of them.
    """

    def __init__(self, n: int) -> None:
        self.count, self.baseline = 0, 0.0
        self._first = torch.zeros(n, dtype=torch.float64)
        self._second = torch.zeros(n, n, dtype=torch.float64)
        self._fourth = torch.zeros(n, n, dtype=torch.float64)

    def add(self, block: Tensor) -> None:
        """Add observations, shape (m, n)."""
        # A block's sums may be taken in its own precision; the total is kept in float64.
        if self.baseline != 0:
            block = (block.double() - self.baseline).to(block.dtype)
        squares = block.square()
        self.count += len(block)
        self._first += block.sum(0).double()
        self._second += (block.mT @ block).double()
        self._fourth += (squares.mT @ squares).double()

    def raw_second(self) -> Tensor:
        """Mean outer product with the noise's share still in it, shape (n, n), float64."""
        return self._second / self.count

    def moments(self, noise_std: float) -> ShiftMoments:
        """Unbiased estimates (equation 24) with their expected errors, one problem, float64.

        Of the observations less the baseline.

        The variance of each mean comes from the observations' own second and fourth powers.
        """
        n = len(self._first)
        first, second = self._first / self.count, self.raw_second()
        first_variance = (second.diagonal() - first.square()).sum() / self.count
        second_variance = (self._fourth / self.count - second.square()).sum() / self.count
        debiased = second - noise_std**2 * torch.eye(n, dtype=second.dtype)
        return ShiftMoments(
            first[None],
            debiased[None],
            first_variance.clamp(min=0).sqrt()[None],
            second_variance.clamp(min=0).sqrt()[None],
        )


def estimate_noise_std(raw_second: Tensor, count: int) -> tuple[float, int]:
    """Standard deviation of white noise from the smallest eigenvalues of the raw second moment.

    Smooth signals fill only some of the n dimensions; in the others the eigenvalues are those of
    noise alone, which spread no further than the Marchenko-Pastur edge. The longest run of smallest
    eigenvalues that stays below it counts as noise.

    Parameters
    ----------
    raw_second : Tensor, shape (n, n), float64
    count : int
        Observations behind it.

    Returns
    -------
    noise_std : float
    dimensions : int
        How many eigenvalues it is the mean of; 0 where none could be told from the signal's.
    """
    values = torch.linalg.eigvalsh(raw_second)
    n = len(values)
    sizes = torch.arange(1, n + 1, dtype=values.dtype)
    means = values.cumsum(0) / sizes
    ratio = sizes / count
    # Edge of the noise's spectrum, with a little room for its Tracy-Widom fluctuation.
    edge = (1 + ratio.sqrt()).square() + 3 * ratio.sqrt() * sizes.pow(-2 / 3)
    noise = (values <= means * edge).long().cumprod(0)
    dimensions = int(noise.sum())
    if dimensions < max(3, n // 8) or float(means[dimensions - 1]) <= 0:
        return 0.0, 0
    # What the run hides of eigenvalues is lost to the signal's dimensions, not to the mean.
    lost = 1 - (n - dimensions) / count
    return float((means[dimensions - 1] / lost).sqrt()), dimensions


def best_shift(estimate: Tensor, truth: Tensor) -> Tensor:
    """Shift of the estimate, in samples, that brings it nearest to the truth; shape (...)."""
    n = truth.shape[-1]
    cross = torch.fft.rfft(truth) * torch.fft.rfft(estimate).conj()
    if n % 2 == 0:
        # A shifted Nyquist term stays real: half of it belongs to each of +-n/2.
        cross = torch.cat([cross[..., :-1], cross[..., -1:] / 2], -1)
    fine = torch.fft.irfft(cross, n=_UPSAMPLING * n)
    shift = fine.argmax(-1).to(truth) / _UPSAMPLING
    k = torch.arange(cross.shape[-1], device=truth.device).to(truth) * (2 * math.pi / n)
    for _ in range(3):
        turned = cross * torch.polar(torch.ones_like(k), k * shift[..., None])
        slope, bend = -(k * turned.imag).sum(-1), -(k.square() * turned.real).sum(-1)
        step = torch.where(bend < 0, slope / bend.clamp(max=-1e-30), torch.zeros_like(slope))
        shift = shift - step.clamp(-0.5 / _UPSAMPLING, 0.5 / _UPSAMPLING)
    return shift


def orbit_error(estimate: Tensor, truth: Tensor) -> Tensor:
    """Equation 21: relative distance after the best circular shift, of any fraction of a sample.

    Parameters
    ----------
    estimate, truth : Tensor, shape (..., n)

    Returns
    -------
    Tensor, shape (...)
        Differentiable in the estimate, the shift held.
    """
    with torch.no_grad():
        shift = best_shift(estimate, truth)
    return (shifted(estimate, shift) - truth).norm(dim=-1) / truth.norm(dim=-1)


def moment_errors(signal: Tensor, density: Tensor, target: ShiftMoments) -> tuple[Tensor, Tensor]:
    """Equation 22: relative errors of the first and the second moment, shape (b,) each."""
    first, second = moment_arrays(signal, density)
    return (
        (first - target.first).norm(dim=-1) / target.first.norm(dim=-1),
        (second - target.second).norm(dim=(-2, -1)) / target.second.norm(dim=(-2, -1)),
    )


def first_phase(values: Tensor) -> Tensor:
    """Where the first harmonic has its crest, in samples from sample 0; shape (...)."""
    n = values.shape[-1]
    return torch.fft.rfft(values)[..., 1].angle() * (-n / (2 * math.pi))


def canonical(signal: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
    """The member of the orbit whose signal has its first harmonic's crest at sample 0.

    The density moves the other way, so that the moments stay: a regression needs one target. By
    fractions of a sample they stay for signals of up to n / 4 cycles; beyond that the density's
    frequencies alias.
    """
    crest = first_phase(signal)
    return shifted(signal, -crest), shifted(density, crest)


def moved(target: ShiftMoments, by: Tensor) -> ShiftMoments:
    """Moments of the observations shifted by `by` samples, shape (b,)."""
    rows = shifted(target.second.mT, by[:, None])
    return ShiftMoments(
        shifted(target.first, by),
        shifted(rows.mT, by[:, None]),
        target.first_noise,
        target.second_noise,
    )
