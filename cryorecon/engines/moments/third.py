"""The third moment of in-plane averaged images, on the circles of the lowest radii.

Third moments of whole images are too many; those of a subspace are not (Hoskins, Khoo, Mickelin,
Singer and Wang 2024, arXiv:2410.06889). The subspace here is fixed before any image is read, so
that sums of different files add up: the angular harmonics s_m(k) at radii 1 to R. Of their
products, uniform in-plane rotations leave

    M3(m, m'; k, k', k'') = E s_m(k) s_m'(k') s_{m+m'}(k'')*,   0 <= m <= m', m + m' <= M;

all other triples follow by conjugation, ``s_{-m} = (-1)^m conj s_m``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def order_pairs(max_order: int) -> Tensor:
    """Pairs ``m <= m'`` with ``m + m' <= M`` in the order of the third moment, shape (pairs, 2)."""
    return torch.tensor(
        [(m, other) for m in range(max_order // 2 + 1) for other in range(m, max_order - m + 1)]
    )


def n_pairs(max_order: int) -> int:
    """Pairs of orders ``m <= m'`` with ``m + m' <= M``."""
    return sum(max_order - 2 * m + 1 for m in range(max_order // 2 + 1))


def third_moment(
    harmonics: Tensor, weights: Tensor, antipode_weights: Tensor | None = None
) -> Tensor:
    """The third moment of views, or the sum over images with weights 1; differentiable.

    Parameters
    ----------
    harmonics : Tensor, shape (q, R, M + 1), complex
        Of central slices or of images, at the R lowest radii and for the orders wanted.
    weights : Tensor, shape (q,), real
        Probability of each viewing direction.
    antipode_weights : Tensor, shape (q,), real, optional
        Probability of the opposite directions, whose products are conjugate.

    Returns
    -------
    Tensor, shape (pairs, R, R, R), complex
        Pairs in the order of :func:`order_pairs`; radii of s_m, s_m', s_{m+m'}.
    """
    one, other, both = _by_pair(harmonics)
    # Directions innermost, real numbers throughout: Re a b* = (Re a, Im a) . (Re b, Im b), and the
    # imaginary part that of (Re a, Im a) with i b. Conjugate products differ in its sign alone.
    opposite = torch.zeros_like(weights) if antipode_weights is None else antipode_weights
    real, imaginary = both * (weights + opposite), both * ((weights - opposite) * 1j)
    right = torch.view_as_real(torch.cat([real, imaginary], 1)).flatten(2)
    left = torch.view_as_real(one[:, :, None] * other[:, None]).flatten(3).flatten(1, 2)
    parts = (left @ right.mT).unflatten(1, (harmonics.shape[1],) * 2).chunk(2, -1)
    return torch.complex(*parts)


def third_of_powers(powers: Tensor) -> Tensor:
    """Sum of ``p_m(k) p_m'(k') p_{m+m'}(k'')`` over images: (b, R, M + 1) to (pairs, R, R, R)."""
    one, other, both = _by_pair(powers)
    left = (one[:, :, None] * other[:, None]).flatten(1, 2)
    return (left @ both.mT).unflatten(1, (powers.shape[1],) * 2)


def _by_pair(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orders m, m' and m + m' of (q, R, M + 1), shape (pairs, R, q) each."""
    pairs = order_pairs(s.shape[2] - 1).to(s.device)
    rows = s.permute(2, 1, 0).contiguous()
    one, other, both = (rows.index_select(0, row) for row in (*pairs.T, pairs.sum(1)))
    return one, other, both


def noise_in_third(first: Tensor, noise: Tensor) -> Tensor:
    """What Gaussian noise adds: a mean times the covariance of the other two, three ways.

    Only circles of order 0 have a mean, so that all else vanishes.

    Parameters
    ----------
    first : Tensor, shape (R,), real
        Mean of s_0.
    noise : Tensor, shape (M + 1, R, R, R), complex
        ``E n_m(k') n_m(k'')*`` summed with the weight of the mean at the first of its radii.

    Returns
    -------
    Tensor, shape (pairs, R, R, R), complex
    """
    orders, radii = noise.shape[:2]
    result = noise.new_zeros(n_pairs(orders - 1), radii, radii, radii)
    # m = 0: s_0(k) times the covariance of s_m'(k') and s_m'(k'').
    result[:orders] = first[:, None, None] * noise
    # Both m and m' are 0: all three are real circles of order 0.
    own = result[0].clone()
    result[0] = own + own.permute(1, 0, 2) + own.permute(1, 2, 0)
    return result


def multiplicity(max_order: int, radii: int) -> Tensor:
    """How often each entry, or its conjugate, stands in the third moment; (pairs, R, R, R)."""
    k = torch.arange(radii)
    one, two, three = torch.meshgrid(k, k, k, indexing="ij")
    pairs = order_pairs(max_order)
    counts = torch.ones(len(pairs), radii, radii, radii, dtype=torch.float64)
    for row, (m, other) in enumerate(pairs.tolist()):
        if other == 0:
            alike = (one == two).long() + (two == three).long() + (one == three).long()
            counts[row] = torch.tensor([6.0, 3.0, 1.0, 1.0]).double()[alike]
        elif m == 0:
            counts[row] += (two != three).double()
        elif other == m:
            counts[row] += (one != two).double()
    return counts


@dataclass(frozen=True)
class ThirdTarget:
    """Third moments that a fit is asked for, every radius of power 1.

    Attributes
    ----------
    scale : Tensor, shape (R,)
        What harmonics are multiplied by, radius by radius.
    max_order : int
    value : Tensor, shape (pairs, R, R, R), complex
    weight : Tensor, same shape, real
        Inverse variances by real and imaginary part; an entry that stands there several times
        shares its weight among them.
    count : float
        Real and imaginary parts, each once.
    """

    scale: Tensor
    max_order: int
    value: Tensor
    weight: Tensor
    count: float

    @staticmethod
    def of(
        third: Tensor, error: Tensor, power: Tensor, orders: list[int], model_error: float
    ) -> ThirdTarget:
        """Entries of the lowest radii, as many as `power` has, and of the orders found there.

        Parameters
        ----------
        third, error : Tensor, shape (pairs, R, R, R)
        power : Tensor, shape (r,)
            Of each radius to be used, over all orders; r at most R.
        orders : list of int, length r
            Largest order that the particle has at each radius.
        model_error : float
            Of an entry, relative to the power of its radii.
        """
        held, r = _order_of(len(third)), len(power)
        order = min(held, orders[-1])
        kept = order_pairs(held).sum(1) <= order
        scale = power.rsqrt()
        cube = scale[:, None, None] * scale[:, None] * scale
        value, error = (x[kept][:, :r, :r, :r] * cube for x in (third, error))
        largest = torch.tensor(orders)
        m, other = order_pairs(order).T[:, :, None]
        one, two, three = (largest >= x for x in (m, other, m + other))
        inside = one[:, :, None, None] & two[:, None, :, None] & three[:, None, None, :]
        parts = torch.where(real_entries(order, r), 1.0, 2.0).double() / multiplicity(order, r)
        parts = parts * (inside & error.isfinite())
        weight = parts / (error.nan_to_num(posinf=0.0) ** 2 + model_error**2)
        return ThirdTarget(scale, order, value, weight, float(parts.sum()))

    def to(self, device: str) -> ThirdTarget:
        """Single precision on a device."""
        return replace(
            self,
            scale=self.scale.to(device, torch.float32),
            value=self.value.to(device, torch.complex64),
            weight=self.weight.to(device, torch.float32),
        )

    def seen(self, harmonics: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """The third moment of slices under probabilities of their directions, scaled."""
        r = len(self.scale)
        low = harmonics[:, :r, : self.max_order + 1] * self.scale[:, None]
        return third_moment(low, one, other)

    def misfit(self, third: Tensor) -> Tensor:
        """Weighted squares of what is left."""
        return (self.weight * (third - self.value).abs().square()).sum()

    def whitened(self, third: Tensor) -> Tensor:
        """In units of standard errors, real and imaginary parts; float64."""
        root = self.weight.sqrt()
        return torch.cat(
            [part.double().flatten() for part in (root * third.real, root * third.imag)]
        )


def _order_of(pairs: int) -> int:
    order = 0
    while n_pairs(order) < pairs:
        order += 1
    return order


def real_entries(max_order: int, radii: int) -> Tensor:
    """Entries without an imaginary part, shape (pairs, R, R, R), bool."""
    k = torch.arange(radii)
    result = torch.zeros(n_pairs(max_order), radii, radii, radii, dtype=torch.bool)
    result[: max_order + 1] = k[:, None] == k
    result[0] = True
    return result
