"""What moments are fitted with: maps with few parameters, and densities of viewing directions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cryorecon.engines.decoders import new_decoder
from cryorecon.engines.moments.forms import steerable_moments
from cryorecon.engines.moments.third import ThirdTarget
from cryorecon.networks.mfn import smallest_grid
from cryorecon.networks.siren import HermitianField, fourier_network
from cryorecon.physics.fourier import lowpass, radius_grid
from cryorecon.physics.gridding import Kernel
from cryorecon.physics.masks import Support
from cryorecon.physics.polar import PolarGrid, PolarSlices
from cryorecon.physics.resampling import resample_sums
from cryorecon.physics.sphere import SphereRule, frames, lebedev, real_harmonics

VolumeKind = Literal["beads", "grid", "rmfn", "fouriernet"]
DensityKind = Literal["harmonics", "free", "encoder"]

# Width of fresh beads in box sides, and the least one, in voxels of the coarsest grid.
_BEAD_WIDTH = 0.07
_LEAST_WIDTH_PX = 0.7
# Rule that densities of views are normalised by.
_FINE_DEGREE = 59
# Steps of a model's parameters relative to the fit's rate.
_SLOW, _SLOWER = 0.3, 0.2


@dataclass(frozen=True)
class Views:
    """Half a sphere of viewing directions, each standing for itself and its antipode.

    Attributes
    ----------
    grid : PolarGrid
        Radii in cycles per particle box.
    size : int
        Voxels a side on which maps are read.
    rotations : Tensor, shape (q, 3, 3), float64
    slices : PolarSlices
    log_weights : Tensor, shape (2 q,)
        Of the quadrature: all directions, then all antipodes.
    harmonics : Tensor, shape (2 q, (P + 1)^2 - 1)
        Real spherical harmonics without the constant.
    third : ThirdTarget, optional
        Which third moments are computed as well.
    """

    grid: PolarGrid
    size: int
    rotations: Tensor
    slices: PolarSlices
    log_weights: Tensor
    harmonics: Tensor
    third: ThirdTarget | None = field(default=None, kw_only=True)

    @staticmethod
    def of(
        grid: PolarGrid,
        size: int,
        density_degree: int,
        device: str = "cpu",
        max_order: int | None = None,
        third: ThirdTarget | None = None,
    ) -> Views:
        """Directions that sum the second moment of these circles to about half a percent.

        With `max_order`, as many as circles of that order need.
        """
        rule = directions_for(grid.max_order if max_order is None else max_order, density_degree)
        rotations = frames(rule.directions)
        slices = PolarSlices(size, grid, rotations, device=device, kernel=Kernel(4))
        both = torch.cat([rule.directions, -rule.directions])
        harmonics = real_harmonics(density_degree, both)[:, 1:].float().to(device)
        weights = torch.log(rule.weights.float() / 2).repeat(2).to(device)
        return Views(grid, size, rotations.to(device), slices, weights, harmonics, third=third)

    @property
    def directions(self) -> Tensor:
        """Viewing direction of every node, in the order of `log_weights`; shape (2 q, 3)."""
        return torch.cat([self.rotations[:, 2], -self.rotations[:, 2]])

    def moments(self, harmonics: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        """Moments of slices under probabilities of their directions, with the third if wanted."""
        moments = steerable_moments(harmonics, one, other)
        return moments if self.third is None else (*moments, self.third.seen(harmonics, one, other))


def directions_for(max_order: int, density_degree: int) -> SphereRule:
    """Half a sphere of directions for circles with these angular orders."""
    return lebedev(min(131, int(1.6 * max_order) + density_degree)).hemisphere()


class VolumeModel(nn.Module, ABC):
    """A map in the particle box; its amplitude is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    @abstractmethod
    def density(self, size: int) -> Tensor:
        """The map on `size` voxels a side of the particle box; voxel sums."""

    def harmonics(self, views: Views) -> Tensor:
        """Angular harmonics of its slices, shape (q, K, M + 1), complex."""
        return views.slices.harmonics(self.density(views.size))

    def rates(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimiser."""
        others = [p for name, p in self.named_parameters() if name != "log_scale"]
        return [
            {"params": others, "lr": rate},
            {"params": [self.log_scale], "lr": _SLOW * rate},
        ]

    def penalty(self) -> Tensor:
        """What the map costs beside its misfit, 0 within the particle."""
        return torch.zeros((), device=self.log_scale.device)


class Beads(VolumeModel):
    """A sum of equally wide Gaussians of positive mass: few parameters, never negative.

    Parameters
    ----------
    count : int
    radius : float
        Of the particle, in box sides.
    """

    def __init__(self, count: int, radius: float, generator: torch.Generator) -> None:
        super().__init__()
        self.radius = radius
        spread = 0.3 * radius * torch.randn(count, 3, generator=generator)
        self.centres = nn.Parameter(spread)
        self.log_mass = nn.Parameter(torch.full((count,), -math.log(count)))
        self.log_width = nn.Parameter(torch.tensor(math.log(_BEAD_WIDTH)))

    def density(self, size: int) -> Tensor:
        """The map on `size` voxels a side of the particle box; voxel sums."""
        return self.on_grid(size, 1.0)

    def on_grid(self, size: int, grid_side: float) -> Tensor:
        """Voxel sums on a grid whose side is given in sides of the particle box."""
        axis = torch.arange(size, device=self.centres.device) - size // 2
        centres = self.centres * (size / grid_side)
        width = (self.log_width.exp() * (size / grid_side)).clamp(min=_LEAST_WIDTH_PX)
        apart = (axis[:, None, None] - centres) / width
        along = torch.exp(-0.5 * apart**2) / (width * (2 * math.pi) ** 0.5)
        mass = (self.log_mass + self.log_scale).exp()
        x, y, z = along.unbind(-1)
        plane = y[:, None] * x[None]
        return ((z * mass) @ plane.flatten(0, 1).T).view(size, size, size)

    def rates(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimiser."""
        return [
            {"params": [self.centres], "lr": _SLOWER * rate},
            {"params": [self.log_mass], "lr": rate},
            {"params": [self.log_width, self.log_scale], "lr": _SLOW * rate},
        ]

    def penalty(self) -> Tensor:
        """Squared distance of the centres beyond the particle, in squared radii."""
        beyond = self.centres.norm(dim=-1) / self.radius - 1
        return beyond.clamp(min=0).square().mean()


class Voxels(VolumeModel):
    """Positive voxels within a soft ball."""

    def __init__(self, size: int, radius: float, generator: torch.Generator) -> None:
        super().__init__()
        rough = lowpass(torch.randn(size, size, size, generator=generator), 3.0, 3)
        ball = torch.exp(-((radius_grid(size, 3) / (0.6 * radius * size)) ** 2))
        self.values = nn.Parameter(2 * ball.float() - 2 + rough / rough.std())
        self.support = Support(radius)

    def density(self, size: int) -> Tensor:
        """The map on `size` voxels a side of the particle box; voxel sums."""
        own = len(self.values)
        mask = self.support.on(own, self.values.dtype, self.values.device)
        positive = nn.functional.softplus(self.values) * mask
        return resample_sums(positive, size) * self.log_scale.exp()


class Residual(VolumeModel):
    """The residual multiplicative filter network of engine rmfn, within a soft ball."""

    def __init__(self, reach: int, radius: float, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.reach = reach
        box = smallest_grid(reach + 2)
        self.decoder = new_decoder("rmfn", box, reach, Support(radius), width, generator)

    def density(self, size: int) -> Tensor:
        """The map on `size` voxels a side of the particle box; voxel sums."""
        return resample_sums(self.decoder.volume(self.reach), size) * self.log_scale.exp()

    def rates(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimiser: networks take smaller steps."""
        first, second = super().rates(rate)
        return [{**first, "lr": _SLOWER * rate}, second]


class FourierNetwork(VolumeModel):
    """The paper's: FourierNet from frequencies to the transform, no support, any sign."""

    def __init__(self, reach: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        network = fourier_network("fouriernet", width, reach, generator)
        self.field = HermitianField(network, reach + 1)
        self.reach = reach

    def harmonics(self, views: Views) -> Tensor:
        """Angular harmonics of its slices, shape (q, K, M + 1), complex."""
        points = views.grid.points.to(views.rotations.device)
        at = (points @ views.rotations[:, :2]).float()
        values = self.field(at).view(len(at), len(views.grid.radii), -1)
        return views.grid.harmonics(values) * self.log_scale.exp()

    def density(self, size: int) -> Tensor:
        """The map on `size` voxels a side of the particle box; voxel sums."""
        axis = torch.arange(size, device=self.log_scale.device) - size // 2
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        points = torch.stack([x, y, z], -1).float()
        inside = points.norm(dim=-1) <= self.reach + 0.5
        values = torch.zeros(points.shape[:3], dtype=torch.complex64, device=axis.device)
        found = [self.field(part) for part in points[inside].split(50_000)]
        values[inside] = torch.cat(found) * self.log_scale.exp()
        spectrum = torch.fft.ifftshift(values)
        return torch.fft.fftshift(torch.fft.ifftn(spectrum)).real

    def rates(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimiser: networks take smaller steps."""
        first, second = super().rates(rate)
        return [{**first, "lr": 0.02 * rate}, second]


class Density(nn.Module, ABC):
    """Probabilities of views."""

    @abstractmethod
    def probabilities(self, views: Views) -> tuple[Tensor, Tensor]:
        """Of the directions and of their antipodes, shape (q,) each; they sum to 1."""

    @abstractmethod
    def over_uniform(self, directions: Tensor) -> Tensor:
        """The smooth part of the density at given directions; 1 is uniform; shape (q,)."""

    @abstractmethod
    def rates(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimiser."""


class ViewDensity(Density):
    """Probabilities of viewing directions: a softmax of spherical harmonics.

    Parameters
    ----------
    degree : int
        P of the harmonics of the logarithm.
    """

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree = degree
        self.coefficients = nn.Parameter(torch.zeros((degree + 1) ** 2 - 1))
        self.residual: nn.Parameter | None = None

    @staticmethod
    def around(density: Density, views: Views) -> ViewDensity:
        """Harmonics about any density of these views, which their coefficients leave at 0."""
        result = ViewDensity(0)
        size = views.harmonics.shape[1]
        with torch.no_grad():
            here = torch.cat(density.probabilities(views)).clamp(min=1e-30).log()
            result.coefficients = nn.Parameter(here.new_zeros(size))
            result.residual = nn.Parameter(here - views.log_weights)
        return result

    def free(self, views: Views) -> None:
        """From now on every direction of these views has a weight of its own."""
        self.residual = nn.Parameter(torch.zeros_like(views.log_weights))

    def rates(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimiser."""
        return [{"params": list(self.parameters()), "lr": 0.5 * rate}]

    def probabilities(self, views: Views) -> tuple[Tensor, Tensor]:
        """Of the directions and of their antipodes, shape (q,) each; they sum to 1."""
        logits = views.log_weights + views.harmonics @ self.coefficients
        if self.residual is not None:
            logits = logits + self.residual
        one, other = torch.softmax(logits, 0).chunk(2)
        return one, other

    def over_uniform(self, directions: Tensor) -> Tensor:
        """The smooth part of the density at given directions; 1 is uniform; shape (q,)."""
        rule = lebedev(_FINE_DEGREE)
        with torch.no_grad():
            own = self.coefficients.cpu().double()
            every = torch.exp(real_harmonics(self.degree, rule.directions)[:, 1:] @ own)
            here = torch.exp(real_harmonics(self.degree, directions)[:, 1:] @ own)
        return here / (every * rule.weights).sum()


def new_volume(
    kind: VolumeKind,
    reach: int,
    radius: float,
    count: int,
    width: int,
    generator: torch.Generator,
) -> VolumeModel:
    """A random start.

    Parameters
    ----------
    reach : int
        Largest radius of the moments, in cycles per box.
    radius : float
        Of the particle, in box sides.
    count : int
        Beads.
    width : int
        Hidden units of networks.
    """
    if kind == "beads":
        return Beads(count, radius, generator)
    if kind == "grid":
        return Voxels(grid_size(reach), radius, generator)
    if kind == "rmfn":
        return Residual(reach, radius, width, generator)
    return FourierNetwork(reach, width, generator)


def grid_size(reach: int) -> int:
    """Voxels a side on which maps of a band are read: even, 20 or more."""
    return max(20, 2 * (reach + 4))
