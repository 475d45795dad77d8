"""The contrast transfer function of the microscope, in RELION's sign and units."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cryorecon.conventions import electron_wavelength_angst


@dataclass(frozen=True)
class CtfParameters:
    """Optics of n images; every field is a float64 tensor of shape (n,).

    Attributes
    ----------
    defocus_u_angst, defocus_v_angst : Tensor
        Underfocus along the two principal axes; positive is underfocus.
    defocus_angle_deg : Tensor
        Angle from the x axis to the first principal axis.
    voltage_kv, spherical_aberration_mm, amplitude_contrast : Tensor
    phase_shift_deg : Tensor
        Phase plate; 0 without one.
    b_factor_angst2 : Tensor
        Envelope ``exp(-B s^2 / 4)``; 0 for none.
    phase_flipped : Tensor
        1 of images whose phases have been flipped where their CTF is negative; else 0.
    """

    defocus_u_angst: Tensor
    defocus_v_angst: Tensor
    defocus_angle_deg: Tensor
    voltage_kv: Tensor
    spherical_aberration_mm: Tensor
    amplitude_contrast: Tensor
    phase_shift_deg: Tensor
    b_factor_angst2: Tensor
    phase_flipped: Tensor

    def __len__(self) -> int:
        return self.defocus_u_angst.shape[0]

    def __getitem__(self, index: Tensor | slice) -> CtfParameters:
        return CtfParameters(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> CtfParameters:
        """The same parameters on another device."""
        return CtfParameters(*self.stacked().to(device))

    def stacked(self) -> Tensor:
        """All fields in order, shape (fields, n)."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])


def ctf(
    frequencies: Tensor, parameters: CtfParameters, box: int, pixel_size_angst: float
) -> Tensor:
    """Contrast transfer function, ``+amplitude_contrast`` at zero frequency.

    ``sin(pi lambda dz s^2 - pi/2 Cs lambda^3 s^4 + asin(Q0) + phase)`` with dz the defocus along
    the direction of s; of phase-flipped images its magnitude, as in RELION. The phase runs to
    hundreds of radians, so it is computed in float64.

    Parameters
    ----------
    frequencies : Tensor, shape (m, 2)
        (kx, ky) in cycles per box.
    parameters : CtfParameters of n images
    box : int
        Samples a side.
    pixel_size_angst : float

    Returns
    -------
    Tensor, shape (n, m), float64
    """
    s = frequencies.double() / (box * pixel_size_angst)
    s2 = (s**2).sum(-1)
    azimuth = torch.atan2(s[:, 1], s[:, 0])

    def column(values: Tensor) -> Tensor:
        return values.double()[:, None]

    u, v = column(parameters.defocus_u_angst), column(parameters.defocus_v_angst)
    axis = torch.deg2rad(column(parameters.defocus_angle_deg))
    # cos(2 (azimuth - axis)), one cosine and one sine for each image and each frequency.
    defocus_angst = (u + v) / 2 + (u - v) / 2 * torch.cos(2 * axis) * torch.cos(2 * azimuth)
    defocus_angst += (u - v) / 2 * torch.sin(2 * axis) * torch.sin(2 * azimuth)
    wavelength = electron_wavelength_angst(column(parameters.voltage_kv))
    cs_angst = column(parameters.spherical_aberration_mm) * 1e7
    phase = torch.pi * wavelength * s2 * (defocus_angst - cs_angst * wavelength**2 * s2 / 2)
    phase = phase + torch.asin(column(parameters.amplitude_contrast))
    phase = phase + torch.deg2rad(column(parameters.phase_shift_deg))
    b_factor = column(parameters.b_factor_angst2)
    found = torch.sin(phase)
    flipped = column(parameters.phase_flipped)
    # Elsewhere than on the CPU asking takes longer than what is not needed.
    asked = found.device.type == "cpu"
    if not asked or bool(flipped.any()):
        found = torch.where(flipped != 0, found.abs(), found)
    if not asked or bool(b_factor.any()):
        found = found * torch.exp(-b_factor * s2 / 4)
    return found
