"""How moments are fitted: model, starts, stages, and the steps of each."""

from __future__ import annotations

from dataclasses import dataclass

from cryorecon.engines.moments.models import DensityKind, VolumeKind

# Radii of the coarse stages; the last has all. Fits that begin at radius 3 end further from the
# map.
_STAGES = (4, 6, 8, 10, 13, 19, 28)


@dataclass(frozen=True)
class MomentFitConfig:
    """How moments are fitted.

    Attributes
    ----------
    volume : "beads", "grid", "rmfn" or "fouriernet"
    beads : int
        Gaussians of the map.
    width : int
        Hidden units of networks.
    density : "harmonics", "free" or "encoder"
        Of viewing directions: smooth; with a weight for each direction in the last stage besides;
        or the weights of all directions from a network that reads the moments, as in the paper.
    density_degree : int
        Of the harmonics of its logarithm.
    in_plane_order : int
        Of the in-plane angles in a density of the full form; 0 keeps them uniform.
    starts : int
        Random starts; the best are compared with each other. 0 for none.
    first_iterations : int
        Adam steps on the first moment alone, before all others.
    iterations : int
        Adam steps of the last stage, before it settles; earlier ones take half as many.
    annealing : tuple of float
        Model errors that the first stage goes through, half as many steps each, before its own.
    rate : float
        Of Adam; falls to a hundredth in each stage.
    settling : int
        Evaluations of L-BFGS that end each stage.
    radius : int
        Largest radius used, in cycles per particle box.
    model_error : float
        Expected misfit of an entry beside its standard error, relative to the power of its radii.
    third_radius : int
        Largest radius of the third moments used; 0 for none.
    """

    volume: VolumeKind = "beads"
    beads: int = 100
    width: int = 96
    density: DensityKind = "harmonics"
    density_degree: int = 6
    in_plane_order: int = 2
    starts: int = 4
    first_iterations: int = 50
    iterations: int = 200
    annealing: tuple[float, ...] = (0.1, 0.03, 0.01)
    rate: float = 0.05
    settling: int = 400
    radius: int = 8
    model_error: float = 0.003
    third_radius: int = 6

    def __post_init__(self) -> None:
        counts = (self.beads, self.width, self.iterations, self.first_iterations)
        if min(*counts, self.density_degree) < 1:
            raise ValueError("beads, width, iterations and degree must be positive")
        if self.starts < 0 or self.starts == 1 or self.radius < 3:
            raise ValueError("needs two starts to compare, and radius 3 or more")
        if min(self.in_plane_order, self.third_radius, self.settling) < 0:
            raise ValueError("in-plane order, third radius and settling must not be negative")
        if not all(0 < v < 1e30 for v in (self.rate, self.model_error, *self.annealing)):
            raise ValueError("rate and model errors must be positive")


def stages(radius: int) -> list[int]:
    """Largest radius of each stage, coarse to fine."""
    return [*(r for r in _STAGES if r < radius), radius]


def stage_steps(config: MomentFitConfig, n_stages: int) -> list[int]:
    """Steps of a start: first moment alone, each model error of the first stage, each stage.

    Those of the stages themselves end with L-BFGS.
    """
    half = config.iterations // 2
    annealed = [half] * len(config.annealing)
    coarse = [half + config.settling] * (n_stages - 1)
    return [config.first_iterations, *annealed, *coarse, config.iterations + config.settling]
