"""Centred discrete Fourier transforms and the list of coefficients that a box holds.

Transforms are unnormalised forward and carry 1/N^d backward. Frequencies are in cycles per
box; sample ``N // 2`` is the origin in both spaces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def fft_centred(array: Tensor, ndim: int) -> Tensor:
    """Centred DFT over the last `ndim` axes: ``fftshift(fft(ifftshift(array)))``.

    Parameters
    ----------
    array : Tensor, shape (..., N, ..., N)
        Real or complex samples, origin at ``N // 2`` along each transformed axis.
    ndim : int
        How many trailing axes to transform.
    """
    dims = tuple(range(-ndim, 0))
    return torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(array, dims), dim=dims), dims)


def ifft_centred(array: Tensor, ndim: int) -> Tensor:
    """Inverse of :func:`fft_centred`; the result is complex."""
    dims = tuple(range(-ndim, 0))
    return torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(array, dims), dim=dims), dims)


def centred_frequencies(box: int, device: torch.device | None = None) -> Tensor:
    """Integer frequencies, in cycles per box, of a centred DFT of `box` samples."""
    return torch.arange(box, device=device) - box // 2


def crop_or_pad_centred(array: Tensor, box: int, ndim: int) -> Tensor:
    """Cut or zero-pad the last `ndim` axes to `box` samples, keeping the origin at ``N // 2``.

    Works in real space (a larger or smaller box) and in Fourier space (another sampling).
    """
    for dim in range(-ndim, 0):
        size = array.shape[dim]
        low = box // 2 - size // 2
        if box > size:
            pad = [0, 0] * (-dim - 1) + [low, box - size - low]
            array = torch.nn.functional.pad(array, pad)
        elif box < size:
            array = array.narrow(dim, -low, box)
    return array


def fft_padded(array: Tensor, size: int, keep: int, ndim: int) -> Tensor:
    """The middle of the centred DFT of zero-padded samples, without transforming the zeros.

    ``crop(fft_centred(pad(array, size)), keep)``, axis by axis: rows that are still zero, and
    frequencies that nobody wants, take no time.

    Parameters
    ----------
    array : Tensor, shape (..., N, ..., N)
        Samples, N at most `size`.
    size, keep : int
        Points a side of the padded box, and of what is kept of its transform.
    """
    for dim in range(-1, -ndim - 1, -1):
        array = middle(torch.fft.fft(wrapped(array, dim, size), dim=dim), dim, keep)
    return array


def ifft_cropped(array: Tensor, size: int, box: int, ndim: int) -> Tensor:
    """The middle of the samples of a centred transform whose outer frequencies are zero; complex.

    ``crop(ifft_centred(pad(array, size)), box)``, the way back of :func:`fft_padded`.
    """
    for dim in range(-ndim, 0):
        array = middle(torch.fft.ifft(wrapped(array, dim, size), dim=dim), dim, box)
    return array


def wrapped(array: Tensor, dim: int, size: int) -> Tensor:
    """``ifftshift(pad(array))`` along one axis."""
    length = array.shape[dim]
    before, after = array.split([length // 2, length - length // 2], dim)
    if size == length:
        return torch.cat([after, before], dim)
    shape = list(array.shape)
    shape[dim] = size - length
    return torch.cat([after, array.new_zeros(shape), before], dim)


def middle(array: Tensor, dim: int, length: int) -> Tensor:
    """``crop(fftshift(array))`` along one axis."""
    low, size = length // 2, array.shape[dim]
    parts = array.narrow(dim, size - low, low), array.narrow(dim, 0, length - low)
    return torch.cat(parts, dim)


def radius_grid(box: int, ndim: int, device: torch.device | None = None) -> Tensor:
    """Distance from the origin, in samples, of each point of a centred grid; float64."""
    squares = centred_frequencies(box, device).double() ** 2
    total = squares
    for _ in range(ndim - 1):
        total = total[..., None] + squares
    return total.sqrt_()


def lowpass(array: Tensor, band: float, ndim: int, width: float = 2.0) -> Tensor:
    """Low-pass filter with a raised-cosine edge.

    Parameters
    ----------
    array : Tensor, shape (..., N, ..., N)
        Real samples.
    band : float
        Radius, in cycles per box, where the gain has fallen to one half.
    width : float
        Full width of the edge in cycles per box.
    """
    radius = radius_grid(array.shape[-1], ndim, array.device).to(array.dtype)
    ramp = ((radius - band) / width + 0.5).clamp(0, 1)
    gain = 0.5 + 0.5 * torch.cos(torch.pi * ramp)
    return ifft_centred(fft_centred(array, ndim) * gain, ndim).real


@dataclass(frozen=True)
class HalfPlane:
    """One of each Friedel pair of an image's Fourier coefficients, sorted by radius.

    A real image's coefficient at -k is the conjugate of that at k, so half the plane holds it
    all; sorted by radius, a band limit is a prefix of the list.

    Attributes
    ----------
    box : int
        Samples a side of the image.
    frequencies : Tensor, shape (m, 2), int64
        (kx, ky) in cycles per box; the first is (0, 0).
    radius : Tensor, shape (m,), float64
        Always on the CPU: a band is looked up without waiting for a device.
    shell : Tensor, shape (m,), int64
        Radius rounded to the nearest shell.
    multiplicity : Tensor, shape (m,), float64
        How many coefficients of the full plane each stands for: 2, and 1 at the origin.
    """

    box: int
    frequencies: Tensor
    radius: Tensor
    shell: Tensor
    multiplicity: Tensor

    def __len__(self) -> int:
        return self.frequencies.shape[0]

    @property
    def n_shells(self) -> int:
        """One more than the largest shell in the list."""
        return int(self.radius[-1] + 0.5) + 1

    def to(self, device: torch.device | str) -> HalfPlane:
        """The same list on another device."""
        return HalfPlane(
            self.box,
            self.frequencies.to(device),
            self.radius,
            self.shell.to(device),
            self.multiplicity.to(device),
        )

    def within(self, band: float) -> HalfPlane:
        """The coefficients with radius <= `band`: a prefix of this list."""
        return self.first(int(torch.searchsorted(self.radius, band + 1e-9)))

    def first(self, count: int) -> HalfPlane:
        """The coefficients of lowest radius."""
        return replace(
            self,
            frequencies=self.frequencies[:count],
            radius=self.radius[:count],
            shell=self.shell[:count],
            multiplicity=self.multiplicity[:count],
        )


def max_band(box: int) -> int:
    """Largest radius whose circle holds whole Friedel pairs: ``(N - 1) // 2``."""
    return (box - 1) // 2


