"""The law: axes, rotation direction, centring, signs and units.

Every sentence below is pinned by a test against files written by RELION 3.1.3.

* Arrays are indexed ``[z, y, x]``; rotation matrices act on ``(x, y, z)`` column vectors.
* The centre of a box of N samples is sample ``N // 2``, for even and odd N.
* ``A = Rz(-psi) Ry(-tilt) Rz(-rot)``, with right-handed active Rz and Ry, takes reference
  coordinates to image coordinates; angles are in degrees.
* An image is a sum over z: ``P(x, y) = sum_z V(A.T (x, y, z))``; so its transform at
  ``(kx, ky)`` is the map's transform at ``A.T (kx, ky, 0)``.
* Content moves by *minus* the origin: ``I[y, x] = P(x + ox, y + oy)``, with (ox, oy) the
  RELION origin divided by the pixel size.
* The CTF is ``+amplitude_contrast`` at zero frequency: particles are white on black.
* Maps are written with voxel size set, origin 0 and nstart 0.
* Outside a function: angstrom, kV, mm, degrees. Names carry their unit.
* The other hand of a map is its mirror image along x about the centre.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# De Broglie wavelength of an electron with relativistic correction: h / sqrt(2 m e V (1 + ...)),
# in the rounding that RELION uses, so that CTFs agree to the last digit.
WAVELENGTH_NUMERATOR_ANGST = 12.2643247
WAVELENGTH_RELATIVISTIC_PER_V = 0.978466e-6


def electron_wavelength_angst(voltage_kv: Tensor) -> Tensor:
    """Electron wavelength in angstrom.

    Parameters
    ----------
    voltage_kv : Tensor
        Acceleration voltage in kV, any shape.
    """
    volts = voltage_kv * 1e3
    return WAVELENGTH_NUMERATOR_ANGST / torch.sqrt(volts + WAVELENGTH_RELATIVISTIC_PER_V * volts**2)


def _rotation_z(angle_rad: Tensor) -> Tensor:
    c, s = torch.cos(angle_rad), torch.sin(angle_rad)
    zero, one = torch.zeros_like(c), torch.ones_like(c)
    return torch.stack([c, -s, zero, s, c, zero, zero, zero, one], -1).unflatten(-1, (3, 3))


def _rotation_y(angle_rad: Tensor) -> Tensor:
    c, s = torch.cos(angle_rad), torch.sin(angle_rad)
    zero, one = torch.zeros_like(c), torch.ones_like(c)
    return torch.stack([c, zero, s, zero, one, zero, -s, zero, c], -1).unflatten(-1, (3, 3))


def euler_to_matrix(angles_deg: Tensor) -> Tensor:
    """Rotation matrices A of RELION's Euler angles.

    Parameters
    ----------
    angles_deg : Tensor, shape (..., 3)
        (rot, tilt, psi) in degrees: rlnAngleRot, rlnAngleTilt, rlnAnglePsi.

    Returns
    -------
    Tensor, shape (..., 3, 3)
        A, which takes reference coordinates (x, y, z) to image coordinates.
    """
    rot, tilt, psi = torch.deg2rad(angles_deg).unbind(-1)
    return _rotation_z(-psi) @ _rotation_y(-tilt) @ _rotation_z(-rot)


def matrix_to_euler(rotations: Tensor) -> Tensor:
    """RELION's (rot, tilt, psi) in degrees of rotation matrices A; tilt lies in [0, 180].

    Parameters
    ----------
    rotations : Tensor, shape (..., 3, 3)

    Returns
    -------
    Tensor, shape (..., 3)
        At the poles (tilt 0 or 180), where only one combination of rot and psi is defined,
        psi is 0.
    """
    # A's third row is the viewing direction in the reference frame, its third column the
    # reference's z axis seen in the image.
    sin_tilt = torch.hypot(rotations[..., 2, 0], rotations[..., 2, 1])
    tilt = torch.atan2(sin_tilt, rotations[..., 2, 2])
    pole = sin_tilt < 16 * torch.finfo(rotations.dtype).eps
    rot = torch.atan2(rotations[..., 2, 1], rotations[..., 2, 0])
    # Of the matrix without rot: near the poles, where rounding decides rot, their sum stays right.
    cos, sin = rot.cos(), rot.sin()
    along, across = rotations[..., :2, 0], rotations[..., :2, 1]
    psi = torch.atan2(*(cos[..., None] * across - sin[..., None] * along).unbind(-1))
    rot_at_pole = torch.atan2(-rotations[..., 1, 0], rotations[..., 1, 1])
    rot = torch.where(pole, rot_at_pole, rot)
    psi = torch.where(pole, torch.zeros_like(psi), psi)
    return torch.stack([rot, tilt, psi], -1) * (180.0 / math.pi)


def shell_to_angst(shell: float, box: int, pixel_size_angst: float) -> float:
    """Resolution in angstrom of Fourier shell `shell` (cycles per box); infinite at 0."""
    return math.inf if shell == 0 else box * pixel_size_angst / shell


def angst_to_shell(resolution_angst: float, box: int, pixel_size_angst: float) -> float:
    """Fourier radius, in cycles per box, of a resolution in angstrom."""
    return box * pixel_size_angst / resolution_angst
