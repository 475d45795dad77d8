"""Sums for moments in the full form: every pair of Cartesian Fourier pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cryorecon.engines.moments.forms import FullMoments, MomentsGeometry
from cryorecon.engines.moments.sums import (
    MomentBatch,
    contrast_of,
    divided,
    first_sign,
    is_measured,
    shifted,
    standard_error,
)
from cryorecon.errors import CryoreconError
from cryorecon.physics.fourier import half_plane, to_coefficients
from cryorecon.physics.masks import soft_ball

# Five float64 matrices of sums, and as many while they are finished.
_BYTES_A_PAIR = 80
# n = 2 K + 1 points a side of the disc.
_LARGEST_RADIUS = 31


def full_memory(geometry: MomentsGeometry) -> int:
    """Bytes that the full form takes while it is estimated and finished."""
    return len(geometry.plane()) ** 2 * _BYTES_A_PAIR


def check_full(geometry: MomentsGeometry, free_bytes: int) -> None:
    """Refuse more pairs of Fourier pixels than the program or the memory is made for.

    Raises
    ------
    CryoreconError
        With the radius that would do.
    """
    side = 2 * geometry.max_radius + 1
    if geometry.max_radius > _LARGEST_RADIUS:
        raise CryoreconError(
            f"The full form at radius {geometry.max_radius} has {side}^2 x {side}^2 entries",
            f"Give --max-radius {_LARGEST_RADIUS} or less, or use --form steerable",
        )
    needed = full_memory(geometry)
    if needed > free_bytes:
        raise CryoreconError(
            f"The full form at radius {geometry.max_radius} ({side}^2 x {side}^2 entries) takes "
            f"{needed / 1e6:.0f} MB; {free_bytes / 1e6:.0f} MB are free",
            "Give a smaller --max-radius or use --form steerable",
        )


class FullSums:
    """Sums over images in the full form.

    ``arrays`` (float64; h Fourier pixels of half the plane, S shells; ``C y = a + i b``):

    ================ ========== ==================================================
    first            (2, h)     sum a, sum b
    first_square     (h,)       sum a^2 + b^2
    first_weight     (h,)       sum C^2
    aa, bb, ab       (h, h)     sum a a', sum b b', sum a b'
    second_square    (h, h)     sum (a^2 + b^2)(a'^2 + b'^2)
    weight           (h, h)     sum C^2 C'^2
    spread           (h,)       sum C^2 P
    spread_origin    (h,)       sum C(0) C P
    noise_power      (S,)       sum P(s)
    ================ ========== ==================================================
    """

    def __init__(self, geometry: MomentsGeometry, device: torch.device | str = "cpu") -> None:
        self.geometry, self.n_images = geometry, 0
        self._device, self._plane = device, geometry.plane()
        h, n_shells = len(self._plane), half_plane(geometry.box).n_shells
        shapes = {
            "first": (2, h),
            "first_square": (h,),
            "first_weight": (h,),
            "aa": (h, h),
            "bb": (h, h),
            "ab": (h, h),
            "second_square": (h, h),
            "weight": (h, h),
            "spread": (h,),
            "spread_origin": (h,),
            "noise_power": (n_shells,),
        }
        self.arrays: dict[str, Tensor] = {
            name: torch.zeros(shape, dtype=torch.float64, device=device)
            for name, shape in shapes.items()
        }

    @property
    def frequencies(self) -> Tensor:
        """(kx, ky) in cycles per image box where the CTF is wanted, shape (h, 2), float64."""
        return self._plane.frequencies.double()

    def add(self, batch: MomentBatch) -> None:
        """Add images."""
        sums, frequencies = self.arrays, self.frequencies
        plane = self._plane.to(self._device)
        y = to_coefficients(batch.images.to(self._device), plane)
        y = shifted(y, batch.offsets_px, frequencies, self.geometry.box).to(torch.complex128)
        gain = torch.ones_like(y.real)
        if batch.ctf is not None:
            gain = batch.ctf.to(gain)
        y = y * gain
        a, b, squared = y.real.contiguous(), y.imag.contiguous(), gain**2
        power = a**2 + b**2
        sums["first"] += torch.stack([a.sum(0), b.sum(0)])
        sums["first_square"] += power.sum(0)
        sums["first_weight"] += squared.sum(0)
        for name, left, right in (
            ("aa", a, a),
            ("bb", b, b),
            ("ab", a, b),
            ("second_square", power, power),
            ("weight", squared, squared),
        ):
            sums[name].addmm_(left.T, right)
        noise_power = batch.noise_power.to(gain)
        by_pixel = gain * noise_power[:, plane.shell]
        sums["spread"] += (gain * by_pixel).sum(0)
        sums["spread_origin"] += (gain[:, :1] * by_pixel).sum(0)
        sums["noise_power"] += noise_power.sum(0)
        self.n_images += len(batch)

    def finalise(self, progress: Callable[[int, int], None] | None = None) -> FullMoments:
        """Subtract the noise, divide by the weights."""
        del progress  # A second at most.
        sums = {name: array.cpu() for name, array in self.arrays.items()}
        weight, ab = sums["weight"], sums["ab"]
        measured = is_measured(weight)
        second = torch.complex(sums["aa"] + sums["bb"], ab.T - ab)
        error = standard_error(sums["second_square"], second, weight, self.n_images)
        pseudo = torch.complex(sums["aa"] - sums["bb"], ab + ab.T)
        second -= torch.diag(sums["spread"])
        self._clear_origin(second, pseudo, sums)
        first_weight = sums["first_weight"]
        total = torch.complex(*sums["first"])
        first = divided(total, first_weight, is_measured(first_weight))
        first_error = standard_error(sums["first_square"], total, first_weight, self.n_images)
        plane, geometry = self._plane, self.geometry
        # The background was set to 0: the origin tells nothing of the contrast.
        score = contrast_of(
            geometry, plane.radius[1:] / geometry.side_angst, first.real[1:], first_error[1:]
        )
        smallest, largest = weight.min(1).values, weight.max(1).values
        ratio = [
            float(smallest[plane.shell == s].min() / largest[plane.shell == s].max())
            for s in range(plane.n_shells)
        ]
        return FullMoments(
            geometry,
            self.n_images,
            plane.frequencies,
            first * first_sign(geometry, score),
            divided(second, weight, measured),
            divided(pseudo, weight, measured),
            first_error,
            error,
            divided(sums["spread"], weight.diagonal(), measured.diagonal()),
            measured,
            torch.tensor(ratio, dtype=torch.float64),
        )

    def _clear_origin(self, second: Tensor, pseudo: Tensor, sums: dict[str, Tensor]) -> None:
        """Take the rest of the noise out of the origin's row and column, in place.

        The origin is its own Friedel mate; and the mean outside the particle that was subtracted
        from an image is noise that the origin shares with all other pixels.
        """
        pseudo[0, 0] -= sums["spread"][0]
        geometry = self.geometry
        outside = 1 - soft_ball(
            geometry.box, geometry.diameter / 2 * geometry.box, 2.0, 2, torch.float64
        )
        level = outside / outside.sum()
        shared = sums["spread_origin"] * to_coefficients(level, self._plane)
        shared[0] = sums["spread"][0] * (2 - geometry.box**2 * (level**2).sum())
        second[0, :] += shared.conj()
        second[1:, 0] += shared[1:]
        pseudo[0, :] += shared
        pseudo[1:, 0] += shared[1:]
