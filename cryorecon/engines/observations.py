"""Images as the engines see them: half-plane coefficients, their CTF and their noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryorecon.physics.fourier import HalfPlane, shift_phases
from cryorecon.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Observations:
    """A set of images in Fourier space.

    Attributes
    ----------
    plane : HalfPlane of m coefficients, sorted by radius
    coefficients : Tensor, shape (n, m), complex
        Centred, unnormalised DFT of each image.
    ctf : Tensor, shape (n, m), real
    noise_power : Tensor, shape (groups, n_shells), real
        Expected ``|noise|^2`` of a coefficient, by optics group and shell.
    group : Tensor, shape (n,), int64
    """

    plane: HalfPlane
    coefficients: Tensor
    ctf: Tensor
    noise_power: Tensor
    group: Tensor

    def __len__(self) -> int:
        return self.coefficients.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the coefficients lie."""
        return self.coefficients.device

    def select(self, rows: Tensor | slice, band: float | None = None) -> Observations:
        """The images of some rows, up to a radius in cycles per box; noise spectra are shared."""
        near = self if band is None else self.within(band)
        rows = rows if isinstance(rows, slice) else taken_to(rows, self.device)
        return replace(
            near, coefficients=near.coefficients[rows], ctf=near.ctf[rows], group=near.group[rows]
        )

    def within(self, band: float) -> Observations:
        """All images up to a radius in cycles per box; nothing is copied."""
        plane = self.plane.within(band)
        m = len(plane)
        return replace(
            self,
            plane=plane,
            coefficients=self.coefficients[:, :m],
            ctf=self.ctf[:, :m],
            noise_power=self.noise_power[:, : plane.n_shells],
        )

    def with_coefficients(self, coefficients: Tensor) -> Observations:
        """Other images, shape (n, m), with the same CTFs and noise."""
        return replace(self, coefficients=coefficients)

    def precision(self) -> Tensor:
        """``multiplicity / (2 noise)``: weight of each squared residual in the log-likelihood.

        Shape (n, m).
        """
        by_group = self.plane.multiplicity.to(self.noise_power) / 2
        return (by_group / self.noise_power[:, self.plane.shell])[self.group]

    def matched(self) -> tuple[Tensor, Tensor]:
        """``precision * CTF * Y`` and ``precision * CTF^2``, shape (n, m) each.

        All that the likelihood knows of an image: ``2 Re <matched, S> - <weight, |S|^2>``.
        """
        precision = self.precision()
        return self.coefficients * (self.ctf * precision), self.ctf**2 * precision


