"""How well moments determine a map near a solution: the Fisher information, shell by shell.

Of all maps near the solution, those are as likely whose moments differ within the standard errors.
The covariance of the parameters, the inverse of the information with a wide prior, becomes a
variance of each Fourier coefficient; rotations of the whole map, which no image tells, are taken
out. What other solutions far away there are, this does not tell: agreement of starts does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from cryorecon.engines.moments.fit import Fitter, MomentFit
from cryorecon.engines.moments.models import Beads, ViewDensity
from cryorecon.physics.fourier import (
    centred_frequencies,
    fft_centred,
    ifft_centred,
    radius_grid,
)
from cryorecon.physics.masks import Support
from cryorecon.physics.resampling import resample_sums

# Standard deviations of the prior: centres in box sides; logarithms of masses, width and density.
_PRIOR_CENTRE, _PRIOR_LOG = 0.1, 1.0
_STEP, _THIRD_STEP = 2e-3, 0.1
# A free map has no voxels where the support is below this.
_OUTSIDE = 0.01


def expected_fsc(fitter: Fitter, fit: MomentFit) -> Tensor:
    """FSC to expect between the true map and one that the moments allow near the solution.

    ``P / (P + V)`` with P the map's power in a shell and V its variance under the moments' standard
    errors and the model's own error. Derivatives are central differences.

    Parameters
    ----------
    fitter : Fitter
        The moments, with their errors.
    fit : MomentFit
        Its volume model must be Gaussians: few parameters, known rotations.

    Returns
    -------
    Tensor, shape (K + 1,), float64
        By radius in cycles per particle box; 1 at the origin.

    Raises
    ------
    TypeError
        For other volume models.
    """
    model = fit.volume
    if not isinstance(model, Beads):
        raise TypeError("the information is computed for maps of Gaussians")
    radius = fitter.reach
    density = ViewDensity.around(fit.density, fitter.views[-1])
    fit = replace(fit, density=density)
    parameters = [*model.parameters(), density.coefficients]
    transform, shell = _coefficients(model, radius)
    with torch.no_grad():
        slopes = _slopes(lambda: _weighted_moments(fitter, fit), parameters)
        moves = _slopes(transform, parameters)
        information = slopes.T @ slopes + torch.diag(_prior(model, parameters))
        # spread spread' is the covariance of the coefficients.
        root = torch.linalg.cholesky(information)
        spread = torch.linalg.solve_triangular(root, moves.T, upper=False).T
        power = _by_shell(transform()[:, None], shell)
        whitening = power.clamp(min=1e-30).rsqrt()[shell].repeat(2)
        turns = whitening[:, None] * (moves @ _rotations(model, parameters))
        basis = torch.linalg.qr(turns).Q
        spread = whitening[:, None] * spread
        # Whitened, every shell has the power 1.
        variance = _by_shell(spread - basis @ (basis.T @ spread), shell)
    result = 1 / (1 + variance)
    result[0] = 1
    return result.cpu()


def information_bytes(fitter: Fitter, fit: MomentFit) -> float:
    """Memory that `expected_fsc` takes for the derivatives of all entries."""
    count = sum(p.numel() for p in fit.volume.parameters()) + fitter.views[-1].harmonics.shape[1]
    return 16.0 * fitter.targets[-1].count * count


def free_map_share(fitter: Fitter, fit: MomentFit, support: Support | None = None) -> Tensor:
    """Share of each shell's power that the moments fix where nothing but a support is known.

    The map is free: a priori its voxels within the support are independent, filtered to the power
    spectrum of the solution; no sign, no Gaussians. What the moments leave of that prior near the
    solution, by their standard errors and the model's own, is not fixed. Two maps that fit alike
    have about this FSC.

    Parameters
    ----------
    fitter : Fitter
    fit : MomentFit
        Any volume model.
    support : Support, optional
        In the particle box; default the particle's soft ball.

    Returns
    -------
    Tensor, shape (K + 1,), float64
        By radius in cycles per particle box; 1 at the origin.
    """
    radius, size = fitter.reach, 2 * fitter.reach + 2
    with torch.no_grad():
        density = fit.volume.density(fitter.views[-1].size).double()
        within = support or Support(fitter.particle_radius)
        free = _FreeMap.of(resample_sums(density, size), radius, within)
        slopes = torch.cat([_free_slopes(fitter, fit, free), _density_slopes(fitter, fit)], 1)
        information = slopes.T @ slopes
        information.diagonal().add_(1.0)
        root = torch.linalg.cholesky(information)
        columns = free.whitened
        still = columns.new_zeros(len(columns), slopes.shape[1] - columns.shape[1])
        moves = torch.cat([columns, still], 1)
        spread = torch.linalg.solve_triangular(root, moves.T, upper=False).T
        spread = spread - free.turns @ (free.turns.T @ spread)
        left = _by_shell(spread, free.shell) / _by_shell(columns, free.shell).clamp(min=1e-30)
    result = 1 - left
    result[0] = 1
    return result.cpu()


@dataclass(frozen=True)
class _FreeMap:
    """Voxels of a support as unknowns, each filtered to a map's power by shell.

    Coefficients are real parts, then imaginary, of the Fourier coefficients up to a radius; in
    units of the map's root mean square at their shell they are called whitened.
    """

    size: int
    inside: Tensor
    shell: Tensor
    gain: Tensor
    whitened: Tensor
    turns: Tensor

    @staticmethod
    def of(volume: Tensor, radius: int, support: Support) -> _FreeMap:
        size, device = len(volume), volume.device
        distance = radius_grid(size, 3, device)
        inside = distance <= radius + 0.49
        shell = (distance[inside] + 0.5).long()
        spectrum = fft_centred(volume, 3)
        power = _by_shell(_parts(spectrum[inside])[:, None], shell)
        gain = (power / torch.bincount(shell)).clamp(min=1e-30).sqrt()[shell]
        where = support.on(size, volume.dtype, device)
        kept = where > _OUTSIDE
        units = torch.zeros(int(kept.sum()), size, size, size, dtype=volume.dtype, device=device)
        units[:, kept] = torch.diag(where[kept])
        columns = _parts(fft_centred(units, 3)[:, inside]).T
        # A prior of unit power by coefficient.
        columns = columns * (len(columns) / 2 / columns.square().sum()).sqrt()
        turned = _parts(_turned(spectrum)[:, inside] / gain).T
        return _FreeMap(size, inside, shell, gain, columns, torch.linalg.qr(turned).Q)

    def map_of(self, number: int) -> Tensor:
        """The map of one unknown."""
        real, imaginary = self.whitened[:, number].chunk(2)
        spectrum = torch.zeros(self.inside.shape, dtype=torch.complex128, device=real.device)
        spectrum[self.inside] = torch.complex(real, imaginary) * self.gain
        return ifft_centred(spectrum, 3).real


def _parts(values: Tensor) -> Tensor:
    return torch.cat([values.real, values.imag], -1)


def _turned(spectrum: Tensor) -> Tensor:
    """Transforms of the map's derivatives by rotations about x, y and z, shape (3, N, N, N)."""
    size = len(spectrum)
    axis = centred_frequencies(size, spectrum.device).double()
    # (x, y, z) of every voxel, and (kx, ky, kz) of every coefficient.
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).flip(0)
    slopes = ifft_centred(2j * torch.pi / size * grid * spectrum, 3).real
    return fft_centred(torch.linalg.cross(grid, slopes, dim=0), 3)


