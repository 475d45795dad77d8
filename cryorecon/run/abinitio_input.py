"""What a user chooses of an ab initio job; all that is looked at before it writes anything."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cryorecon.engines.amortized import AmortizedConfig
from cryorecon.engines.contrast import Contrast
from cryorecon.engines.reconstruction import RefineConfig
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.errors import CryoreconError
from cryorecon.io.particles import Particles, read_particles
from cryorecon.networks.encoders import LEAST_INPUT_PX
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.resampling import resample_volume
from cryorecon.ranks import ALONE, Ranks
from cryorecon.run.device import usable_device
from cryorecon.run.extent import particle_extent
from cryorecon.run.given_maps import map_like
from cryorecon.run.load import Keep
from cryorecon.run.power_check import power_doubts
from cryorecon.run.sample import Sample, sample_of
from cryorecon.run.settings import point_group
from cryorecon.run.table_doubts import table_doubts
from cryorecon.run.width import WIDEST, Source, diameter_share, width_doubts, width_text

Halves = Literal["independent", "shared", "none"]
Assign = Literal["none", "read", "refine"]
# Samples a side that a first map has at most, if nobody asks for more: a particle's width in 80 or
# 100 parts. Time and memory grow as the cube.
_LARGEST_BOX = 128
# What images tell of a width, and a margin.
_MARGIN = 1.05


@dataclass(frozen=True)
class AbinitioOptions:
    """What a user chooses.

    Attributes
    ----------
    diameter_angst : float, optional
        Of the particle; default what the images tell, 0.8 of the box if they do not.
    diameter_set : bool
        Whether the engine's own is meant, even if it is its default.
    offset_range_angst : float, optional
        Largest in-plane offset; default a tenth of the box, and up to a quarter of it in new
        searches if many particles lie at that limit.
    project : Path, optional
        Folder that image paths are relative to.
    box : int, optional
        Samples a side that larger images are Fourier cropped to; default 128. Maps are written
        in the images' own box.
    halves : "independent", "shared" or "none"
        Both half sets from scratch, half sets of one search, or no half maps on disk.
    contrast : "auto", "white" or "black"
        Particles white on black, black on white, or as the images tell.
    symmetry : str
        Point group; its axes are looked for in the map without symmetry, which is kept.
    mask : Path, optional
        Map from 0 to 1 that multiplies the soft sphere; must hold in any orientation.
    init_map : Path, optional
        Map to start from instead of a search; only its coarse shape is used.
    keep : "auto", "memory" or "disk"
        As in :func:`cryorecon.run.load.load_observations`.
    subset : int, optional
        Particles, drawn at random, that make the map; default all.
    assign : "none", "read" or "refine"
        What becomes of particles outside the subset: left out, given the poses that the engine
        reads off them, or refined locally from these as well.
    first_angst, last_angst : float, optional
        Resolutions that the training of engine amortized begins and ends at, in place of the
        engine's `first_cycles` and `last_cycles`.
    device : str
        Where all but the table of poses is computed.
    engine : RmfnConfig or AmortizedConfig
        Its diameter and offset range are replaced by the two above.
    """

    diameter_angst: float | None = None
    diameter_set: bool = False
    offset_range_angst: float | None = None
    project: Path | None = None
    box: int | None = None
    seed: int = 0
    halves: Halves = "shared"
    contrast: Contrast = "auto"
    symmetry: str = "C1"
    mask: Path | None = None
    init_map: Path | None = None
    keep: Keep = "auto"
    subset: int | None = None
    assign: Assign = "refine"
    first_angst: float | None = None
    last_angst: float | None = None
    device: str = "cpu"
    engine: RmfnConfig | AmortizedConfig = field(default_factory=RmfnConfig)


def worked_box(stored_box: int, wanted: int | None) -> int:
    """Samples a side that images are worked with, by `--box`."""
    return min(stored_box, wanted or _LARGEST_BOX)


def _resolved(options: AbinitioOptions, particles: Particles) -> RmfnConfig | AmortizedConfig:
    side_angst = particles.box * particles.pixel_size_angst
    config = options.engine
    if isinstance(config, AmortizedConfig):
        _refuse_small_input(config)
    if options.diameter_angst is not None:
        share = diameter_share(options.diameter_angst, particles)
        config = dataclasses.replace(config, diameter=share)
    if options.offset_range_angst is not None:
        share = options.offset_range_angst / side_angst
        config = dataclasses.replace(config, offset_range=share, farthest_offset=share)
    if not 0 <= config.offset_range <= 0.5:
        raise CryoreconError(
            f"Particles cannot lie {config.offset_range * side_angst:.4g} A off the middle of "
            f"images {side_angst:.4g} A wide",
            f"Give --offset-range in angstrom, from 0 to {side_angst / 2:.4g}",
        )
    return config


def _refuse_small_input(config: AmortizedConfig) -> None:
    least = LEAST_INPUT_PX[config.encoder]
    if 0 < config.input_size < least or config.input_size < 0:
        raise CryoreconError(
            f"A {config.encoder} encoder does not read images of {config.input_size} px",
            f"Give --input-size {least} or more",
        )


def _banded(
    config: RmfnConfig | AmortizedConfig, options: AbinitioOptions, particles: Particles
) -> RmfnConfig | AmortizedConfig:
    if not isinstance(config, AmortizedConfig):
        return config
    side_angst = particles.box * particles.pixel_size_angst
    return _with_bands(config, options, config.diameter * side_angst)


def _with_bands(
    config: AmortizedConfig, options: AbinitioOptions, diameter_angst: float
) -> AmortizedConfig:
    """Cycles per particle diameter from resolutions in angstrom."""
    if options.first_angst is not None:
        config = dataclasses.replace(config, first_cycles=diameter_angst / options.first_angst)
    if options.last_angst is not None:
        config = dataclasses.replace(config, last_cycles=diameter_angst / options.last_angst)
    if config.first_cycles > config.last_cycles:
        first, last = (diameter_angst / c for c in (config.first_cycles, config.last_cycles))
        raise CryoreconError(
            f"The training would begin at {first:.1f} A and end coarser, at {last:.1f} A",
            "Give --first-resolution larger than --last-resolution",
        )
    return config


def assignment(*, everyone: bool, refine: bool) -> Assign:
    """What becomes of particles outside a subset."""
    if not everyone:
        return "none"
    return "refine" if refine else "read"


class Prepared(NamedTuple):
    """What a job works on.

    Attributes
    ----------
    particles : Particles
        All that get poses.
    rows : Tensor, int64
        Which of them make the map.
    config : RmfnConfig or AmortizedConfig
        The resolved settings.
    extent : float, optional
        Diameter that the images show, as a share of the box.
    source : "given", "told" or "assumed"
        Where the diameter of the settings comes from; told by the images.
    table_doubts : list of str
        What is odd about the table.
    """

    particles: Particles
    rows: Tensor
    config: RmfnConfig | AmortizedConfig
    extent: float | None
    source: Source
    table_doubts: list[str]

    @property
    def width_text(self) -> str:
        """The diameter, and where it comes from."""
        return width_text(self.particles, self.config.diameter, self.source)

    @property
    def doubts(self) -> list[str]:
        """What is odd about the diameter and the table, and what is left out."""
        width = width_doubts(self.particles, self.config.diameter, self.source, self.extent)
        return width + self.table_doubts


def prepared(
    star: str | Path,
    options: AbinitioOptions,
    ranks: Ranks = ALONE,
    begun_with: float | None = None,
) -> Prepared:
    """Everything that is looked at before anything is written.

    Parameters
    ----------
    ranks : Ranks
        Processes that share the job: all take the diameter that the first one's images tell.
    begun_with : float, optional
        Diameter that the job was begun with, as a share of the box: it is not told anew.

    Raises
    ------
    CryoreconError
        For input or options that cannot be used, or with fewer than 20 particles.
    """
    particles = read_particles(star, options.project)
    particles = particles.cropped(worked_box(particles.stored_box, options.box))
    rows = _subset(particles, options)
    if options.assign == "none":
        particles, rows = particles.subset(rows.numpy()), torch.arange(len(rows))
    if len(rows) < 20:
        raise CryoreconError(
            f"{star} gives {len(rows)} particles, too few for a map", "Give at least 20"
        )
    usable_device(options.device)
    config = _resolved(options, particles)
    _refuse_contradictions(options, particles)
    doubts = table_doubts(particles)
    # Read by one process: what is odd the first one says.
    sample = sample_of(particles) if ranks.first else None
    (seen,) = ranks.numbers(_extent(sample))
    config, source = _with_width(config, options, seen, begun_with)
    if sample is not None:
        doubts += power_doubts(sample, config.diameter)
    config = _banded(config, options, particles)
    return Prepared(particles, rows, config, seen or None, source, doubts)


def _with_width(
    config: RmfnConfig | AmortizedConfig,
    options: AbinitioOptions,
    seen: float,
    begun_with: float | None,
) -> tuple[RmfnConfig | AmortizedConfig, Source]:
    """Settings with the diameter that the images tell, unless one was given."""
    default = RefineConfig.diameter
    if options.diameter_angst is not None or options.diameter_set or config.diameter != default:
        return config, "given"
    told = seen > 0 if begun_with is None else begun_with != default
    if begun_with is None:
        begun_with = min(_MARGIN * seen, WIDEST) if told else default
    return dataclasses.replace(config, diameter=begun_with), "told" if told else "assumed"


def _extent(sample: Sample | None) -> float:
    """As the images tell, or 0; also without any that can be worked with, which the job names."""
    return (particle_extent(sample) or 0.0) if sample else 0.0


def _subset(particles: Particles, options: AbinitioOptions) -> Tensor:
    """Rows that make the map, ascending."""
    n = len(particles)
    if options.subset is None or options.subset >= n:
        return torch.arange(n)
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randperm(n, generator=generator)[: options.subset].sort().values


def _refuse_contradictions(options: AbinitioOptions, particles: Particles) -> None:
    """Options that cannot be used, before anything is written."""
    point_group(options.symmetry)
    given_mask(options.mask, particles)
    independent = options.halves == "independent"
    if options.init_map is not None:
        given_map(options.init_map, particles, "map")
        if independent:
            raise CryoreconError(
                "Half maps that both start from --init-map are not independent",
                "Leave out --init-map or --halves independent",
            )
    if independent and options.subset is not None and options.assign != "none":
        raise CryoreconError(
            "Particles outside a subset cannot join independent half sets",
            "Leave out --subset or --halves independent, or give --no-assign-all",
        )


def given_map(path: Path, particles: Particles, what: str) -> Tensor:
    """A map of the images' own box and pixel size, in the box that is worked in."""
    return resample_volume(map_like(path, particles.as_stored(), what), particles.box)


