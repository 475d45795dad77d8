"""cryoDRGN's ``poses.pkl`` and ``ctf.pkl``, in the order of the particle table.

:mod:`cryorecon.io.cryodrgn_input` reads them.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from cryorecon.errors import CryoreconError
from cryorecon.io.cryodrgn_input import pose_columns
from cryorecon.io.files import replacing
from cryorecon.io.particles import SAID_OF_ANGLES, SAID_OF_ORIGINS, Particles
from cryorecon.io.text_table import TextTable


def write_poses(path: str | Path, particles: Particles, rotations: Tensor) -> None:
    """Write ``poses.pkl``: a tuple of rotations (n, 3, 3) and shifts (n, 2), float64.

    Rotations are our A; shifts are RELION origins as fractions of the box side, of the same sign.

    Parameters
    ----------
    rotations : Tensor, shape (n, 3, 3)

    Raises
    ------
    CryoreconError
        If a shift is more than a box: cryoDRGN would take it for pixels.
    """
    side_angst = particles.box * particles.pixel_size_angst
    shifts = particles.origins_angst() / side_angst
    if (np.abs(shifts) > 1).any():
        row = int(np.argmax(np.abs(shifts).max(1) > 1))
        raise CryoreconError(
            f"{particles.path}, row {particles.rows[row] + 1}: the origin is farther than the box "
            f"is wide ({side_angst:g} A)",
            "Remove these particles; cryoDRGN cannot take them",
        )
    with replacing(path) as temporary, temporary.open("wb") as file:
        pickle.dump((rotations.double().numpy().copy(), shifts), file)


def write_ctf(path: str | Path, particles: Particles) -> None:
    """Write ``ctf.pkl``: float32, shape (n, 9).

    Columns: box (px), pixel size (A), defocus U, V (A), their angle (degrees), voltage (kV),
    spherical aberration (mm), amplitude contrast, phase shift (degrees; never NaN). cryoDRGN's
    CTF has the opposite sign of ours; it inverts the images as it reads them.
    """
    optics = particles.ctf_parameters()
    columns = [
        np.full(len(particles), particles.box),
        np.full(len(particles), particles.pixel_size_angst),
        optics.defocus_u_angst.numpy(),
        optics.defocus_v_angst.numpy(),
        optics.defocus_angle_deg.numpy(),
        optics.voltage_kv.numpy(),
        optics.spherical_aberration_mm.numpy(),
        optics.amplitude_contrast.numpy(),
        optics.phase_shift_deg.numpy(),
    ]
    with replacing(path) as temporary, temporary.open("wb") as file:
        pickle.dump(np.stack(columns, 1).astype(np.float32), file)


def with_poses(particles: Particles, path: str | Path) -> Particles:
    """Particles with the poses of a ``poses.pkl``, of the same images in the same order.

    Angles, and origins in the unit of the table's dialect, are replaced or added; what was said of
    the poses before is left out, the other columns stay. A file without shifts sets the origins
    to 0.

    Raises
    ------
    CryoreconError
        As :func:`cryorecon.io.cryodrgn_input.pose_columns`.
    """
    euler_deg, origins_angst = pose_columns(
        path, particles.path, len(particles), particles.box * particles.pixel_size_angst
    )
    unit, scale = particles.origin_unit()
    names = [
        *(f"rlnAngle{a}" for a in ("Rot", "Tilt", "Psi")),
        *(f"rlnOrigin{a}{unit}" for a in "XY"),
    ]
    values = np.concatenate([euler_deg, origins_angst / scale], 1)
    text = {
        name: np.array([f"{value:.6f}" for value in column], dtype=object)
        for name, column in zip(names, values.T, strict=True)
    }
    stale = (SAID_OF_ANGLES | SAID_OF_ORIGINS) - set(text)
    return replace(particles, table=TextTable.gather(particles.table.frames(text, stale)))
