"""Images and maps on circles in Fourier space: polar samples and their angular harmonics.

An image's transform ``Y(k, theta)`` at radius k (cycles per box) and angle theta, that is at
``(kx, ky) = k (cos theta, sin theta)``, has the harmonics

    s_m(k) = 1/T sum_t Y(k, theta_t) exp(-i m theta_t),   theta_t = 2 pi t / T.

Turning the image by psi multiplies ``s_m`` by a phase ``exp(-+ i m psi)``. Of a real image half
the circle tells the other, ``Y(k, theta + pi) = conj Y(k, theta)``, and
``s_{-m} = (-1)^m conj s_m``. Transforms are unnormalised sums about sample ``N // 2``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.physics.fourier import (
    centred_frequencies,
    crop_or_pad_centred,
    fft_centred,
)
from cryorecon.physics.gridding import OVERSAMPLING, Kernel, RowMap, neighbours


@dataclass(frozen=True)
class PolarGrid:
    """Circles in Fourier space.

    Attributes
    ----------
    radii : Tensor, shape (K,), float64
        In cycles per box, positive.
    n_angles : int
        T, even: samples of a whole circle.
    max_order : int
        M: harmonics 0 to M are kept; less than ``T / 2``.
    """

    radii: Tensor
    n_angles: int
    max_order: int

    def __post_init__(self) -> None:
        if self.n_angles % 2 or not 0 <= self.max_order < self.n_angles // 2:
            raise ValueError("n_angles must be even and more than twice max_order")

    @property
    def angles(self) -> Tensor:
        """Angles of the half circle in radians, shape (T / 2,), float64."""
        return torch.arange(self.n_angles // 2).double() * (2 * torch.pi / self.n_angles)

    @property
    def points(self) -> Tensor:
        """(kx, ky) of the half circles, shape (K T / 2, 2), float64; the angle runs fastest."""
        direction = torch.stack([torch.cos(self.angles), torch.sin(self.angles)], -1)
        return (self.radii[:, None, None] * direction).flatten(0, 1)

    def harmonics(self, samples: Tensor) -> Tensor:
        """Angular harmonics of half circles.

        Parameters
        ----------
        samples : Tensor, shape (..., T / 2), complex
            ``Y`` with ``Y(theta + pi) = conj Y(theta)``.

        Returns
        -------
        Tensor, shape (..., M + 1), complex
        """
        orders = torch.arange(self.max_order + 1)
        waves = torch.polar(
            torch.full((), 2.0 / self.n_angles, dtype=torch.float64).expand(1, 1),
            -self.angles[:, None] * orders,
        ).to(samples)
        # The other half circle leaves twice the real part in even orders and twice the
        # imaginary part in odd ones.
        result = samples.new_empty(*samples.shape[:-1], len(orders))
        for parity, part in ((0, samples.real), (1, samples.imag)):
            mine = torch.view_as_real(waves[:, parity::2]).flatten(1)
            terms = torch.view_as_complex((part @ mine).unflatten(-1, (-1, 2)).contiguous())
            result[..., parity::2] = terms * 1j if parity else terms
        return result


def angles_needed(radius_cycles: float, max_order: int) -> int:
    """Samples of a circle that keep all of a square image, corners too, out of orders to M.

    At radius k a pixel at distance r from the centre carries orders up to about ``2 pi k r / N``.
    Ten more orders have their place, which a factor such as an astigmatic CTF may add.
    """
    reach = 2 * torch.pi * radius_cycles * 0.5**0.5 + 10
    return 2 * -(-max(int(max_order + reach), 2 * max_order + 20) // 2)


class PolarTransform:
    """From images to polar samples: a partial DFT on a fine grid, then Kaiser-Bessel weights.

    The fine grid has steps of half a cycle per box and holds only what the circles need, so that
    two matrix products take the place of a padded FFT. The relative error is about 1e-5.

    Parameters
    ----------
    box : int
        Samples a side of the images.
    grid : PolarGrid
        Radii at most ``N / 2``.
    dtype : torch.dtype
        float32 or float64.
    """

    def __init__(
        self,
        box: int,
        grid: PolarGrid,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernel: Kernel | None = None,
    ) -> None:
        kernel = kernel or Kernel()
        self.box, self.grid = box, grid
        half = kernel.width // 2
        reach = int(OVERSAMPLING * float(grid.radii.max())) + half + 1
        # The half circles have ky >= 0.
        gx, gy = torch.arange(-reach, reach + 1), torch.arange(-half, reach + 1)
        position = centred_frequencies(box).double()
        falloff = kernel.falloff(position / (OVERSAMPLING * box))

        def waves(frequencies: Tensor) -> Tensor:
            phase = (-2 * torch.pi / (OVERSAMPLING * box)) * frequencies[:, None] * position
            both = torch.cat([torch.cos(phase), torch.sin(phase)]) / falloff
            return both.to(device, dtype)

        self._x, self._y = waves(gx), waves(gy)
        points = (grid.points * OVERSAMPLING).flip(-1)
        matrix = neighbours(points, torch.tensor([half, reach]), (len(gy), len(gx)), kernel)
        self._sparse = matrix.to(dtype, device)

    def samples(self, images: Tensor) -> Tensor:
        """Polar samples of real images, shape (b, N, N) to (b, K, T / 2), complex."""
        count = len(images)
        rows = images.permute(2, 1, 0).reshape(self.box, -1)
        along_x = (self._x @ rows).view(2, -1, self.box, count)
        along_y = self._y @ along_x.flatten(0, 1)
        # (real or imaginary in x, gx, real or imaginary in y, gy, image)
        parts = along_y.view(2, along_x.shape[1], 2, -1, count)
        real = parts[0, :, 0] - parts[1, :, 1]
        imaginary = parts[0, :, 1] + parts[1, :, 0]
        table = torch.cat([real, imaginary], -1).transpose(0, 1).flatten(0, 1)
        read = self._sparse.product(table).view(len(self.grid.radii), -1, 2, count)
        return torch.complex(read[:, :, 0], read[:, :, 1]).permute(2, 0, 1)

    def adjoint(self, samples: Tensor) -> Tensor:
        """Adjoint of :meth:`samples` under ``Re sum conj(a) b``: (b, K, T / 2) to (b, N, N)."""
        count = len(samples)
        values = torch.view_as_real(samples).permute(1, 2, 3, 0).reshape(-1, 2 * count)
        table = self._sparse.transposed().product(values.contiguous())
        table = table.view(self._y.shape[0] // 2, self._x.shape[0] // 2, 2, count)
        real, imaginary = table.transpose(0, 1).unbind(2)
        parts = torch.stack(
            [torch.stack([real, imaginary], 1), torch.stack([imaginary, -real], 1)]
        ).flatten(2, 3)
        along_x = self._y.T @ parts.flatten(0, 1)
        images = self._x.T @ along_x.reshape(self._x.shape[0], -1)
        return images.view(self.box, self.box, count).permute(2, 1, 0)


class PolarSlices:
    """Central slices of a map on circles, for fixed viewing directions; differentiable.

    The map's transform on a grid that is oversampled twice is read by Kaiser-Bessel weights,
    36 rows of 6 neighbours with the default kernel, error about 1e-5; 16 of 4 with ``Kernel(4)``,
    about 6e-4. Memory is 12 bytes a row in float32, twice that where gradients are needed, and 4
    bytes a neighbour along a row; while samples are read, the table and the samples as many times
    over as a row has neighbours.

    Parameters
    ----------
    box : int
        Voxels a side of the map.
    grid : PolarGrid
        Radii in cycles per the map's box, at most ``N / 2 - 1``.
    rotations : Tensor, shape (q, 3, 3)
        A, reference to image coordinates: rows e1, e2 and the viewing direction.
    gradients : bool
        Keep the transposed matrix too, which gradients in the map need.
    """

    def __init__(
        self,
        box: int,
        grid: PolarGrid,
        rotations: Tensor,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernel: Kernel | None = None,
        gradients: bool = True,
    ) -> None:
        kernel = kernel or Kernel()
        self.box, self.grid, self.n_views = box, grid, len(rotations)
        reach = int(OVERSAMPLING * float(grid.radii.max())) + kernel.width // 2 + 1
        self._side = 2 * reach + 1
        position = centred_frequencies(box).double() / (OVERSAMPLING * box)
        fall = kernel.falloff(position)
        cube = fall[:, None, None] * fall[:, None] * fall
        self._gain = (1 / cube).to(device, dtype)
        points = (grid.points @ rotations[:, :2].double()).flatten(0, 1) * OVERSAMPLING
        origin = torch.tensor([reach] * 3)
        read = RowMap.of(points.flip(-1), origin, (self._side,) * 3, kernel)
        read = read.with_adjoint() if gradients else read
        self._read = read.to(dtype, device)

    def samples(self, volume: Tensor) -> Tensor:
        """Polar samples of all views, shape (N, N, N) to (q, K, T / 2), complex."""
        padded = crop_or_pad_centred(volume * self._gain, OVERSAMPLING * self.box, 3)
        table = crop_or_pad_centred(fft_centred(padded, 3), self._side, 3)
        read = self._read(torch.view_as_real(table))
        return torch.view_as_complex(read).view(self.n_views, len(self.grid.radii), -1)

    def harmonics(self, volume: Tensor) -> Tensor:
        """Angular harmonics of all views, shape (q, K, M + 1), complex."""
        return self.grid.harmonics(self.samples(volume))


def noise_by_shell(box: int, grid: PolarGrid, level: Tensor | None = None) -> Iterator[Tensor]:
    """What noise of one shell leaves in the second moments, shell after shell.

    Noise whose DFT coefficients are independent, of power 1 in one shell and 0 elsewhere, gives
    ``E s_m(k) s_m(k')*``: not diagonal in the radius, as circles between the coefficients share
    them. Coefficients in the corners of the plane count to the last shell.

    Parameters
    ----------
    box : int
        Samples a side of the images.
    grid : PolarGrid
        Radii in cycles per box.
    level : Tensor, shape (N, N), optional
        Weights, summing to 1, of the mean that was subtracted from every image.

    Yields
    ------
    Tensor, shape (T, K, K), complex128
        Orders -T/2 to T/2 - 1.
    """
    axis = centred_frequencies(box).double()
    half = grid.points
    points = torch.cat([half.view(len(grid.radii), -1, 2), -half.view(len(grid.radii), -1, 2)], 1)

    def waves(frequencies: Tensor) -> Tensor:
        # Transform at a frequency of each Fourier mode of the box, along one axis.
        phase = (-2 * torch.pi / box) * frequencies[:, None] * axis
        modes = (2 * torch.pi / box) * axis[:, None] * axis
        one = torch.ones((), dtype=torch.float64)
        return (torch.polar(one, phase) @ torch.polar(one, modes)) / box

    x, y = (waves(points[..., i].flatten()) for i in (0, 1))
    ky, kx = torch.meshgrid(axis, axis, indexing="ij")
    last = (box - 1) // 2
    shells = ((kx**2 + ky**2).sqrt() + 0.5).long().clamp(max=last).flatten()
    removed = None
    if level is not None:
        removed = fft_centred(level.double(), 2).conj().flatten() / box**2
        constant = x[:, box // 2] * y[:, box // 2] * box**2
    # Modes q and -q of a shell give the same, but for a conjugate and the sign of the order.
    index = torch.arange(box)
    mate = (2 * (box // 2) - index) % box
    mate = (mate[:, None] * box + mate).flatten()
    own = mate == torch.arange(box**2)
    once = torch.arange(box**2) <= mate
    share = (1 - own.double() / 2).sqrt()
    for shell in range(last + 1):
        total = torch.zeros(grid.n_angles, len(grid.radii), len(grid.radii), dtype=torch.complex128)
        for modes in torch.nonzero((shells == shell) & once)[:, 0].split(512):
            values = x[:, modes % box] * y[:, modes // box]
            if removed is not None:
                values = values - constant[:, None] * removed[modes]
            values = values * share[modes]
            by_order = torch.fft.fft(values.view(len(grid.radii), grid.n_angles, -1), dim=1)
            by_order = by_order.transpose(0, 1) / grid.n_angles
            total += by_order @ by_order.mH
        total += total.flip(0).roll(1, 0).conj()
        yield torch.fft.fftshift(total, dim=0)
