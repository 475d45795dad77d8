"""Fits of moments over Fourier pixels: views have a density on SO(3), not only of directions.

What the steerable form averages away, the in-plane angles, takes part: nodes of the quadrature are
viewing directions times in-plane angles (Khoo, Paul and Sharon 2024, equation 20). A real image
turned by pi is its complex conjugate, so that half a turn is enough, with two weights a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from cryorecon.engines.moments.encoding import smoothed
from cryorecon.engines.moments.forms import FullMoments
from cryorecon.engines.moments.models import ViewDensity, Views, directions_for
from cryorecon.physics.gridding import Kernel
from cryorecon.physics.polar import PolarGrid, PolarSlices
from cryorecon.physics.sphere import frames, lebedev, real_harmonics


@dataclass(frozen=True)
class FullTarget:
    """Moments over Fourier pixels up to a radius, with the weight of each entry.

    Attributes
    ----------
    grid : PolarGrid
        The radii on which the pixels lie, in cycles per particle box.
    ring : Tensor, shape (h,), int64
        Which radius each pixel lies on.
    angle : Tensor, shape (h,), float64
        Where on it, in radians.
    pixel : Tensor, shape (h, 2), int64
        (kx, ky) in cycles per image.
    first : Tensor, shape (h,), complex
    second, pseudo : Tensor, shape (h, h), complex
    first_weight, second_weight : Tensor, real, shapes (h,) and (h, h)
        Inverse variances; those of `second` hold for `pseudo` as well.
    power : Tensor, shape (h,)
        Mean power of the pixels around this radius.
    """

    grid: PolarGrid
    ring: Tensor
    angle: Tensor
    pixel: Tensor
    first: Tensor
    second: Tensor
    pseudo: Tensor
    first_weight: Tensor
    second_weight: Tensor
    power: Tensor

    @staticmethod
    def of(moments: FullMoments, radius: int, model_error: float) -> FullTarget:
        """Pixels up to `radius` cycles per particle box, without the origin."""
        inside = moments.geometry.in_particle_box()
        scale = inside.side_angst / inside.image_side_angst
        pixel = moments.frequencies
        distance = pixel.double().norm(dim=-1)
        kept = ((distance > 0) & (distance * scale <= radius + 1e-6)).nonzero()[:, 0]
        pixel, distance = pixel[kept], distance[kept]
        radii, ring = (pixel**2).sum(-1).unique(return_inverse=True)
        order = inside.order_at(radius)
        reach = math.pi * radius + 10
        grid = PolarGrid(radii.double().sqrt() * scale, 2 * -(-int(order + reach) // 2), order)
        pairs = kept[:, None], kept
        second, pseudo = moments.second[pairs], moments.pseudo[pairs]
        error = moments.second_error[pairs]
        power = _ring_power(second.diagonal().real, error.diagonal(), (distance + 0.5).long())
        by_first = 1 / (moments.first_error[kept] ** 2 + model_error**2 * power)
        by_second = 1 / (error**2 + model_error**2 * power[:, None] * power)
        return FullTarget(
            grid,
            ring,
            torch.atan2(pixel[:, 1].double(), pixel[:, 0].double()),
            pixel,
            moments.first[kept],
            second,
            pseudo,
            by_first,
            by_second,
            power,
        )

    def to(self, device: str) -> FullTarget:
        """Single precision on a device."""
        parts = (self.first, self.second, self.pseudo, self.first_weight, self.second_weight)
        single = [
            p.to(device, torch.complex64 if p.is_complex() else torch.float32)
            for p in (*parts, self.power)
        ]
        return FullTarget(self.grid, self.ring.to(device), self.angle, self.pixel, *single)

    def misfit(self, first: Tensor, second: Tensor, pseudo: Tensor) -> Tensor:
        """Weighted squares of what is left of the moments."""
        one = (self.first_weight * (first - self.first).abs().square()).sum()
        left = (second - self.second).abs().square() + (pseudo - self.pseudo).abs().square()
        return one + (self.second_weight * left).sum()

    def whitened(self, first: Tensor, second: Tensor, pseudo: Tensor) -> Tensor:
        """Both moments in units of their standard errors, real and imaginary parts; float64."""
        root = self.second_weight.sqrt()
        parts = (self.first_weight.sqrt() * first, root * second, root * pseudo)
        return torch.cat([torch.view_as_real(part).double().flatten() for part in parts])

    def total(self, second: Tensor) -> Tensor:
        """Power that a map's amplitude is first set by."""
        return second.diagonal().real.sum()

    def fields(self) -> tuple[Tensor, Tensor]:
        """Both moments over the plane of Fourier pixels, every radius of power 1.

        Shapes (2, n, n) and (2 h, n, n): part and other pixel are channels, as in appendix A.2.
        """
        by = self.power.rsqrt()
        first, pair = self.first * by, by[:, None] * by
        second, pseudo = (torch.nan_to_num(m * pair) for m in (self.second, self.pseudo))
        # Y(-q) is the conjugate of Y(q): row -q of the second moment is that of pseudo*.
        rows = torch.cat([second, pseudo.conj()])
        reach = int(self.pixel.abs().max())
        at = (torch.cat([self.pixel, -self.pixel]) + reach).to(rows.device)
        field = rows.new_zeros(2 * reach + 1, 2 * reach + 1, len(first) + 1)
        values = torch.cat([torch.cat([first, first.conj()])[:, None], rows], 1)
        field[at[:, 1], at[:, 0]] = values
        channels = torch.view_as_real(field).permute(3, 2, 0, 1)
        return channels[:, 0], channels[:, 1:].flatten(0, 1)

    @cached_property
    def count(self) -> float:
        """All measured entries: the scale of a misfit."""
        return len(self.first) + 2 * float((self.second_weight > 0).sum())

    def relative(
        self, first: Tensor, second: Tensor, pseudo: Tensor, *, white: bool
    ) -> tuple[float, float]:
        """Relative Frobenius errors of both moments, every radius of equal power or as it is."""
        by = self.power.rsqrt() if white else torch.ones_like(self.power)
        pair = (self.second_weight > 0) * (by[:, None] * by) ** 2
        one = (by * (first - self.first).abs()).norm() / (by * self.first.abs()).norm()
        left = (second - self.second).abs().square() + (pseudo - self.pseudo).abs().square()
        whole = self.second.abs().square() + self.pseudo.abs().square()
        return float(one), float((pair * left).sum() / (pair * whole).sum()) ** 0.5