def starting_map(path: Path, particles: Particles, diameter: float) -> Tensor:
    """The map to start from without its level outside the particle, its variance 1.

    Of eight bits, say, or of another program's units.

    Parameters
    ----------
    diameter : float
        Of the particle, as a fraction of the box side.

    Raises
    ------
    CryoreconError
        If it has another box or pixel size, or one value.
    """
    volume = given_map(path, particles, "map").double()
    box = len(volume)
    outside = 1 - soft_ball(box, diameter / 2 * box, 2.0, 3)
    volume = volume - (volume * outside).sum() / outside.sum()
    spread = float(volume.std())
    if not spread > 0:
        raise CryoreconError(f"The map {path} has one value", "Give one that shows the particle")
    return (volume / spread).float()


def given_mask(path: Path | None, particles: Particles) -> Tensor | None:
    """A mask of the images' own box and pixel size, in the box that is worked in.

    Raises
    ------
    CryoreconError
        If it has another one, or values that no mask has.
    """
    if path is None:
        return None
    mask = map_like(path, particles.as_stored(), "mask")
    if not (float(mask.min()) >= -1e-3 and 0 < float(mask.max()) <= 1.001):
        raise CryoreconError(
            f"The mask {path} has values from {float(mask.min()):g} to {float(mask.max()):g}",
            "A mask goes from 0 to 1",
        )
    return resample_volume(mask, particles.box).clamp(0, 1)
