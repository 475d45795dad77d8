"""Shells that images show nothing in: they were low-passed, or rescaled from larger pixels.

What little power is left there is no noise to judge by: coefficients that show nothing would
outweigh all others. The transfer function is 0 there in place of the CTF.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryorecon.conventions import shell_to_angst
from cryorecon.engines.observations import ImageSet
from cryorecon.physics.fourier import HalfPlane, to_coefficients
from cryorecon.physics.imaging import shell_means

# A shell is empty with less than this share of the power that a quarter of its group's shells
# have at least. Detectors leave more than a hundredth, even of film.
_EMPTY, _ORDINARY = 5e-3, 0.75
# Images of each block and group that are asked.
_ASKED = 16


def shell_power(images: Tensor, plane: HalfPlane) -> Tensor:
    """Power by shell of some of the images (b, N, N), in no units; shape (n_shells,)."""
    few = to_coefficients(images[:_ASKED], plane)
    return shell_means(few.abs().square().sum(0), plane)


def empty_shells(power: Tensor) -> Tensor | None:
    """Which shells are empty, shape (groups, n_shells), bool; None if none is.

    Parameters
    ----------
    power : Tensor, shape (groups, n_shells)
        Each group's in units of its own.
    """
    ordinary = power[:, 1:].quantile(_ORDINARY, dim=1, keepdim=True)
    empty = power < _EMPTY * ordinary
    empty[:, 0] = False  # The level, which has been taken out.
    return empty if bool(empty.any()) else None


def empty_text(images: ImageSet, pixel_size_angst: float) -> list[str]:
    """What the log says of empty shells, a line for each kind of optics groups."""
    if images.empty is None:
        return []
    lines, box = [], images.plane.box
    kinds, which = images.empty.cpu().unique(dim=0, return_inverse=True)
    for number, kind in enumerate(kinds):
        shells = torch.nonzero(kind)[:, 0].tolist()
        if not shells:
            continue
        groups = torch.nonzero(which == number)[:, 0]
        n = int(torch.isin(images.group.long(), groups).sum())
        last = shells[0] - 1
        if last > 0 and shells == list(range(shells[0], len(kind))):
            where = f"beyond {shell_to_angst(last, box, pixel_size_angst):.1f} A"
        else:
            found = (f"{shell_to_angst(shell, box, pixel_size_angst):.1f}" for shell in shells)
            where = f"at {', '.join(found)} A"
        lines.append(f"{n} of {len(images)} images show nothing {where}: left out")
    return lines