def half_plane(
    box: int, band: float | None = None, device: torch.device | None = None
) -> HalfPlane:
    """List the half-plane coefficients of a box up to a radius.

    Parameters
    ----------
    box : int
        Samples a side, even or odd.
    band : float, optional
        Largest radius in cycles per box; at most ``(N - 1) // 2``, the default.
    """
    limit = max_band(box) if band is None else min(band, max_band(box))
    axis = torch.arange(-max_band(box), max_band(box) + 1, device=device)
    ky, kx = torch.meshgrid(axis, axis, indexing="ij")
    keep = ((kx > 0) | ((kx == 0) & (ky >= 0))) & (kx**2 + ky**2 <= (limit + 1e-9) ** 2)
    frequencies = torch.stack([kx[keep], ky[keep]], -1)
    squared = (frequencies**2).sum(-1)
    frequencies = frequencies[torch.sort(squared, stable=True).indices]
    radius = (frequencies.double() ** 2).sum(-1).sqrt()
    multiplicity = torch.full_like(radius, 2.0)
    multiplicity[0] = 1.0
    return HalfPlane(box, frequencies, radius.cpu(), (radius + 0.5).long(), multiplicity)


def _flat_index(plane: HalfPlane, sign: int) -> Tensor:
    centre = plane.box // 2
    kx, ky = plane.frequencies.unbind(-1)
    return (sign * ky + centre) * plane.box + sign * kx + centre


def to_coefficients(images: Tensor, plane: HalfPlane) -> Tensor:
    """Half-plane Fourier coefficients of real images.

    Parameters
    ----------
    images : Tensor, shape (..., N, N), real
    plane : HalfPlane

    Returns
    -------
    Tensor, shape (..., m), complex
    """
    # The list has no negative kx: it is in the half that a real transform computes.
    spectrum = torch.fft.rfft2(torch.fft.ifftshift(images, (-2, -1)))
    kx, ky = plane.frequencies.unbind(-1)
    index = (ky % plane.box) * spectrum.shape[-1] + kx
    return spectrum.flatten(-2).index_select(-1, index)


def to_images(coefficients: Tensor, plane: HalfPlane) -> Tensor:
    """Real images of half-plane coefficients; what the list does not hold is zero.

    Parameters
    ----------
    coefficients : Tensor, shape (..., m), complex

    Returns
    -------
    Tensor, shape (..., N, N), real
    """
    batch = coefficients.shape[:-1]
    full = coefficients.new_zeros(*batch, plane.box * plane.box)
    full[..., _flat_index(plane, -1)] = coefficients.conj()
    full[..., _flat_index(plane, 1)] = coefficients
    return ifft_centred(full.unflatten(-1, (plane.box, plane.box)), 2).real


def shell_sums(values: Tensor, shells: Tensor, n_shells: int) -> Tensor:
    """Sum real values over shells along the last axis: shape (..., m) to (..., n_shells)."""
    sums = values.new_zeros(*values.shape[:-1], n_shells)
    return sums.index_add_(-1, shells, values)


def shift_phases(offsets_px: Tensor, plane: HalfPlane) -> Tensor:
    """Factors that turn ``P(x, y)`` into ``P(x + ox, y + oy)`` in Fourier space.

    Parameters
    ----------
    offsets_px : Tensor, shape (..., 2)
        (ox, oy): the RELION origin in pixels; content moves by its negative.

    Returns
    -------
    Tensor, shape (..., m), complex
    """
    frequencies = plane.frequencies.to(offsets_px.dtype)
    angle = (2 * torch.pi / plane.box) * (offsets_px @ frequencies.T)
    return torch.polar(torch.ones_like(angle), angle)
