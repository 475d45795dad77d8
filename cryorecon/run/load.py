"""From particles on disk to what the engines work on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from cryorecon.engines.observations import ImageSet, Source
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import Particles
from cryorecon.io.read_ahead import ReadAhead
from cryorecon.physics.ctf import CtfParameters, ctf
from cryorecon.physics.fourier import HalfPlane, half_plane, to_coefficients
from cryorecon.physics.imaging import noise_power_outside
from cryorecon.physics.masks import soft_ball
from cryorecon.ranks import ALONE, Ranks

Keep = Literal["auto", "memory", "disk"]

_BLOCK = 512
# Of images that are worked on together: two megabytes, which stay in a cache.
_PIXELS_AT_ONCE = 1 << 19
# Coefficients (complex64) and CTF (float32) of an image, bytes each.
_BYTES = 12
_SHARE_OF_MEMORY = 0.5
# Images that noise spectra are measured on: more would not make them better.
_NOISE_IMAGES = 20_000


def normalised(images: Tensor, outside: Tensor) -> Tensor:
    """Images with zero mean and unit standard deviation outside the particle."""
    weight = outside.flatten() / outside.sum()
    found = torch.empty_like(images)
    # Some megabyte at a time: it is gone through six times.
    step = max(1, _PIXELS_AT_ONCE // weight.numel())
    for raw, target in zip(images.split(step), found.split(step), strict=True):
        flat, values = raw.flatten(1), target.view(len(raw), -1)
        torch.sub(flat, (flat @ weight)[:, None], out=values)
        # What is left of the level after rounding counts where it is large beside the spread.
        values.sub_((values @ weight)[:, None])
        spread = (values.square() @ weight).sqrt_()
        values.div_(spread.clamp_(min=1e-20)[:, None])
    return found


@dataclass(frozen=True)
class _FromDisk:
    """A source that reads, normalises and transforms the images each time."""

    reader: ReadAhead
    optics: CtfParameters
    plane: HalfPlane
    outside: Tensor

    def expect(self, rows: Tensor) -> None:
        """Read these rows, wanted next, while others are worked on."""
        self.reader.expect(rows.numpy())

    def ready(self, rows: Tensor) -> bool:
        """Whether these rows, which were expected, have been read."""
        return self.reader.ready(rows.numpy())

    def __call__(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        plane, raw = self.plane.first(count), self._raw(rows)
        coefficients = torch.empty(len(rows), count, dtype=torch.complex64)
        gain = torch.empty(len(rows), count)
        step = max(1, _PIXELS_AT_ONCE // self.plane.box**2)
        for here in torch.arange(len(rows)).split(step):
            some = slice(int(here[0]), int(here[-1]) + 1)
            coefficients[some] = to_coefficients(normalised(raw[some], self.outside), plane)
            gain[some] = self.ctf(rows[some], count)
        return coefficients, gain

    def images(self, rows: Tensor, following: Tensor) -> Tensor:
        """Normalised images of some rows, shape (b, N, N), while the following ones are read."""
        self.expect(following)
        return normalised(self._raw(rows), self.outside)

    def _raw(self, rows: Tensor) -> Tensor:
        images = torch.from_numpy(self.reader.images(rows.numpy()))
        refuse_blank(self.reader.particles, rows, images)
        return images

    def ctf(self, rows: Tensor, count: int) -> Tensor:
        """CTF of some images at the first coefficients."""
        frequencies = self.plane.frequencies[:count]
        pixel = self.reader.particles.pixel_size_angst
        return ctf(frequencies, self.optics[rows], self.plane.box, pixel).float()


@dataclass(frozen=True)
class _InMemory:
    """A source that holds the coefficients and CTFs of neighbours, and reads others.

    Attributes
    ----------
    first : int
        Row of the first image that is held.
    """

    coefficients: Tensor
    gain: Tensor
    first: int
    others: _FromDisk

    def expect(self, rows: Tensor) -> None:
        """Have those read that are not held."""
        self.others.expect(rows[self._away(rows)])

    def ready(self, rows: Tensor) -> bool:
        """Whether those that are not held have been read."""
        return self.others.ready(rows[self._away(rows)])

    def _away(self, rows: Tensor) -> Tensor:
        return (rows < self.first) | (rows >= self.first + len(self.gain))

    def __call__(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        place, away = rows - self.first, self._away(rows)
        if not bool(away.any()):
            return self.coefficients[place, :count], self.gain[place, :count]
        coefficients = torch.empty(len(rows), count, dtype=self.coefficients.dtype)
        gain = torch.empty(len(rows), count)
        coefficients[away], gain[away] = self.others(rows[away], count)
        held = place[~away]
        coefficients[~away], gain[~away] = self.coefficients[held, :count], self.gain[held, :count]
        return coefficients, gain


def memory_needed(n: int, box: int) -> int:
    """Bytes that hold the half-plane coefficients and CTFs of n images."""
    return n * len(half_plane(box)) * _BYTES


def memory_to_use() -> float:
    """Bytes that held images may take: half of what is free."""
    return _SHARE_OF_MEMORY * psutil.virtual_memory().available


def load_observations(
    particles: Particles,
    diameter: float,
    progress: Callable[[int, int], None] | None = None,
    keep: Keep = "auto",
    ranks: Ranks = ALONE,
) -> ImageSet:
    """Read all images in file order and measure their noise; keep what fits into memory.

    Each image gets zero mean and unit variance outside the particle; the noise spectrum of each
    optics group is the mean power out there, over about 20,000 images spread over the stack.

    Parameters
    ----------
    particles : Particles
    diameter : float
        Of the particle, as a fraction of the box side.
    progress : callable, optional
        Called with (images done, images in all).
    keep : "auto", "memory" or "disk"
        Hold all coefficients, or read images again whenever they are needed: the same numbers
        in memory that does not grow with their count. Auto holds them if they take less than
        half of the free memory.
    ranks : Ranks
        Each process reads and holds its share.

    Raises
    ------
    CryoreconError
        If an image is blank, so that no noise can be measured.
    """
    plane, n = half_plane(particles.box), len(particles)
    radius_px = diameter / 2 * particles.box
    outside = 1 - soft_ball(particles.box, radius_px, 2.0, 2)
    disk = _FromDisk(ReadAhead(particles), particles.ctf_parameters(), plane, outside)
    first, end = ranks.bounds(n)[ranks.index : ranks.index + 2]
    if keep == "auto":
        needed = memory_needed(end - first, particles.box)
        keep = "memory" if needed < memory_to_use() / ranks.neighbours else "disk"
    held = end - first if keep == "memory" else 0
    store = _InMemory(
        torch.empty(held, len(plane), dtype=torch.complex64),
        torch.empty(held, len(plane)),
        first,
        disk,
    )
    group = torch.from_numpy(particles.optics_index()).int()
    power = torch.zeros(int(group.max()) + 1, plane.n_shells)
    heard = _spread(group)
    done = 0
    for rows, following in with_next(_mine(particles, first, end)):
        done += len(rows)
        if progress is not None:
            progress(min(n, done * ranks.count), n)
        rows, following = (r if held else r[heard[r]] for r in (rows, following))
        if len(rows) == 0:
            continue
        images = disk.images(rows, following)
        if held:
            store.coefficients[rows - first] = to_coefficients(images, plane)
            store.gain[rows - first] = disk.ctf(rows, len(plane))
        useful = heard[rows]
        for number in group[rows][useful].unique().tolist():
            of_group = images[useful & (group[rows] == number)]
            power[number] += noise_power_outside(of_group, radius_px, plane) * len(of_group)
    ranks.add_up(power)
    counts = torch.bincount(group[heard], minlength=len(power)).clamp(min=1)
    source: Source = store if held else disk
    rows, noise = torch.arange(n, dtype=torch.int32), power / counts[:, None]
    return ImageSet(plane, source, noise, group, torch.ones(n), rows, ranks, n, _place(particles))


def _mine(particles: Particles, first: int, end: int) -> Iterator[Tensor]:
    """Rows from `first` to `end` in file order, some at a time."""
    for rows in map(torch.from_numpy, particles.in_file_order(_BLOCK)):
        mine = rows[(rows >= first) & (rows < end)]
        if len(mine) > 0:
            yield mine


def with_next(parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each part with the one after it, which is empty at the end."""
    before = None
    for part in parts:
        if before is not None:
            yield before, part
        before = part
    if before is not None:
        yield before, before[:0]


