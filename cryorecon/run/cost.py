"""What a job will take, before it starts: CPU seconds and memory, good to about a factor of two.

Every figure is a count (images, rounds, voxels) times the time of one, measured on one core of a
desktop machine with 64 px images (``docs/benchmarks.md``, ``docs/scaling.md``).
Assumed: settled poses after about six rounds against half maps, a new search of all images and one
of those that fit worst, as on most of the simulated stacks there, or, of images that hardly tell
their poses, after sixteen rounds and four searches of all; images that a disk gives as fast as
they are worked on; one thread (a second one gains up to 1.6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cryorecon.engines.amortized import AmortizedConfig
from cryorecon.engines.moments.config import MomentFitConfig, stage_steps, stages
from cryorecon.engines.moments.forms import MomentsGeometry
from cryorecon.engines.reconstruction import RefineConfig
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.physics.fourier import half_plane

# Coefficients of a 64 px image, which times are of.
_COEFFICIENTS = 1600
# Their particles' diameter, as a share of the box. In wider boxes searches compare more of both,
# coefficients and offsets: times grow by these powers of the width, as measured up to a half.
_DIAMETER, _STARTS_GROW, _GRIDS_GROW = 0.91, 2, 3
# Seconds: loading the libraries, drawing, writing.
_FIXED = 10.0
# Search: an epoch of the network's steps, an image in it; an image in one of the finer epochs.
_EPOCH, _SEARCHED, _SEARCHED_ON = 0.15, 0.35e-3, 0.8e-3
# Between easy sets (3 epochs) and maps between the hands (14).
_FINE_EPOCHS = 7
# An image against all poses of the finer grid, as in the assignment; new searches, in which some of
# these are refined besides.
# Read by an encoder.
_READ = 0.15e-3
_ASSIGNED, _NEW_SEARCHES, _TRIED = 0.5e-3, 1.25, 0.8e-3
# The same of a hard set, whose grids go farther and leave up to 200 poses to refine; an image in
# one of the search's last epochs.
_HARD_SEARCHES, _HARD_GRID, _HARD_TRIED, _HARD_SEARCHED = 4, 6e-3, 10e-3, 5e-3
_HARD_ROUNDS = 16
# Rounds until poses settle; an image's pose steps in one; solving for maps, by padded voxel.
_HALF_ROUNDS, _REFINED, _SOLVED = 6, 0.25e-3, 1.5e-7
# An image seen in training at 32 to 64 px by the dense encoder; others take as many times more.
_TRAINED = 0.9e-3
_ENCODERS = {"dense": 1.0, "small": 4.0, "paper": 100.0}
_NETWORK_DECODER = 4.0
# An image of 64 px averaged to radius 16; a step of the fit at radius 8, more with third moments
# and with networks, and how it grows with the radius; a Gaussian's share of the information.
_AVERAGED, _FIT_STEP, _THIRD, _STEPS_GROW, _INFORMED = 5e-4, 1.3e-2, 1.6, 2.2, 0.1
_FIT_NETWORKS = {"rmfn": 3.0, "fouriernet": 15.0}
_BACKPROJECTED = 2e-4

# Bytes: the libraries; tables of a search; by voxel of the box: transforms, gradients, sums.
_PROGRAM, _SEARCH, _BY_VOXEL = 350e6, 650e6, 660
# By voxel of a map in the images' own box, when it is written and looked at.
_WRITTEN = 130
_NETWORK_SEARCH = 450e6


@dataclass(frozen=True)
class Cost:
    """An estimate.

    Attributes
    ----------
    cpu_s : float
        On one core.
    bytes : float
        Peak, without the images that are held.
    """

    cpu_s: float
    bytes: float

    def plus(self, other: Cost) -> Cost:
        """One job after the other."""
        return Cost(self.cpu_s + other.cpu_s, max(self.bytes, other.bytes))


def abinitio_cost(
    config: RefineConfig,
    n: int,
    box: int,
    *,
    independent: bool,
    others: int,
    hard: bool = False,
    stored_box: int = 0,
    refine_others: bool = True,
) -> Cost:
    """Of a run of engine rmfn or amortized.

    Parameters
    ----------
    n : int
        Particles that make the map.
    independent : bool
        Whether both half sets start from scratch.
    others : int
        Particles that join later.
    hard : bool
        Whether images hardly tell their poses, which only the job will find out.
    stored_box : int
        Of the images on disk, in which maps are written.
    refine_others : bool
        Whether these are refined, too, and not only read or searched once.
    """
    times = 2 if independent else 1
    if isinstance(config, RmfnConfig):
        begin = _search(config, n // times, box, hard=hard)
    else:
        begin = _training(config, n // times, box, hard=hard)
    rounds = min(config.half_rounds, _HARD_ROUNDS if hard else _HALF_ROUNDS) + config.joint_rounds
    finish = not isinstance(config, AmortizedConfig) or config.finish
    searched = _NEW_SEARCHES * (_ASSIGNED * _wider(config) + _TRIED * _size(box))
    if hard:
        searched = _HARD_SEARCHES * (_HARD_GRID * _wider(config) + _HARD_TRIED * _size(box))
    moved = rounds * _REFINED * _size(box) + searched if finish else 0.0
    solved = times * rounds * _SOLVED * (2 * box) ** 3
    read = isinstance(config, AmortizedConfig) and not hard
    joined = _READ if read else _ASSIGNED * _wider(config)
    joined = others * (joined + (moved if refine_others else 0.0))
    seconds = _FIXED + times * begin.cpu_s + n * moved + solved + joined
    maps = max(_BY_VOXEL * box**3, _WRITTEN * stored_box**3)
    return Cost(seconds, max(begin.bytes, _PROGRAM + maps))


def _search(config: RmfnConfig, n: int, box: int, *, hard: bool) -> Cost:
    seconds = _begun(config, n) + n * _ASSIGNED * _wider(config)
    seconds += _searched_on(config, n, box, hard=hard)
    seconds += 0.1 * config.final_steps if config.volume == "rmfn" else 0.0
    network = _NETWORK_SEARCH if config.volume == "rmfn" else 0.0
    return Cost(seconds, _PROGRAM + _SEARCH + network)


def _begun(config: RmfnConfig, n: int) -> float:
    """Seconds of the starts from random poses."""
    epochs = config.n_starts * len(config.temperatures)
    each = _SEARCHED * _wider(config, _STARTS_GROW)
    return epochs * (_EPOCH + min(n, config.search_images) * each)


def _searched_on(config: RmfnConfig, n: int, box: int, *, hard: bool) -> float:
    """Seconds of the search's epochs at higher bands."""
    seconds = 0.0
    if config.fine_band(box) > config.search_band(box):
        epochs = config.fine_epochs if hard else min(config.fine_epochs, _FINE_EPOCHS)
        seconds += epochs * min(n, config.fine_images) * _SEARCHED_ON * _wider(config)
    if hard and config.hard_band(box) > config.fine_band(box):
        seconds += config.hard_epochs * min(n, config.hard_images) * _HARD_SEARCHED * _wider(config)
    return seconds


