"""Maps and view densities from moments: random starts, coarse to fine (Khoo, Paul, Sharon 2024).

Equation 28 of the paper with two changes: entries weigh by their standard errors and by the power
of their radii, so that high frequencies count, and the moments are those of in-plane averaged
images. Moments at this order do not always determine the map; only agreement between fits from
different starts tells how far they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cryorecon.engines.moments.config import MomentFitConfig, stage_steps, stages
from cryorecon.engines.moments.descent import Keep, Settling, State, adam, quasi_newton
from cryorecon.engines.moments.encoding import EncodedDensity
from cryorecon.engines.moments.forms import FullMoments, Moments
from cryorecon.engines.moments.full_fit import (
    FullTarget,
    FullViews,
    RotationDensity,
    full_visible,
)
from cryorecon.engines.moments.models import (
    Density,
    ViewDensity,
    Views,
    VolumeModel,
    grid_size,
    new_volume,
)
from cryorecon.engines.moments.target import Target
from cryorecon.networks.moment_encoders import FieldEncoderConfig

# A radius is used if its power is this many standard errors above 0.
_VISIBLE = 3.0


@dataclass(frozen=True)
class MomentFit:
    """Where one start ended.

    Attributes
    ----------
    volume : VolumeModel
    density : Density
    misfit : float
        Weighted squares left, by entry; about 1 where standard errors explain all.
    white, frobenius : tuple of two float
        Relative errors of the first and the second moment: radii of equal power, or weighing by
        their circles as in the paper's loss.
    lower : float
        Misfit of the first two moments alone: noisy third ones are many, and fit anything.
    """

    volume: VolumeModel
    density: Density
    misfit: float
    white: tuple[float, float]
    frobenius: tuple[float, float]
    lower: float

    def state(self) -> dict[str, Any]:
        """Everything, as :meth:`Fitter.restored` takes it."""
        return {
            "volume": self.volume.state_dict(),
            "density": self.density.state_dict(),
            "misfit": self.misfit,
            "white": self.white,
            "frobenius": self.frobenius,
            "lower": self.lower,
        }


_NONE = Settling()


def _going(
    stage: int, volume: VolumeModel, density: Density, settling: State | None = None
) -> State:
    maps = {"volume": volume.state_dict(), "density": density.state_dict()}
    return {"stage": stage, **maps, "settling": settling}


def visible_radius(moments: Moments) -> int:
    """Largest radius up to which the power, over a particle's orders, stands above its error.

    In cycles per particle box. Radii that the CTF leaves nothing of, as the first one without
    amplitude contrast, are passed over.
    """
    if isinstance(moments, FullMoments):
        return full_visible(moments, _VISIBLE)
    radii = range(1, len(moments.first) + 1)
    largest = torch.tensor([moments.geometry.order_at(k) for k in radii])
    orders = torch.arange(len(moments.second))[:, None]
    counts = torch.where(orders > 0, 2.0, 1.0).double() * (orders <= largest)
    power = (counts * moments.second.diagonal(dim1=-2, dim2=-1).real).sum(0)
    errors = moments.second_error.diagonal(dim1=-2, dim2=-1)
    noise = torch.where(counts > 0, counts * errors, 0.0).square().sum(0).sqrt()
    measured = moments.measured.diagonal()
    seen = ((power > _VISIBLE * noise) | ~measured).long().cumprod(0).bool() & measured
    return int(seen.nonzero().max()) + 1 if bool(seen.any()) else 0


@dataclass(frozen=True)
class Fitter:
    """Everything that the starts share.

    Attributes
    ----------
    config : MomentFitConfig
    targets : list of Target or FullTarget
        One a stage.
    annealed : list of Target or FullTarget
        The first stage's with larger model errors, in the order in which they are fitted.
    views : list of Views
    particle_radius : float
        In sides of the particle box.
    device : str
    """

    config: MomentFitConfig
    targets: Sequence[Target | FullTarget]
    views: Sequence[Views]
    particle_radius: float
    device: str = "cpu"
    annealed: Sequence[Target | FullTarget] = ()

    @staticmethod
    def of(moments: Moments, config: MomentFitConfig, radius: int, device: str = "cpu") -> Fitter:
        """Targets and slices of all stages.

        Parameters
        ----------
        radius : int
            Largest radius fitted, in cycles per particle box.
        """
        size, degree, ends = grid_size(radius), config.density_degree, stages(radius)
        inside = moments.geometry.in_particle_box()
        share = inside.diameter_angst / inside.side_angst / 2
        # An encoder has an output for each node: all stages have those of the last.
        fixed = inside.order_at(radius) if config.density == "encoder" else None
        wanted = [(ends[0], error) for error in config.annealing]
        wanted += [(end, config.model_error) for end in ends]
        early = len(config.annealing)
        if isinstance(moments, FullMoments):
            plane = [FullTarget.of(moments, *each).to(device) for each in wanted]
            nodes = [
                FullViews.over(t, size, degree, config.in_plane_order, device, fixed)
                for t in plane[early:]
            ]
            return Fitter(config, plane[early:], nodes, share, device, plane[:early])
        third = config.third_radius
        circles = [Target.of(moments, *each, third).to(device) for each in wanted]
        views = [Views.of(t.grid, size, degree, device, fixed, t.third) for t in circles[early:]]
        return Fitter(config, circles[early:], views, share, device, circles[:early])

    @property
    def reach(self) -> int:
        """Largest radius fitted, in cycles per particle box."""
        return math.ceil(float(self.targets[-1].grid.radii[-1]) - 1e-6)

    @property
    def steps(self) -> int:
        """Of one start."""
        return sum(stage_steps(self.config, len(self.targets)))

    def fit(
        self,
        generator: torch.Generator,
        progress: Callable[[int], None] | None = None,
        saved: State | None = None,
        keep: Keep | None = None,
    ) -> MomentFit:
        """One random start, from the radii of the first stage to all.

        Parameters
        ----------
        generator : torch.Generator
            On the CPU.
        progress : callable, optional
            Called with the steps done since the last call.
        saved : dict, optional
            A state that `keep` was given: what comes before it is left out.
        keep : callable, optional
            Called after each stage, and while it settles, with a function that gives the state.

        Raises
        ------
        FloatingPointError
            If the misfit is not finite.
        """
        volume, density = self._fresh(generator)
        done, counts, walk = 0, stage_steps(self.config, len(self.targets)), None
        if saved is None:
            self.match_power(volume)
        else:
            self._load(volume, density, saved)
            done, walk = saved["stage"], saved.get("settling")
            if progress is not None:
                progress(sum(counts[:done]) + (counts[done] - walk["left"] if walk else 0))
        for stage in range(done, len(counts)):
            settling = self._settling(stage, volume, density, walk, keep)
            self._stage(stage, volume, density, counts[stage], progress, settling)
            walk = None
            if keep is not None:
                keep(partial(_going, stage + 1, volume, density))
        return self.judged(volume, density)

    def restored(self, state: dict[str, Any]) -> MomentFit:
        """A start that was fitted before, from :meth:`MomentFit.state`."""
        # What a fresh start draws is thrown away.
        volume, density = self._fresh(torch.Generator())
        self._load(volume, density, state)
        numbers = (state[name] for name in ("misfit", "white", "frobenius", "lower"))
        return MomentFit(volume, density, *numbers)

    def _load(self, volume: VolumeModel, density: Density, state: dict[str, Any]) -> None:
        if isinstance(density, ViewDensity) and "residual" in state["density"]:
            density.free(self.views[-1])
        volume.load_state_dict(state["volume"])
        density.load_state_dict(state["density"])

    def _fresh(self, generator: torch.Generator) -> tuple[VolumeModel, Density]:
        config = self.config
        volume = new_volume(
            config.volume, self.reach, self.particle_radius, config.beads, config.width, generator
        )
        return volume.to(self.device), self.new_density(generator)

    def _settling(
        self,
        stage: int,
        volume: VolumeModel,
        density: Density,
        saved: State | None,
        keep: Keep | None,
    ) -> Settling:
        """How a stage ends: those before the maps' own do not settle."""

        def inside(state: Callable[[], State]) -> None:
            if keep is not None:
                keep(lambda: _going(stage, volume, density, state()))

        count = self.config.settling if stage > len(self.annealed) else 0
        return Settling(count, saved, inside)

    def _stage(
        self,
        stage: int,
        volume: VolumeModel,
        density: Density,
        count: int,
        progress: Callable[[int], None] | None,
        settling: Settling,
    ) -> None:
        """The first moment alone, the first stage annealed, then all stages."""
        radius = max(0, stage - 1 - len(self.annealed))
        target, views = [self.targets[0], *self.annealed, *self.targets][stage], self.views[radius]
        if stage == 0:
            target = replace(target, second_weight=torch.zeros_like(target.second_weight))
            if isinstance(target, Target) and isinstance(views, Views):
                target, views = replace(target, third=None), replace(views, third=None)
        last = radius == len(self.targets) - 1 and stage > len(self.annealed)
        begins = last and settling.saved is None
        if begins and isinstance(density, ViewDensity) and self.config.density == "free":
            density.free(views)
        self.descend(volume, density, target, views, count, progress, settling)

    def new_density(self, generator: torch.Generator) -> Density:
        """A density of views to begin with: uniform, or what a fresh encoder says."""
        views, degree = self.views[-1], self.config.density_degree
        if self.config.density == "encoder":
            fields = self.targets[-1].fields()
            made = EncodedDensity(*fields, views, FieldEncoderConfig(), generator)
            return made.to(self.device)
        if isinstance(views, FullViews):
            return RotationDensity(degree, views).to(self.device)
        return ViewDensity(degree).to(self.device)

    def match_power(self, volume: VolumeModel) -> None:
        """Scale a map to the power of the second moment at the first radii."""
        with torch.no_grad():
            harmonics = volume.harmonics(self.views[0])
            one, other = self.views[0].log_weights.exp().chunk(2)
            second = self.views[0].moments(harmonics, one, other)[1]
            seen, wanted = (self.targets[0].total(m) for m in (second, self.targets[0].second))
            volume.log_scale.add_(0.5 * torch.log(wanted.clamp(min=1e-30) / seen))

    def descend(
        self,
        volume: VolumeModel,
        density: Density,
        target: Target | FullTarget,
        views: Views,
        count: int,
        progress: Callable[[int], None] | None,
        settling: Settling = _NONE,
    ) -> None:
        """Steps on map and density together: Adam, then those of `settling`, L-BFGS."""

        def loss() -> Tensor:
            moments = views.moments(volume.harmonics(views), *density.probabilities(views))
            return target.misfit(*moments) / target.count + volume.penalty()

        groups = [*volume.rates(self.config.rate), *density.rates(self.config.rate)]
        if settling.saved is None:
            adam(loss, groups, count - settling.count, progress)
        moved = [p for group in groups for p in group["params"]]
        walk = settling.saved, settling.keep
        quasi_newton(loss, moved, settling.count, progress, *walk)

    def judged(self, volume: VolumeModel, density: Density) -> MomentFit:
        """Misfit and errors over all radii."""
        target, views = self.targets[-1], self.views[-1]
        with torch.no_grad():
            found = views.moments(volume.harmonics(views), *density.probabilities(views))
            misfit = target.misfit(*found) / target.count
            lower = misfit
            if isinstance(target, Target) and target.third is not None:
                two = replace(target, third=None)
                lower = two.misfit(*found) / two.count
        white, frobenius = (target.relative(*found, white=w) for w in (True, False))
        return MomentFit(volume, density, float(misfit), white, frobenius, float(lower))