Source = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ImageSet:
    """All images of a job; coefficients come from memory or from disk when they are asked for.

    All else that belongs to one image lies on the CPU; a batch moves to the device of the
    plane and the noise spectra when it is selected, if the source does not give it there.

    Attributes
    ----------
    plane : HalfPlane of m coefficients
    source : callable
        Given rows (b,) and a number k, the first k coefficients of these images, shape (b, k),
        complex, and their CTF, real, on any device. It may have methods `expect`, see
        :meth:`expect`, and `ready`, which tells whether rows that were expected need not be waited
        for.
    noise_power : Tensor, shape (groups, n_shells), real
        Expected ``|noise|^2`` of a coefficient, by optics group and shell.
    group : Tensor, shape (n,), int32
    gain : Tensor, shape (n,), real
        Factor on each image's CTF: its scale, negative where particles are black on white.
    rows : Tensor, shape (n,), int32
        Which of the source's images these are.
    ranks : Ranks
        Processes that share the work; all can load every image, each works on its own.
    total : int
        Images of the source: neighbours among them belong to one process.
    place : Tensor, shape (n,), int32, optional
        Where each lies on disk among all; None if they are in that order.
    stored_box : int, optional
        Samples a side of the images on disk; None if as the plane's.
    held : bool
        Whether memory holds them, so that batches are not read from disk.
    spread : float
        Mean of what images were divided by when they were normalised: maps times this are on the
        scale of the images before.
    empty : Tensor, shape (groups, n_shells), bool, optional
        Shells that the images of a group show nothing in; their CTF is 0 there.
    dimming : Tensor, shape (n,), real, optional
        Factor on each image, noise and all: less than 1 for those that outshine the others.
    """

    plane: HalfPlane
    source: Source
    noise_power: Tensor
    group: Tensor
    gain: Tensor
    rows: Tensor
    ranks: Ranks = ALONE
    total: int = 0
    place: Tensor | None = None
    stored_box: int | None = None
    held: bool = False
    spread: float = 1.0
    empty: Tensor | None = None
    dimming: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def mine(self, rows: Tensor) -> Tensor:
        """Those of some rows that this process works on, in order."""
        return rows if self.ranks.count == 1 else rows[self._owner(rows) == self.ranks.index]

    def everyones(self, rows: Tensor, *found: Tensor) -> tuple[Tensor, ...]:
        """What all processes have found of some rows.

        Parameters
        ----------
        rows : Tensor, shape (b,), int64
        found : Tensor, shape (len(self.mine(rows)), ...)
            Of this process's rows.

        Returns
        -------
        tuple of Tensor, shape (b, ...)
        """
        if self.ranks.count == 1:
            return found
        owner = self._owner(rows)
        counts = torch.bincount(owner, minlength=self.ranks.count).tolist()
        place = torch.argsort(owner, stable=True)
        back = torch.empty_like(place)
        back[place] = torch.arange(len(place))
        return tuple(self.ranks.everyones(part, counts)[back] for part in found)

    def _owner(self, rows: Tensor) -> Tensor:
        # A team has only some of the images, which may all be neighbours.
        of_team = self.ranks.team is not None
        ends = torch.tensor(self.ranks.bounds(len(self) if of_team else self.total)[1:])
        place = rows if of_team else self.rows[rows].long()
        return torch.searchsorted(ends, place.contiguous(), right=True)

    @property
    def pixels(self) -> int:
        """Of an image on disk."""
        return (self.stored_box or self.plane.box) ** 2

    @property
    def pixels_read(self) -> int:
        """Of an image, where a batch gets it from."""
        return self.plane.box**2 if self.held else self.pixels

    @property
    def device(self) -> torch.device:
        """Where batches are taken to."""
        return self.noise_power.device

    def select(self, rows: Tensor, band: float | None = None) -> Observations:
        """Load the images of some rows, up to a radius in cycles per box."""
        plane = self.plane if band is None else self.plane.within(band)
        coefficients, ctf = self.source(self.rows[rows].long(), len(plane))
        mine = coefficients, ctf, self.gain[rows, None], self.group[rows].long()
        coefficients, ctf, gain, group = (taken_to(values, self.device) for values in mine)
        noise = self.noise_power[:, : plane.n_shells]
        if self.dimming is not None:
            coefficients = coefficients * taken_to(self.dimming[rows, None], self.device)
        return Observations(plane, coefficients, ctf * gain, noise, group)

    def expect(self, rows: Tensor) -> None:
        """Tell which images will be selected next: they are read while others are worked on."""
        expect = getattr(self.source, "expect", None)
        if expect is not None:
            expect(self.rows[rows].long())

    def in_file_order(self, rows: Tensor) -> Tensor:
        """Rows, ascending ones, as the disk gives them fastest."""
        return rows if self.place is None else rows[torch.argsort(self.place[rows])]

    def whole(self, band: float | None = None) -> Observations:
        """Load all images, up to a radius in cycles per box."""
        return self.select(torch.arange(len(self)), band)

    def within(self, band: float) -> ImageSet:
        """The same images up to a radius in cycles per box, not loaded yet."""
        plane = self.plane.within(band)
        return replace(self, plane=plane, noise_power=self.noise_power[:, : plane.n_shells])

    def apart(self, rows: Tensor, ranks: Ranks | None = None) -> ImageSet:
        """Some images with noise spectra and gains of their own, for an independent run.

        Parameters
        ----------
        ranks : Ranks, optional
            Those of the processes that this run is shared by, if not all.
        """
        return replace(
            self,
            ranks=self.ranks if ranks is None else ranks,
            noise_power=self.noise_power.clone(),
            group=self.group[rows],
            gain=self.gain[rows],
            rows=self.rows[rows],
            place=None if self.place is None else self.place[rows],
            dimming=None if self.dimming is None else self.dimming[rows],
        )


def rows_of(values: Tensor, rows: Tensor) -> Tensor:
    """Some rows of values on any device, asked for on the CPU."""
    return values[taken_to(rows, values.device)]


def taken_to(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device.

    From the CPU to a GPU through page-locked memory: the copy is then twice as fast, and nobody
    waits for it: the next batch is gathered, or read from disk, while this one is worked on.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def centred(matched: Tensor, offsets_px: Tensor, plane: HalfPlane) -> Tensor:
    """Undo in-plane offsets: multiply by the conjugate of the image model's shift phases.

    Parameters
    ----------
    matched : Tensor, shape (..., m), complex
    offsets_px : Tensor, shape (..., 2)
    """
    return matched * shift_phases(offsets_px, plane).conj().to(matched.dtype)


def as_real(values: Tensor) -> Tensor:
    """Complex (..., m) as real (..., 2m), so that inner products are real matrix products."""
    return torch.cat([values.real, values.imag], -1)


def power_ratio(batch: Observations, power: Tensor) -> tuple[float, float]:
    """Power of images beyond their noise relative to a model's, and in units of the noise.

    Parameters
    ----------
    power : Tensor, shape (m,)
        Mean squared modulus of the model's slices.
    """
    noise = batch.noise_power[:, batch.plane.shell][batch.group]
    precision = batch.precision()
    seen = ((batch.coefficients.abs().square() - noise) * precision).sum(-1).mean()
    expected = (batch.ctf.square() * power * precision).sum(-1).mean()
    ratio = (seen / expected.clamp(min=1e-30)).clamp(min=1e-6)
    return float(ratio), float(seen)