def _ring_power(power: Tensor, error: Tensor, shell: Tensor) -> Tensor:
    """Mean over the shell of each pixel; where noise exceeds it, its standard error."""
    size = int(shell.max()) + 1
    count = torch.bincount(shell, minlength=size).clamp(min=1)
    mean = torch.zeros(size, dtype=power.dtype).index_add_(0, shell, power) / count
    noise = torch.zeros(size, dtype=power.dtype).index_add_(0, shell, error**2).sqrt() / count
    return torch.maximum(mean, noise.nan_to_num(posinf=0.0)).clamp(min=1e-30)[shell]


def full_visible(moments: FullMoments, least: float) -> int:
    """Largest radius, in cycles per particle box, up to which the power stands above its error."""
    inside = moments.geometry.in_particle_box()
    scale = inside.side_angst / inside.image_side_angst
    distance = moments.frequencies.double().norm(dim=-1) * scale
    power, error = moments.second.diagonal().real, moments.second_error.diagonal()
    for radius in range(1, inside.max_radius + 1):
        ring = (distance > radius - 1) & (distance <= radius + 1e-6) & (distance > 0)
        if not float(power[ring].sum()) > least * float(error[ring].square().sum().sqrt()):
            return radius - 1
    return inside.max_radius


@dataclass(frozen=True)
class FullViews(Views):
    """Nodes on SO(3): half a sphere of directions and its antipodes times in-plane angles.

    The order of nodes: half turns [0, pi) then [pi, 2 pi), directions, antipodes, angles.

    Attributes
    ----------
    grid : PolarGrid
    size : int
        Voxels a side on which maps are read.
    rotations : Tensor, shape (q, 3, 3), float64
        Of the directions at in-plane angle 0.
    slices : PolarSlices
    log_weights : Tensor, shape (n,)
        Of all nodes.
    harmonics : Tensor, shape (n, functions)
        Smooth functions on SO(3) without the constant.
    nodes : Tensor, shape (n, 3, 3), float64
        Rotations A, reference to image coordinates.
    ring : Tensor, shape (h,)
    even, odd : Tensor, shape (h, parts of orders, 2 a)
        From the harmonics of a slice to real and imaginary parts of its pixels, turned by the
        angles of the half turn; then seen from behind.
    """

    nodes: Tensor
    ring: Tensor
    even: Tensor
    odd: Tensor

    @staticmethod
    def over(
        target: FullTarget,
        size: int,
        density_degree: int,
        in_plane_order: int,
        device: str = "cpu",
        max_order: int | None = None,
    ) -> FullViews:
        """Nodes that sum the second moment of these pixels to about half a percent."""
        grid = target.grid
        order = grid.max_order if max_order is None else max_order
        rule = directions_for(order, density_degree)
        half_turn = -(-(int(1.6 * order) + 2 * in_plane_order + 2) // 2)
        angles = torch.arange(half_turn).double() * (math.pi / half_turn)
        front = frames(rule.directions)
        behind = front * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)[:, None]
        sides = torch.stack([front, behind], 1).flatten(0, 1)
        whole = torch.cat([angles, angles + math.pi])
        nodes = _turned(sides, whole)
        functions = _smooth_functions(sides, whole, density_degree, in_plane_order)
        weights = (rule.weights / (4 * half_turn)).repeat_interleave(2 * half_turn).repeat(2)
        even, odd = _synthesis(target.angle, angles, grid.max_order)
        slices = PolarSlices(size, grid, front, device=device, kernel=Kernel(4))
        return FullViews(
            grid,
            size,
            front.to(device),
            slices,
            weights.log().float().to(device),
            functions.float().to(device),
            nodes,
            target.ring.to(device),
            even.to(device),
            odd.to(device),
        )

    @property
    def directions(self) -> Tensor:
        """Viewing direction of every node, in the order of `log_weights`; shape (n, 3)."""
        return self.nodes[:, 2]

    def moments(self, harmonics: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        """First, second and pseudo moment of slices under probabilities of all nodes.

        Parameters
        ----------
        harmonics : Tensor, shape (q, rings, M + 1), complex
        one, other : Tensor, shape (n / 2,)
            Of the nodes of both half turns.
        """
        by_pixel = harmonics[:, self.ring].permute(1, 0, 2)
        parts = [
            (torch.view_as_real(by_pixel[..., parity::2].contiguous()).flatten(2) @ table).flatten(
                1
            )
            for parity, table in ((0, self.even), (1, self.odd))
        ]
        a, b = parts
        both, apart = one + other, one - other
        aa, bb, ba = (a * both) @ a.mT, (b * both) @ b.mT, (b * apart) @ a.mT
        first = torch.complex(a @ both, b @ apart)
        return first, torch.complex(aa + bb, ba - ba.mT), torch.complex(aa - bb, ba + ba.mT)


class RotationDensity(ViewDensity):
    """Probabilities of rotations: a softmax of smooth functions on SO(3).

    Parameters
    ----------
    degree : int
        Of the functions.
    views : FullViews
        Of the last stage.
    """

    def __init__(self, degree: int, views: FullViews) -> None:
        super().__init__(degree)
        self.coefficients = nn.Parameter(torch.zeros(views.harmonics.shape[1]))
        self._views = views

    def over_uniform(self, directions: Tensor) -> Tensor:
        """Of viewing directions, in-plane angles together, smoothed over neighbouring nodes."""
        with torch.no_grad():
            found = torch.cat(self.probabilities(self._views)).cpu()
        return smoothed(found, self._views, directions)


def in_plane_departure(probabilities: Tensor, views: FullViews) -> float:
    """How far in-plane angles are from uniform: 0, or 1 where their density varies as its mean.

    Root mean square over the views of the density of angles at a direction over its mean, less 1.
    It does not depend on the frame of the map.
    """
    by_side = probabilities.view(2, -1, views.even.shape[-1] // 2).transpose(0, 1).flatten(1)
    ratio = by_side * by_side.shape[1] / by_side.sum(1, keepdim=True).clamp(min=1e-30)
    spread = (ratio - 1).square().mean(1)
    return float((by_side.sum(1) * spread).sum().sqrt())


def _synthesis(angle: Tensor, turns: Tensor, max_order: int) -> tuple[Tensor, Tensor]:
    """Tables from (real, imaginary) of even and of odd orders to pixels; float32.

    ``Y(theta) = s_0 + sum over m > 0 of s_m e^(i m theta) + (-1)^m conj``: even orders make the
    real part, odd ones the imaginary part. From behind, theta is seen as -theta.
    """
    at = angle[:, None] + turns
    at = torch.cat([at, -at], 1)
    tables = []
    for parity in (0, 1):
        orders = torch.arange(parity, max_order + 1, 2)
        phase = orders[:, None] * at[:, None]
        double = torch.where(orders > 0, 2.0, 1.0).double()[:, None]
        real, imaginary = double * phase.cos(), double * phase.sin()
        pair = (imaginary, real) if parity else (real, -imaginary)
        tables.append(torch.stack(pair, 2).flatten(1, 2).float())
    return tables[0], tables[1]


def _turned(rotations: Tensor, angles: Tensor) -> Tensor:
    """Rotations whose images show angle theta where those given show theta + the angle.

    Shape (f, 3, 3) and (a,), a even, to (2 f a / 2, 3, 3): halves of the angles first.
    """
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    rows = (
        torch.stack(r, -1) for r in ((cos, sin, zero), (-sin, cos, zero), (zero, zero, zero + 1))
    )
    turn = torch.stack(list(rows), 1)
    every = turn.view(2, 1, -1, 3, 3) @ rotations[None, :, None]
    return every.flatten(0, 2)


def _smooth_functions(
    rotations: Tensor, angles: Tensor, degree: int, in_plane_order: int
) -> Tensor:
    """Real matrix elements of SO(3) in the nodes of `_turned`, without the constant.

    Degree l has ``2 l + 1`` functions of the direction times the in-plane orders 0 to
    min(l, `in_plane_order`); order 0 are spherical harmonics of the direction. Mean square 1.
    """
    rule = lebedev(2 * degree)
    seen = torch.einsum("fij,pj->fpi", rotations, rule.directions)
    image = real_harmonics(degree, seen.flatten(0, 1)).view(*seen.shape[:2], -1)
    reference = real_harmonics(degree, rule.directions) * rule.weights[:, None]
    columns = []
    for l in range(1, degree + 1):  # noqa: E741
        own = slice(l**2, (l + 1) ** 2)
        by_order = (2 * l + 1) ** 0.5 * image[..., own].mT @ reference[:, own]
        columns.append(by_order[:, None, 0].expand(-1, len(angles), -1))
        for m in range(1, min(l, in_plane_order) + 1):
            cosine, sine = by_order[:, None, 2 * m - 1], by_order[:, None, 2 * m]
            c, s = ((m * angles).cos()[:, None], (m * angles).sin()[:, None])
            columns += [cosine * c + sine * s, sine * c - cosine * s]
    found = torch.cat(columns, -1)
    half = found.view(len(rotations), 2, -1, found.shape[-1]).transpose(0, 1)
    return half.flatten(0, 2)
