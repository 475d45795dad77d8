"""From particles on disk to what the engines work on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import psutil
import torch
from torch import Tensor

from cryorecon.engines.observations import ImageSet, Source, rows_of, taken_to
from cryorecon.engines.shrinking import free_memory
from cryorecon.io.particles import Particles
from cryorecon.io.read_ahead import ReadAhead
from cryorecon.physics.ctf import CtfParameters, ctf
from cryorecon.physics.fourier import HalfPlane, half_plane, to_coefficients
from cryorecon.physics.imaging import (
    coefficients_by_shell,
    noise_power_outside,
    pooled_spectra,
)
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.resampling import downsample_images
from cryorecon.ranks import ALONE, Ranks
from cryorecon.run.empty_shells import empty_shells, shell_power
from cryorecon.run.image_checks import FitImages

Keep = Literal["auto", "memory", "disk"]

_BLOCK = 512
# Of images that are worked on together: two megabytes, which stay in a cache.
_PIXELS_AT_ONCE = 1 << 19
# On a GPU: 64 MB, and some ten times that while they are worked on.
_PIXELS_AT_ONCE_ELSEWHERE = 1 << 24
# Coefficients (complex64) and CTF (float32) of an image, bytes each.
_BYTES = 12
_SHARE_OF_MEMORY = 0.5
# Of a GPU's: maps, their derivatives and batches need the rest.
_SHARE_OF_GPU = 0.25
# Images that noise spectra are measured on: more would not make them better.
_NOISE_IMAGES = 20_000
# Planes that hold more than this share of what lies outside the particle are no noise.
_STEEP = 0.2


def normalised(images: Tensor, outside: Tensor, *, sloping: bool = False) -> Tensor:
    """Images with zero mean and unit standard deviation outside the particle.

    With `sloping` a plane is taken out in place of a level where it is steep: ice may be thicker on
    one side.
    """
    return divided_by_noise(images, outside, sloping=sloping)[0]


def divided_by_noise(
    images: Tensor, outside: Tensor, *, sloping: bool = True
) -> tuple[Tensor, Tensor]:
    """The same, and what each was divided by, shape (b,)."""
    weight = outside.flatten() / outside.sum()
    slopes = _slopes(weight) if sloping else weight
    found, spreads = torch.empty_like(images), images.new_empty(len(images))
    # Some megabyte at a time: it is gone through six times.
    step = _images_at_once(images.shape[-1], images.device)
    parts = zip(images.split(step), found.split(step), spreads.split(step), strict=True)
    for raw, target, spread in parts:
        values = _take_level_out(raw.flatten(1), weight, target.view(len(raw), -1))
        if sloping:
            tilt = values @ (slopes * weight).T
            steep = tilt.square().sum(-1) > _STEEP * (values.square() @ weight)
            values.addmm_(tilt * steep[:, None], slopes, alpha=-1)
        torch.sqrt(values.square() @ weight, out=spread).clamp_(min=1e-20)
        values.div_(spread[:, None])
    return found, spreads


def levelled(images: Tensor, outside: Tensor) -> Tensor:
    """Images with zero mean outside the particle, their contrast as it was."""
    flat = images.flatten(1)
    weight = outside.flatten() / outside.sum()
    return _take_level_out(flat, weight, torch.empty_like(flat)).view_as(images)


def _take_level_out(flat: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    torch.sub(flat, (flat @ weight)[:, None], out=out)
    # What is left of the level after rounding counts where it is large beside the spread.
    return out.sub_((out @ weight)[:, None])


def _slopes(weight: Tensor) -> Tensor:
    """Planes along x and y without a level, of mean square 1 and orthogonal; shape (2, N^2)."""
    box = math.isqrt(len(weight))
    steps = torch.arange(box, device=weight.device, dtype=weight.dtype) - box // 2
    x, y = steps.repeat(box), steps.repeat_interleave(box)
    x = x - x @ weight
    x = x / (x.square() @ weight).sqrt()
    y = y - y @ weight
    y = y - x * ((x * y) @ weight)
    return torch.stack([x, y / (y.square() @ weight).sqrt()])


@dataclass(frozen=True)
class _FromDisk:
    """A source that reads, normalises and transforms the images each time, on a device.

    The plane, the window outside the particle and the table of empty shells lie there.
    """

    reader: ReadAhead
    fit: FitImages
    optics: CtfParameters
    plane: HalfPlane
    outside: Tensor
    group: Tensor
    empty: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where images are worked on; what is found stays there."""
        return self.outside.device

    def expect(self, rows: Tensor) -> None:
        """Read these rows, wanted next, while others are worked on."""
        self.reader.expect(rows.numpy())

    def ready(self, rows: Tensor) -> bool:
        """Whether these rows, which were expected, have been read."""
        return self.reader.ready(rows.numpy())

    def __call__(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        plane, raw = self.plane.first(count), self._raw(rows)
        coefficients = torch.empty(len(rows), count, dtype=torch.complex64, device=self.device)
        gain = torch.empty(len(rows), count, device=self.device)
        for some in self._steps(len(rows)):
            images = normalised(self._taken(raw[some]), self.outside, sloping=True)
            coefficients[some] = to_coefficients(images, plane)
            gain[some] = self.ctf(rows[some], count)
        return coefficients, gain

    def images(self, rows: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images of some rows, shape (b, N, N), while the following ones are read.

        And what they were divided by, shape (b,).
        """
        self.expect(following)
        return divided_by_noise(self._taken(self._raw(rows)), self.outside)

    def _taken(self, raw: Tensor) -> Tensor:
        """Images from disk on the device, in the box that is worked in."""
        box = self.plane.box
        if box == raw.shape[-1]:
            return taken_to(raw, self.device)
        found = torch.empty(len(raw), box, box, device=self.device)
        for some in self._steps(len(raw)):
            found[some] = downsample_images(taken_to(raw[some], self.device), box)
        return found

    def _steps(self, n: int) -> list[slice]:
        """Images that are worked on together."""
        step = _images_at_once(self.reader.particles.stored_box, self.device)
        return [slice(first, min(first + step, n)) for first in range(0, n, step)]

    def _raw(self, rows: Tensor) -> Tensor:
        return self.fit.emptied(rows, torch.from_numpy(self.reader.images(rows.numpy())))

    def ctf(self, rows: Tensor, count: int) -> Tensor:
        """CTF of some images at the first coefficients."""
        frequencies = self.plane.frequencies[:count]
        pixel = self.reader.particles.pixel_size_angst
        optics = CtfParameters(*taken_to(self.optics[rows].stacked(), self.device))
        found = ctf(frequencies, optics, self.plane.box, pixel).float()
        if self.empty is None:
            return found
        return found.masked_fill_(
            rows_of(self.empty, self.group[rows])[:, self.plane.shell[:count]], 0
        )


def _images_at_once(box: int, device: torch.device) -> int:
    """How many images to work on together: as few as a CPU's cache holds, many on a GPU."""
    pixels = _PIXELS_AT_ONCE if device.type == "cpu" else _PIXELS_AT_ONCE_ELSEWHERE
    return max(1, pixels // box**2)


@dataclass(frozen=True)
class _InMemory:
    """A source that holds the coefficients and CTFs of neighbours, and reads others.

    It gives them where it holds them, the CPU's memory or a GPU's.

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
        away = self._away(rows)
        if not bool(away.any()):
            return self._held(rows, count)
        parts = self._held(rows[~away], count), self.others(rows[away], count)
        # Where each row is, once those that are held come first.
        back = torch.argsort(torch.argsort(away.int(), stable=True))
        both = zip(*parts, strict=True)
        coefficients, gain = (torch.cat([held, other.to(held)]) for held, other in both)
        return rows_of(coefficients, back), rows_of(gain, back)

    @staticmethod
    def empty(others: _FromDisk, first: int, end: int, device: torch.device) -> _InMemory:
        """Room for images `first` to `end`."""
        shape = end - first, len(others.plane)
        coefficients = torch.empty(shape, dtype=torch.complex64, device=device)
        return _InMemory(coefficients, torch.empty(shape, device=device), first, others)

    def put(self, rows: Tensor, images: Tensor) -> None:
        """Hold some normalised images."""
        place = (rows - self.first).to(self.gain.device)
        plane = self.others.plane
        self.coefficients[place] = to_coefficients(images, plane).to(self.coefficients)
        self.gain[place] = self.others.ctf(rows, len(plane)).to(self.gain)

    def without(self, empty: Tensor) -> _InMemory:
        """The same with no CTF in the empty shells of each group, shape (groups, n_shells)."""
        others = replace(self.others, empty=empty)
        shell = others.plane.shell
        group = others.group[self.first :][: len(self.gain)]
        for gain, of in zip(self.gain.split(_BLOCK), group.split(_BLOCK), strict=True):
            gain.masked_fill_(rows_of(empty, of)[:, shell].to(gain.device), 0)
        return replace(self, others=others)

    def _held(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        place = taken_to(rows - self.first, self.gain.device)
        return rows_of(self.coefficients[:, :count], place), rows_of(self.gain[:, :count], place)


def memory_needed(n: int, box: int) -> int:
    """Bytes that hold the half-plane coefficients and CTFs of n images."""
    return n * len(half_plane(box)) * _BYTES


def memory_to_use(device: torch.device | None = None) -> float:
    """Bytes that held images may take: half of what is free, or a quarter of a GPU's."""
    if device is None or device.type == "cpu":
        return _SHARE_OF_MEMORY * psutil.virtual_memory().available
    return _SHARE_OF_GPU * free_memory(device)


def load_observations(
    particles: Particles,
    diameter: float,
    progress: Callable[[int, int], None] | None = None,
    keep: Keep = "auto",
    ranks: Ranks = ALONE,
    device: torch.device | str = "cpu",
) -> ImageSet:
    """Read all images in file order and measure their noise; keep what fits into memory.

    Each image loses its level and slope and gets unit variance outside the particle; the noise
    spectrum of each optics group is the mean power out there, over about 20,000 images spread over
    the stack; that of a small group mostly all groups' (see :func:`pooled_spectra`). Shells that a
    group's images show nothing in have no CTF (:mod:`cryorecon.run.empty_shells`). A few images
    that are blank, masked or not finite are left out: `rows` of the set are the others.

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
        half of the free memory. A GPU holds them itself if they take less than a quarter of its.
    ranks : Ranks
        Each process reads and holds its share.
    device : device
        Where images are normalised and transformed, and batches taken to.

    Raises
    ------
    CryoreconError
        If more than a twentieth of the images are blank, masked or not finite.
    """
    plane, n, device = half_plane(particles.box).to(device), len(particles), torch.device(device)
    radius_px = diameter / 2 * particles.box
    outside = (1 - soft_ball(particles.box, radius_px, 2.0, 2)).to(device)
    group = torch.from_numpy(particles.optics_index()).int()
    optics, fit = particles.ctf_parameters(), FitImages(particles)
    disk = _FromDisk(ReadAhead(particles), fit, optics, plane, outside, group)
    first, end = ranks.bounds(n)[ranks.index : ranks.index + 2]
    where = place_to_hold(end - first, particles.box, keep, device, ranks)
    store = None if where is None else _InMemory.empty(disk, first, end, where)
    heard = _spread(group)
    power, shown = torch.zeros(2, int(group.max()) + 1, plane.n_shells, device=device)
    done, spread = 0, torch.zeros(1, dtype=torch.float64, device=device)
    for rows, following in with_next(_mine(particles, first, end)):
        done += len(rows)
        if progress is not None:
            progress(min(n, done * ranks.count), n)
        rows, following = (r if store else r[heard[r]] for r in (rows, following))
        if len(rows) == 0:
            continue
        images, spreads = disk.images(rows, following)
        if store:
            store.put(rows, images)
        useful = torch.nonzero(heard[rows] & fit.fit[rows])[:, 0]
        spread += rows_of(spreads, useful).double().sum()
        for number, of_group in _by_group(images, useful, group[rows[useful]]):
            power[number] += noise_power_outside(of_group, radius_px, plane) * len(of_group)
            shown[number] += shell_power(of_group, plane)
    ranks.add_up(power, spread, shown)
    kept = fit.everywhere(ranks)
    heard &= fit.fit
    noise = _noise_spectra(power, group[heard], plane)
    empty = empty_shells(shown)
    if empty is not None:
        disk, store = replace(disk, empty=empty), None if store is None else store.without(empty)
    source: Source = store or disk
    rows = torch.arange(n, dtype=torch.int32)
    apart = ranks, n, _place(particles), particles.stored_box, store is not None
    spread_of_one = float(spread) / int(heard.sum())
    found = ImageSet(plane, source, noise, group, torch.ones(n), rows, *apart, spread_of_one, empty)
    return found if len(kept) == n else found.apart(kept)


def _by_group(images: Tensor, rows: Tensor, group: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Some rows of images, those of one group at a time, and its number."""
    for number in group.unique().tolist():
        yield number, rows_of(images, rows[group == number])


def _noise_spectra(power: Tensor, group: Tensor, plane: HalfPlane) -> Tensor:
    """Of the sums of power (groups, n_shells) over images of some groups."""
    counts, of_shells = torch.bincount(group, minlength=len(power)), coefficients_by_shell(plane)
    return pooled_spectra(power * of_shells, counts.to(power.device)[:, None] * of_shells)


def place_to_hold(
    n: int, box: int, keep: Keep, device: torch.device, ranks: Ranks = ALONE
) -> torch.device | None:
    """Where n images are held: the device, if it has room, else the CPU's memory; or nowhere."""
    needed = memory_needed(n, box)
    if keep != "disk" and device.type != "cpu" and needed < memory_to_use(device):
        return device
    fits = keep == "auto" and needed < memory_to_use() / ranks.neighbours
    return torch.device("cpu") if keep == "memory" or fits else None


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
    numbers = group.unique()
    for number in numbers:
        rows = torch.nonzero(group == number)[:, 0]
        heard[rows[:: max(1, -(-len(rows) * len(numbers) // _NOISE_IMAGES))]] = True
    return heard