def _place(particles: Particles) -> Tensor | None:
    place = particles.place()
    return None if place is None else torch.from_numpy(place)


def _spread(group: Tensor) -> Tensor:
    """Which images noise is measured on: every k-th of each optics group; shape (n,), bool."""
    heard = torch.zeros(len(group), dtype=torch.bool)
    n_groups = int(group.max()) + 1
    for number in range(n_groups):
        rows = torch.nonzero(group == number)[:, 0]
        heard[rows[:: max(1, -(-len(rows) * n_groups // _NOISE_IMAGES))]] = True
    return heard


def refuse_blank(particles: Particles, rows: Tensor, images: Tensor) -> None:
    """Stop at an image without contrast, naming its row."""
    flat = images.flatten(1)
    row = images.shape[-1]
    blank = torch.nonzero((flat[:, :row] == flat[:, :1]).all(-1))[:, 0]
    blank = blank[(flat[blank] == flat[blank, :1]).all(-1)]
    if len(blank):
        row = int(rows[blank[0]])
        raise CryoreconError(
            f"{particles.path}, row {particles.rows[row] + 1}: the image is blank",
            "Remove such rows from the STAR file",
        )


def half_sets(particles: Particles, generator: torch.Generator) -> Tensor:
    """Half set of each particle, 0 or 1: the STAR file's, or drawn at random."""
    given = particles.random_subsets()
    if given is not None and len(np.unique(given)) == 2:
        return torch.from_numpy(given) - 1
    return torch.randperm(len(particles), generator=generator) % 2


class Grid(Protocol):
    """Whatever says how large images are."""

    @property
    def box(self) -> int:
        """Samples a side."""

    @property
    def pixel_size_angst(self) -> float:
        """Of the images."""


def map_like(path: Path, images: Grid, what: str) -> Tensor:
    """A map that must have the images' box and pixel size, shape (N, N, N), float32.

    Raises
    ------
    CryoreconError
        If it has others.
    """
    found = read_map(path)
    box, pixel = images.box, images.pixel_size_angst
    if len(found.data) != box or abs(found.pixel_size_angst / pixel - 1) > 0.01:
        raise CryoreconError(
            f"The {what} {path} has {len(found.data)} px at {found.pixel_size_angst:g} A, the "
            f"particles {box} px at {pixel:g} A",
            f"Resample the {what} to the particles' box and pixel size",
        )
    return torch.from_numpy(found.data).float()
