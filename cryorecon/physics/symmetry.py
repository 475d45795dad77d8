"""Point groups of rotations, set up as RELION sets them up."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from cryorecon.physics.rotations import exp_map

# Axes (fold, direction) that generate each polyhedral group. T: threefold on z; O: fourfold on z;
# I: twofold on z, the fivefold nearest to it in the xz plane (RELION's I, its I2).
_TETRAHEDRAL = ((3, (0.0, 0.0, 1.0)), (2, (0.0, (2 / 3) ** 0.5, (1 / 3) ** 0.5)))
_OCTAHEDRAL = ((3, (3**-0.5, 3**-0.5, 3**-0.5)), (4, (0.0, 0.0, 1.0)))
_GOLDEN = (1 + 5**0.5) / 2
_ICOSAHEDRAL = (
    (2, (0.0, 0.0, 1.0)),
    (5, (1 / (1 + _GOLDEN**2) ** 0.5, 0.0, _GOLDEN / (1 + _GOLDEN**2) ** 0.5)),
    (3, (0.0, 1 / (_GOLDEN * 3**0.5), _GOLDEN / 3**0.5)),
)
_LARGEST = 120


def symmetry_group(name: str) -> Tensor:
    """All rotations of a point group.

    Parameters
    ----------
    name : str
        C1, Cn, Dn, T, O or I, in any case. Cn and Dn have their n-fold axis on z, Dn a twofold
        axis on x; T, O and I as RELION 3.1 has them.

    Returns
    -------
    Tensor, shape (g, 3, 3), float64
        The identity first.

    Raises
    ------
    ValueError
        For another name, or an order above 60.
    """
    generators = [_about(axis, 360.0 / fold) for fold, axis in _axes(name)]
    found = [torch.eye(3, dtype=torch.float64)]
    waiting = list(found)
    while waiting:
        last = waiting.pop()
        for generator in generators:
            new = generator @ last
            if not any(torch.allclose(new, old, atol=1e-6) for old in found):
                found.append(new)
                waiting.append(new)
        if len(found) > _LARGEST:
            raise ValueError(f"symmetry {name} does not close")
    return torch.stack(found)


def _axes(name: str) -> tuple[tuple[int, tuple[float, float, float]], ...]:
    upper = name.strip().upper()
    polyhedral = {"T": _TETRAHEDRAL, "O": _OCTAHEDRAL, "I": _ICOSAHEDRAL}
    if upper in polyhedral:
        return polyhedral[upper]
    match = re.fullmatch(r"([CD])([1-9]\d?)", upper)
    if match is None or int(match[2]) * (1 + (match[1] == "D")) > _LARGEST // 2:
        raise ValueError(f"{name!r} is no symmetry: give C1, Cn, Dn, T, O or I")
    main = (int(match[2]), (0.0, 0.0, 1.0))
    return (main,) if match[1] == "C" else (main, (2, (1.0, 0.0, 0.0)))


def _about(axis: tuple[float, float, float], angle_deg: float) -> Tensor:
    vector = torch.tensor(axis, dtype=torch.float64)
    return exp_map(torch.deg2rad(torch.tensor(angle_deg, dtype=torch.float64)) * vector)