def _training(config: RefineConfig, n: int, box: int, *, hard: bool) -> Cost:
    assert isinstance(config, AmortizedConfig)
    grid = config.decoder in ("grid", "log-grid")
    each = _TRAINED * _ENCODERS[config.encoder] * (1.0 if grid else _NETWORK_DECODER)
    seconds = config.images_seen * each * config.heads / 4
    if hard and config.finish and config.search_on:
        # From random poses, too: the first higher band is searched twice.
        search = RmfnConfig(diameter=config.diameter)
        once = replace(search, hard_epochs=0)
        seconds += _begun(search, n) + _searched_on(search, n, box, hard=True)
        seconds += _searched_on(once, n, box, hard=True)
    return Cost(seconds, _PROGRAM + 350e6)


def moments_cost(geometry: MomentsGeometry, n: int) -> Cost:
    """Of averaging: grows with the image's area and the radius."""
    size = (geometry.box / 64) ** 2 * (geometry.max_radius / 16)
    sums = 80.0 * (math.pi / 2 * geometry.max_radius**2) ** 2 if geometry.form == "full" else 50e6
    return Cost(_FIXED / 2 + n * _AVERAGED * max(size, 0.25), _PROGRAM + 100e6 + sums)


def moment_fit_cost(config: MomentFitConfig) -> Cost:
    """Of all starts of a fit to moments, most of whose steps are at fewer radii than the last."""
    radii = stages(config.radius)
    steps = stage_steps(config, len(radii))
    at = [radii[0]] * (len(steps) - len(radii)) + radii
    whole = sum(n * (radius / 8) ** _STEPS_GROW for n, radius in zip(steps, at, strict=True))
    step = _FIT_STEP * _FIT_NETWORKS.get(config.volume, 1.0)
    step *= _THIRD if config.third_radius else 1.0
    size = (config.radius / 8) ** 3
    informed = _INFORMED * config.beads * size if config.volume == "beads" else 0.0
    return Cost(_FIXED + config.starts * whole * step + informed, _PROGRAM + 600e6 * size)


def backprojection_cost(n: int, box: int) -> Cost:
    """Of a map from known poses."""
    seconds = _FIXED / 2 + n * _BACKPROJECTED * _size(box) + _SOLVED * (2 * box) ** 3
    return Cost(seconds, _PROGRAM + 100 * (2 * box) ** 3)


def _wider(config: RefineConfig, power: int = _GRIDS_GROW) -> float:
    return (_DIAMETER / config.diameter) ** power


def _size(box: int) -> float:
    return len(half_plane(box)) / _COEFFICIENTS
