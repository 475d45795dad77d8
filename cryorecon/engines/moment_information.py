"""How well moments determine a map near a solution: the Fisher information, shell by shell.

Of all maps near the solution, those are as likely whose moments differ within the standard errors.
The covariance of the parameters, the inverse of the information with a wide prior, becomes a
variance of each Fourier coefficient; rotations of the whole map, which no image tells, are taken
out. What other solutions far away there are, this does not tell: agreement of starts does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from cryorecon.engines.moment_fit import Fitter, MomentFit
from cryorecon.engines.moment_models import Beads, ViewDensity
from cryorecon.physics.fourier import fft_centred, radius_grid

# Standard deviations of the prior: centres in box sides; logarithms of masses, width and density.
_PRIOR_CENTRE, _PRIOR_LOG = 0.1, 1.0
_STEP = 2e-3


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
