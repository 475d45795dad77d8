"""Sums for moments in the steerable form: in-plane averaged, any CTF, coloured noise.

With the CTF's angular harmonics ``c_l`` and those ``D_l`` of its square, the harmonics z_m of
``C y`` obey, whatever the astigmatism, averaged over uniform in-plane rotations

    E z_m(k) z_m(k')* = sum_p D_{m-p}(k) D_{m-p}(k')* M2_p(k, k') + sum_p c_{m-p} c'_{m-p}* B_p,

so that a Toeplitz system in m stands for each pair of radii; without astigmatism it is the
division by ``sum C^2 C'^2``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cryorecon.engines.moments.forms import MomentsGeometry, SteerableMoments
from cryorecon.engines.moments.sums import (
    MomentBatch,
    contrast_of,
    divided,
    first_sign,
    is_measured,
    shifted,
    standard_error,
)
from cryorecon.engines.moments.sums_third import (
    ThirdNoise,
    add_third,
    finished_third,
    third_shapes,
)
from cryorecon.physics.fourier import half_plane
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.polar import PolarTransform, noise_by_shell

# Angular harmonics 0, 2, ..., 8 of the CTF and of its square: enough for phase differences of
# up to about 1.5 rad between the axes of astigmatism.
_CTF_HARMONICS = 5
# Pivots below this share of the diagonal are not trusted.
_LEAST_PIVOT = 1e-3
_COMPLEX = ("second", "weight", "spread", "third")
# Of the polar transform, as a share of the root mean square sample at a radius.
_INTERPOLATION_ERROR = 3e-6


class SteerableSums:
    """Sums over images in the steerable form.

    ``arrays`` (float64 or complex128; K radii, M orders, S shells, H even CTF harmonics):

    ================ ================== ==========================================
    first            (K,)               sum z_0
    first_square     (K,)               sum z_0^2
    first_weight     (K,)               sum D_0
    second           (M + 1, K, K)      sum z_m(k) z_m(k')*
    second_square    (M + 1, K, K)      sum |z_m(k) z_m(k')|^2
    weight           (H, K, K)          sum D_l(k) D_l(k')*, l = 0, 2, ...
    spread           (H, S, K, K)       sum c_l(k) c_l(k')* P(s)
    noise_power      (S,)               sum P(s)
    ================ ================== ==========================================

    With third moments besides those of :mod:`cryorecon.engines.moments.sums_third`.
    """

    def __init__(
        self,
        geometry: MomentsGeometry,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.geometry, self.n_images = geometry, 0
        self._grid, self._device, self._dtype = geometry.image_grid(), device, dtype
        self._transform = PolarTransform(geometry.box, self._grid, dtype, device)
        n_shells = half_plane(geometry.box).n_shells
        K, orders, H = geometry.max_radius, geometry.max_order + 1, _CTF_HARMONICS
        shapes = {
            "first": (K,),
            "first_square": (K,),
            "first_weight": (K,),
            "second": (orders, K, K),
            "second_square": (orders, K, K),
            "weight": (H, K, K),
            "spread": (H, n_shells, K, K),
            "noise_power": (n_shells,),
            **third_shapes(geometry, n_shells),
        }
        self.arrays: dict[str, Tensor] = {
            name: torch.zeros(
                shape,
                dtype=torch.complex128 if name in _COMPLEX else torch.float64,
                device=device,
            )
            for name, shape in shapes.items()
        }

    @property
    def frequencies(self) -> Tensor:
        """(kx, ky) in cycles per image box where the CTF is wanted, shape (p, 2), float64."""
        return self._grid.points

    def add(self, batch: MomentBatch) -> None:
        """Add images."""
        samples = self._transform.samples(batch.images.to(self._device, self._dtype))
        count, shape = len(batch), samples.shape
        samples = shifted(
            samples.flatten(1), batch.offsets_px, self._grid.points, self.geometry.box
        ).view(shape)
        if batch.ctf is None:
            gain = torch.ones(1, *shape[1:2], 1, dtype=self._dtype, device=self._device)
        else:
            gain = batch.ctf.to(self._device, self._dtype).view(shape)
        z = self._grid.harmonics(samples * gain).to(torch.complex128)
        self._add_signal(z)
        power = batch.noise_power.to(self._device, torch.float64)
        plain, squared = self._add_weights(gain, power)
        if self.geometry.third_radius:
            add_third(self.arrays, self.geometry, z, squared[0].real, plain[0].real, power)
        self.n_images += count

    def _add_signal(self, z: Tensor) -> None:
        sums, first = self.arrays, z[:, :, 0].real
        sums["first"] += first.sum(0)
        sums["first_square"] += first.square().sum(0)
        by_order = z.permute(2, 1, 0)
        sums["second"] += by_order @ by_order.mH
        power = by_order.abs().square()
        sums["second_square"] += power @ power.mT

    def _add_weights(self, gain: Tensor, noise_power: Tensor) -> tuple[Tensor, Tensor]:
        """The weights; gives the even harmonics of the CTF and of its square, (H, b, K)."""
        sums = self.arrays
        squared = self._even_harmonics(gain**2).expand(-1, len(noise_power), -1)
        plain = self._even_harmonics(gain).expand(-1, len(noise_power), -1)
        sums["first_weight"] += squared[0].real.sum(0)
        sums["weight"] += squared.mT @ squared.conj()
        pairs = plain[..., :, None] * plain[..., None, :].conj()
        power = noise_power.to(pairs.dtype).T.contiguous()
        sums["spread"] += (power @ pairs.flatten(2)).view(sums["spread"].shape)
        sums["noise_power"] += noise_power.sum(0)
        return plain, squared

    def _even_harmonics(self, values: Tensor) -> Tensor:
        """Harmonics 0, 2, ... of real functions of period pi: (b, K, t) to (H, b, K)."""
        orders = 2 * torch.arange(_CTF_HARMONICS)
        if values.shape[-1] == 1:
            values = values.expand(-1, -1, len(self._grid.angles))
        phases = -self._grid.angles[:, None] * orders
        waves = torch.polar(torch.ones_like(phases), phases) / len(phases)
        return (values.to(torch.complex128) @ waves.to(values.device)).permute(2, 0, 1)

    def finalise(self, progress: Callable[[int, int], None] | None = None) -> SteerableMoments:
        """Subtract the noise, divide by the weights.

        Parameters
        ----------
        progress : callable, optional
            Called with (shells of the noise done, shells in all): what takes long.
        """
        sums = {name: array.cpu() for name, array in self.arrays.items()}
        bias, met = self._noise(sums, progress)
        weight = sums["weight"][0].real
        measured = is_measured(weight)
        both = torch.stack([sums["second"] - bias, bias])
        second, noise = _untangled(both, sums["weight"], measured)
        has_first = is_measured(sums["first_weight"])
        first = divided(sums["first"], sums["first_weight"], has_first)
        args = (sums["first_square"], sums["first"], sums["first_weight"], self.n_images)
        first_error = standard_error(*args)
        second_error = standard_error(
            sums["second_square"], sums["second"], weight.expand_as(second.real), self.n_images
        )
        second_error = torch.hypot(second_error, self._floor(sums["second"], weight))
        geometry = self.geometry
        score = contrast_of(geometry, geometry.radii_per_angst, first, first_error)
        sign = first_sign(geometry, score)
        third = third_error = None
        if met is not None:
            third, third_error = finished_third(sums, met, first, self.n_images)
            third = sign * third
        return SteerableMoments(
            geometry,
            self.n_images,
            first * sign,
            second,
            first_error,
            second_error,
            noise,
            measured,
            weight.min(1).values / weight.max(1).values.clamp(min=1e-300),
            third,
            third_error,
        )

    def _floor(self, second: Tensor, weight: Tensor) -> Tensor:
        """Error of the interpolation, which rules where an order is too high for its radius."""
        by_order = second.diagonal(dim1=1, dim2=2).real.clamp(min=0)
        own = by_order.sqrt()
        whole = _INTERPOLATION_ERROR * (2 * by_order.sum(0) - by_order[0]).sqrt()
        cross = own[:, :, None] * whole
        level = cross + cross.mT + whole[:, None] * whole
        measured = is_measured(weight).expand_as(level)
        return divided(level, weight.expand_as(level), measured)

    def _noise(
        self, sums: dict[str, Tensor], progress: Callable[[int, int], None] | None = None
    ) -> tuple[Tensor, ThirdNoise | None]:
        """What the noise adds to ``second``, shape (M + 1, K, K), and what the third needs."""
        geometry, orders = self.geometry, self.geometry.max_order + 1
        spread, met = sums["spread"], ThirdNoise(geometry) if geometry.third_radius else None
        box = geometry.box
        outside = 1 - soft_ball(box, geometry.diameter / 2 * box, 2.0, 2, torch.float64)
        level = outside / outside.sum()
        reach = 2 * (_CTF_HARMONICS - 1)
        bias = torch.zeros(orders, *spread.shape[2:], dtype=torch.complex128)
        for shell, covariance in enumerate(noise_by_shell(box, self._grid, level)):
            # covariance holds orders -T/2 to T/2 - 1.
            middle = covariance.shape[0] // 2
            for index in range(-(_CTF_HARMONICS - 1), _CTF_HARMONICS):
                coupling = spread[abs(index), shell]
                coupling = coupling if index >= 0 else coupling.conj()
                if abs(2 * index) <= reach and bool(coupling.any()):
                    low = middle - 2 * index
                    bias += coupling * covariance[low : low + orders]
            if met is not None:
                met.add(sums["third_spread"][shell], covariance[middle:])
            if progress is not None:
                progress(shell + 1, spread.shape[1])
        return bias, met


def _untangled(values: Tensor, weight: Tensor, measured: Tensor) -> Tensor:
    """Solve the Toeplitz systems in m of all pairs of radii.

    Even and odd orders stand alone, each banded as the CTF's harmonics are few.

    Parameters
    ----------
    values : Tensor, shape (c, M + 1, K, K), complex
        Right-hand sides; orders below 0 are their conjugates.
    weight : Tensor, shape (H, K, K), complex
    measured : Tensor, shape (K, K), bool
    """
    principal = weight[0].real
    if not bool((weight[1:].abs() > 1e-12 * principal.abs()).any()):
        return divided(values, principal.expand(values.shape), measured.expand(values.shape))
    kept = measured.flatten()
    bands = weight.flatten(1)[:, kept]
    given = values.flatten(2)[:, :, kept]
    whole = torch.cat([given[:, 1:].flip(1).conj(), given], 1)
    solved = torch.zeros_like(whole)
    factors = _banded_factors(bands, len(given[0]))
    for parity in (0, 1):
        solved[:, parity::2] = _substituted(*factors, whole[:, parity::2])
    # Without pivoting: where astigmatism is too much for the harmonics kept, it does not hold.
    weak = (factors[0] < _LEAST_PIVOT * bands[0].real).any(0).nonzero()[:, 0]
    for part in weak.split(64):
        solved[:, :, part] = _dense_solution(bands[:, part], whole[:, :, part])
    result = torch.zeros_like(values).flatten(2)
    result[:, :, kept] = solved[:, len(given[0]) - 1 :]
    return result.view(values.shape)


def _banded_factors(bands: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``L D L*`` of banded Hermitian Toeplitz matrices, all at once.

    Parameters
    ----------
    bands : Tensor, shape (H, p), complex
        The diagonal and those below it, of p matrices.
    count : int
        Rows; the leading ones are the factors of smaller matrices.

    Returns
    -------
    pivots : Tensor, shape (count, p), real
    lower : Tensor, shape (count, H - 1, p), complex
        Column by column, below the diagonal.
    """
    width = len(bands)
    step = torch.arange(width)
    gap = step[:, None] - step
    window = torch.where(gap[..., None] >= 0, bands[gap.abs()], bands[gap.abs()].conj())
    pivots = bands.real.new_empty(count, bands.shape[1])
    lower = bands.new_empty(count, width - 1, bands.shape[1])
    for column in range(count):
        pivots[column] = window[0, 0].real
        lower[column] = window[1:, 0] / pivots[column]
        rest = window[1:, 1:] - lower[column][:, None] * window[0, 1:]
        # The next row and column have not been touched yet.
        window = window.clone()
        window[:-1, :-1] = rest
        window[-1] = bands.flip(0)
        window[:, -1] = bands.flip(0).conj()
    return pivots, lower


def _substituted(pivots: Tensor, lower: Tensor, values: Tensor) -> Tensor:
    """Solve with the factors' leading rows; values and result have shape (c, rows, p)."""
    solved, rows, width = values.clone(), values.shape[1], lower.shape[1]
    for row in range(rows):
        below = slice(row + 1, min(row + 1 + width, rows))
        solved[:, below] -= lower[row, : below.stop - row - 1] * solved[:, row, None]
    for row in reversed(range(rows)):
        below = slice(row + 1, min(row + 1 + width, rows))
        later = (lower[row, : below.stop - row - 1].conj() * solved[:, below]).sum(1)
        solved[:, row] = solved[:, row] / pivots[row] - later
    return solved


def _dense_solution(bands: Tensor, values: Tensor) -> Tensor:
    """The same systems with pivoting; bands (H, p), values (c, rows, p) of all parities."""
    orders = torch.arange(values.shape[1])
    gap = orders[:, None] - orders
    near = (gap % 2 == 0) & (gap.abs() // 2 < len(bands))
    entries = bands.T[:, (gap.abs() // 2).clamp(max=len(bands) - 1)]
    matrix = torch.where(gap >= 0, entries, entries.conj()) * near
    return torch.linalg.solve(matrix, values.permute(2, 1, 0)).permute(2, 1, 0)
