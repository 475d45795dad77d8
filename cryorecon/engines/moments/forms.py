"""First and second moments of particle images: what they are, and those of a known map.

The moments of Fourier images (Khoo, Paul and Sharon 2024, eq. 14) in two forms:

* *steerable*: in-plane rotations are uniform, so that the first moment depends on the radius
  alone and the second is block-diagonal in the angular order m. With the harmonics s_m(k) of
  :mod:`cryorecon.physics.polar`, ``M1(k) = E s_0(k)`` and ``M2_m(k, k') = E s_m(k) s_m(k')*``.
  ``M2_{-m} = conj M2_m``.
* *full*: the paper's, over Cartesian Fourier pixels, without that assumption.

Images are taken as they are after normalisation: unnormalised transforms, so that white noise of
standard deviation 1 has the power N^2 in every coefficient.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from cryorecon.engines.contrast import Contrast
from cryorecon.physics.fourier import HalfPlane, half_plane
from cryorecon.physics.gridding import Kernel
from cryorecon.physics.polar import PolarGrid, PolarSlices, angles_needed
from cryorecon.physics.sphere import frames

# The particle's box is this many diameters wide, or as wide as the image if that is less.
BOX_OVER_DIAMETER = 1.25

Form = Literal["steerable", "full"]


@dataclass(frozen=True)
class MomentsGeometry:
    """Which moments, of which images; moments of equal geometry can be merged.

    Attributes
    ----------
    form : "steerable" or "full"
    box : int
        Samples a side of the images.
    pixel_size_angst : float
    diameter_angst : float
        Of the particle: noise is measured outside it.
    side_angst : float
        Side L of the box that radii refer to: k cycles per L are ``k / L`` in 1/angstrom. The
        particle's box in the steerable form (a map of this side has whole radii), the image's in
        the full form.
    max_radius : int
        K: radii 1 to K in the steerable form, all Fourier pixels up to K in the full one.
    max_order : int
        M: angular orders 0 to M; 0 in the full form.
    normalised : bool
        Images were given mean 0 and standard deviation 1 outside the particle.
    noise_std : float
        Of white noise, where it was given; 0 with `normalised` true means that spectra were
        measured.
    ctf : bool
        Whether the CTF was divided out, as weighted least squares.
    contrast : "auto", "white" or "black"
        How the sign of the first moment is settled.
    third_radius : int
        R: third moments are those of radii 1 to R; 0 for none.
    """

    form: Form
    box: int
    pixel_size_angst: float
    diameter_angst: float
    side_angst: float
    max_radius: int
    max_order: int
    normalised: bool = True
    noise_std: float = 0.0
    ctf: bool = True
    contrast: Contrast = "auto"
    third_radius: int = 0

    @property
    def third_order(self) -> int:
        """Largest angular order of the third moments."""
        return min(self.order_at(self.third_radius), self.max_order)

    @property
    def image_side_angst(self) -> float:
        """Side of the images."""
        return self.box * self.pixel_size_angst

    @property
    def diameter(self) -> float:
        """Of the particle, as a fraction of the image."""
        return self.diameter_angst / self.image_side_angst

    @property
    def radii_per_angst(self) -> Tensor:
        """Spatial frequencies of the radii 1 to K, shape (K,), float64."""
        return torch.arange(1, self.max_radius + 1).double() / self.side_angst

    def image_grid(self) -> PolarGrid:
        """The circles in cycles per image box."""
        radii = self.radii_per_angst * self.image_side_angst
        return PolarGrid(radii, angles_needed(float(radii[-1]), self.max_order), self.max_order)

    def map_grid(self, map_side_angst: float | None = None) -> PolarGrid:
        """The circles in cycles per box of a map, of side L unless told otherwise.

        With as few angles as a map inside that box needs.
        """
        radii = self.radii_per_angst * (map_side_angst or self.side_angst)
        reach = torch.pi * float(radii[-1]) + 10
        return PolarGrid(radii, 2 * -(-int(self.max_order + reach) // 2), self.max_order)

    def plane(self) -> HalfPlane:
        """Fourier pixels of the full form, in cycles per image box."""
        return half_plane(self.box, self.max_radius)

    def order_at(self, radius: int) -> int:
        """Largest angular order that a particle of this diameter has at a radius."""
        return int(math.pi * radius * self.diameter_angst / self.side_angst) + 2

    def in_particle_box(self) -> MomentsGeometry:
        """The same with radii in cycles per particle box, as the steerable form has them."""
        if self.form == "steerable":
            return self
        side = min(BOX_OVER_DIAMETER * self.diameter_angst, self.image_side_angst)
        radius = int(self.max_radius * side / self.image_side_angst + 1e-9)
        inside = replace(self, side_angst=side, max_radius=radius)
        return replace(inside, max_order=inside.order_at(radius))

    def attributes(self) -> dict[str, str | int | float | bool]:
        """The fields, for a file."""
        return asdict(self)

    @staticmethod
    def from_attributes(values: dict[str, str | int | float | bool]) -> MomentsGeometry:
        """From what :meth:`attributes` gave; other entries are ignored.

        Files without third moments need not say so.
        """
        given = {"third_radius": 0} | values
        return MomentsGeometry(**{f.name: given[f.name] for f in fields(MomentsGeometry)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class SteerableMoments:
    """Debiased, CTF-corrected moments in the steerable form.

    Attributes
    ----------
    geometry : MomentsGeometry
    n_images : int
        0 for exact moments of a known map.
    first : Tensor, shape (K,), float64
        M1, particles white.
    second : Tensor, shape (M + 1, K, K), complex128
        M2_m, Hermitian in the last two axes; 0 where not measured.
    first_error : Tensor, shape (K,), float64
        Standard error of each entry, from the sample's variance.
    second_error : Tensor, shape (M + 1, K, K), float64
        Root mean square modulus of each entry's error; infinite where not measured.
    noise : Tensor, shape (M + 1, K, K), complex128
        What was subtracted for the noise.
    measured : Tensor, shape (K, K), bool
        False where no image has CTF at both radii.
    conditioning : Tensor, shape (K,), float64
        Smallest over largest weight ``sum CTF^2 CTF'^2`` in each row.
    third : Tensor, shape (pairs, R, R, R), complex128, optional
        M3 as :mod:`cryorecon.engines.moments.third` says.
    third_error : Tensor, shape (pairs, R, R, R), float64, optional
        Root mean square modulus of each entry's error.
    """

    geometry: MomentsGeometry
    n_images: int
    first: Tensor
    second: Tensor
    first_error: Tensor
    second_error: Tensor
    noise: Tensor
    measured: Tensor
    conditioning: Tensor
    third: Tensor | None = None
    third_error: Tensor | None = None


@dataclass(frozen=True)
class FullMoments:
    """Debiased, CTF-corrected moments over Cartesian Fourier pixels.

    Only one of each Friedel pair is a row: h pixels stand for ``n^2``, n = 2 K + 1, without the
    corners. ``E Y(q) Y(-q')* = E Y(q) Y(q')`` gives the columns of the other half.

    Attributes
    ----------
    geometry : MomentsGeometry
    n_images : int
        0 for exact moments of a known map.
    frequencies : Tensor, shape (h, 2), int64
        (kx, ky) in cycles per image box, sorted by radius; the first is the origin.
    first : Tensor, shape (h,), complex128
    second : Tensor, shape (h, h), complex128
        ``E Y(q) Y(q')*``, Hermitian.
    pseudo : Tensor, shape (h, h), complex128
        ``E Y(q) Y(q')``, symmetric.
    first_error : Tensor, shape (h,), float64
    second_error : Tensor, shape (h, h), float64
        Root mean square modulus of the error, of `second` and of `pseudo` alike.
    noise : Tensor, shape (h,), float64
        What was subtracted on the diagonal.
    measured : Tensor, shape (h, h), bool
    conditioning : Tensor, shape (n_shells,), float64
        Smallest over largest weight among the rows of each shell.
    """

    geometry: MomentsGeometry
    n_images: int
    frequencies: Tensor
    first: Tensor
    second: Tensor
    pseudo: Tensor
    first_error: Tensor
    second_error: Tensor
    noise: Tensor
    measured: Tensor
    conditioning: Tensor

    def whole_plane(self) -> tuple[Tensor, Tensor, Tensor]:
        """Both members of each Friedel pair.

        Returns
        -------
        frequencies : Tensor, shape (2 h - 1, 2)
        first : Tensor, shape (2 h - 1,)
        second : Tensor, shape (2 h - 1, 2 h - 1)
            The paper's matrix over the disc of radius K.
        """
        mate = self.pseudo[:, 1:]
        top = torch.cat([self.second, mate], 1)
        bottom = torch.cat([mate.conj().T, self.second[1:, 1:].conj()], 1)
        return (
            torch.cat([self.frequencies, -self.frequencies[1:]]),
            torch.cat([self.first, self.first[1:].conj()]),
            torch.cat([top, bottom]),
        )


Moments = SteerableMoments | FullMoments


def steerable_moments(
    harmonics: Tensor, weights: Tensor, antipode_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Moments of views with given harmonics and probabilities; differentiable in both.

    Parameters
    ----------
    harmonics : Tensor, shape (q, K, M + 1), complex
        Of central slices, :meth:`cryorecon.physics.polar.PolarSlices.harmonics`.
    weights : Tensor, shape (q,), real
        Probability of each viewing direction: density times quadrature weight.
    antipode_weights : Tensor, shape (q,), real, optional
        Probability of the opposite directions, whose slices are mirrored: ``s_m(-w) = s_{-m}(w)``
        up to an in-plane rotation, which takes part in no moment. With it, half a sphere of
        directions is enough.

    Returns
    -------
    first : Tensor, shape (K,), real
    second : Tensor, shape (M + 1, K, K), complex
    """
    s = harmonics.permute(2, 1, 0)
    even = weights if antipode_weights is None else weights + antipode_weights
    first = s[0].real @ even
    a, b = s.real, s.imag
    both = (a * even) @ a.mT + (b * even) @ b.mT
    odd = weights if antipode_weights is None else weights - antipode_weights
    cross = (b * odd) @ a.mT
    return first, torch.complex(both, cross - cross.mT)


def exact_moments(
    volume: Tensor,
    directions: Tensor,
    weights: Tensor,
    grid: PolarGrid,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """Steerable moments of a known map under a view density, by quadrature.

    Differentiable in the map and in the weights. Slices are exact to 1e-5 (Kaiser-Bessel, six
    neighbours a side); the rest of the error is the quadrature's.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N), real
        Voxel sums: the moments do not depend on the voxels' size.
    directions : Tensor, shape (q, 3)
        Viewing directions, unit vectors in the map's frame.
    weights : Tensor, shape (q,), real
        Probability of each, summing to 1.
    grid : PolarGrid
        Radii in cycles per the map's box.

    Returns
    -------
    first : Tensor, shape (K,), real
    second : Tensor, shape (M + 1, K, K), complex
    """
    slices = PolarSlices(
        volume.shape[-1],
        grid,
        frames(directions),
        volume.dtype,
        volume.device,
        kernel,
        gradients=volume.requires_grad,
    )
    return steerable_moments(slices.harmonics(volume), weights.to(volume))