def _free_slopes(fitter: Fitter, fit: MomentFit, free: _FreeMap) -> Tensor:
    """Weighted moments by unknown; second moments are quadratic: their differences are exact."""
    target, views = fitter.targets[-1], fitter.views[-1]
    weights = fit.density.probabilities(views)
    at = fit.volume.harmonics(views)
    # Third moments are cubic: small steps, at the price of digits of single precision.
    size = 1.0 if views.third is None else _THIRD_STEP
    columns = []
    for number in range(free.whitened.shape[1]):
        moved = resample_sums(free.map_of(number), views.size)
        step = views.slices.harmonics(moved.to(at.real.dtype))
        ends = [
            target.whitened(*views.moments(at + sign * size * step, *weights)) for sign in (1, -1)
        ]
        columns.append((ends[0] - ends[1]) / (2 * size))
    return torch.stack(columns, -1)


def _density_slopes(fitter: Fitter, fit: MomentFit) -> Tensor:
    """Weighted moments by the harmonics of the density of views."""
    density = ViewDensity.around(fit.density, fitter.views[-1])
    fit = replace(fit, density=density)
    return _PRIOR_LOG * _slopes(lambda: _weighted_moments(fitter, fit), [density.coefficients])


def _coefficients(model: Beads, radius: int) -> tuple[Callable[[], Tensor], Tensor]:
    """The map's Fourier coefficients up to a radius, real parts then imaginary; their shells."""
    size = 2 * (2 * radius + 2)
    distance = radius_grid(size, 3, model.centres.device)
    inside = distance <= radius + 0.49
    shell = (distance[inside] + 0.5).long()

    def transform() -> Tensor:
        values = fft_centred(model.density(size).double(), 3)[inside]
        return torch.cat([values.real, values.imag])

    return transform, shell


def _weighted_moments(fitter: Fitter, fit: MomentFit) -> Tensor:
    """Both moments in units of their standard errors."""
    target, views = fitter.targets[-1], fitter.views[-1]
    return target.whitened(
        *views.moments(fit.volume.harmonics(views), *fit.density.probabilities(views))
    )


def _slopes(function: Callable[[], Tensor], parameters: list[torch.nn.Parameter]) -> Tensor:
    """Central differences of a function with each parameter; shape (outputs, parameters)."""
    at = parameters_to_vector(parameters).clone()
    columns = []
    for number in range(len(at)):
        ends = []
        for sign in (1, -1):
            moved = at.clone()
            moved[number] += sign * _STEP
            vector_to_parameters(moved, parameters)
            ends.append(function())
        columns.append((ends[0] - ends[1]) / (2 * _STEP))
    vector_to_parameters(at, parameters)
    return torch.stack(columns, -1)


def _prior(model: Beads, parameters: list[torch.nn.Parameter]) -> Tensor:
    """Inverse variances of all parameters."""
    widths = [_PRIOR_CENTRE if p is model.centres else _PRIOR_LOG for p in parameters]
    parts = [torch.full((p.numel(),), w**-2.0) for p, w in zip(parameters, widths, strict=True)]
    return torch.cat(parts).double().to(model.centres.device)


def _rotations(model: Beads, parameters: list[torch.nn.Parameter]) -> Tensor:
    """How the parameters of the map move under rotations about three axes; shape (p, 3)."""
    turned = []
    for axis in torch.eye(3, device=model.centres.device):
        moved = torch.linalg.cross(axis.expand_as(model.centres), model.centres)
        parts = [moved if p is model.centres else torch.zeros_like(p) for p in parameters]
        turned.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(turned, -1)


def _by_shell(values: Tensor, shell: Tensor) -> Tensor:
    """Squares summed by shell; real and imaginary parts below each other, shape (2 c, k)."""
    squares = values.square().sum(-1)
    total = squares[: len(shell)] + squares[len(shell) :]
    return torch.zeros(int(shell.max()) + 1, dtype=total.dtype, device=total.device).index_add(
        0, shell, total
    )
