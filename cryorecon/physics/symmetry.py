"""Point groups of rotations, set up as RELION sets them up."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from cryorecon.physics.rotations import exp_map, geodesic_distance_deg

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
# Rotation vectors that take I to RELION's other settings of it: I1, a quarter of a turn about z;
# I3 and I4, a fivefold on z.
_FIVEFOLD_RAD = math.atan(1 / _GOLDEN)
_SETTINGS = {
    "I1": (0.0, 0.0, math.pi / 2),
    "I2": (0.0, 0.0, 0.0),
    "I3": (0.0, -_FIVEFOLD_RAD, 0.0),
    "I4": (0.0, _FIVEFOLD_RAD, 0.0),
}
_LARGEST = 120
# Traces of rotations that differ by less are of one that lies between two classes.
_SAME_TRACE = 1e-5
# Turns this near each other are one, turns that are asked at most; how near one is to a fold's.
_ONE_TURN_DEG, _TURNS_ASKED, _NEARLY_DEG = 10.0, 200, 5.0


def symmetry_group(name: str) -> Tensor:
    """All rotations of a point group.

    Parameters
    ----------
    name : str
        C1, Cn, Dn, T, O, I or I1 to I4, in any case. Cn and Dn have their n-fold axis on z, Dn a
        twofold axis on x; T, O and the settings of I as RELION 3.1 has them; I is I2.

    Returns
    -------
    Tensor, shape (g, 3, 3), float64
        The identity first.

    Raises
    ------
    ValueError
        For another name, or an order above 60.
    """
    setting = _SETTINGS.get(name.strip().upper())
    if setting is not None:
        turn = exp_map(torch.tensor(setting, dtype=torch.float64))
        group = turn @ symmetry_group("I") @ turn.mT
        group[0] = torch.eye(3)
        return group
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


def distinct_rotations(rotations: Tensor, group: Tensor) -> Tensor:
    """Of poses that a symmetric map cannot tell apart, the one nearest to no rotation.

    Parameters
    ----------
    rotations : Tensor, shape (n, 3, 3)
        A; a map with the group looks the same at all A g.
    group : Tensor, shape (g, 3, 3)

    Returns
    -------
    Tensor, shape (about n / g, 3, 3)
        In order.
    """
    if len(group) == 1:
        return rotations
    traces = _traces(rotations, group)
    own = torch.diagonal(rotations, dim1=-2, dim2=-1).sum(-1)
    return rotations[own >= traces.amax(-1) - _SAME_TRACE]


def nearest_copies(rotations: Tensor, to: Tensor, group: Tensor) -> Tensor:
    """Of all poses A g, equal to A in a symmetric map, the one nearest to another pose.

    Parameters
    ----------
    rotations, to : Tensor, shape (..., 3, 3)
        Shapes broadcast.
    group : Tensor, shape (g, 3, 3)

    Returns
    -------
    Tensor, shape (..., 3, 3)
    """
    if len(group) == 1:
        return rotations
    group = group.to(rotations)
    return rotations @ group[_traces(to.mT @ rotations, group).argmax(-1)]


def distance_under_deg(first: Tensor, second: Tensor, group: Tensor) -> Tensor:
    """Angle in degrees from one pose to the nearest of those equal to another; shapes broadcast."""
    return geodesic_distance_deg(nearest_copies(first, second, group), second)


def commonest_turn(turns: Tensor) -> tuple[float, float]:
    """The turn that most of several lie near, or its inverse; those near none do not count.

    Poses of copies in a symmetric particle are a turn apart that is the same for all images.

    Parameters
    ----------
    turns : Tensor, shape (n, 3, 3)

    Returns
    -------
    share : float
        Of all, 0 where there is none.
    angle_deg : float
    """
    one = torch.eye(3, dtype=turns.dtype, device=turns.device)
    far = turns[geodesic_distance_deg(turns, one) > 2 * _ONE_TURN_DEG]
    share, angle = 0.0, 0.0
    for turn in far[:: max(1, len(far) // _TURNS_ASKED)]:
        # A turn and its inverse lead from one copy to the other and back.
        apart = torch.minimum(*(geodesic_distance_deg(turns, t) for t in (turn, turn.mT)))
        found = float((apart < _ONE_TURN_DEG).double().mean())
        if found > share:
            share, angle = found, float(geodesic_distance_deg(turn, one))
    return share, angle


def fold_of(angle_deg: float) -> int | None:
    """Fold of an axis that turns by about an angle, where it divides the circle."""
    fold = round(360 / angle_deg)
    return fold if abs(360 / fold - angle_deg) < _NEARLY_DEG else None


def _traces(rotations: Tensor, group: Tensor) -> Tensor:
    """Of all A g, shape (..., g): the larger, the nearer to no rotation."""
    return rotations.flatten(-2) @ group.to(rotations).mT.flatten(-2).T


def _axes(name: str) -> tuple[tuple[int, tuple[float, float, float]], ...]:
    upper = name.strip().upper()
    polyhedral = {"T": _TETRAHEDRAL, "O": _OCTAHEDRAL, "I": _ICOSAHEDRAL}
    if upper in polyhedral:
        return polyhedral[upper]
    match = re.fullmatch(r"([CD])([1-9]\d?)", upper)
    if match is None or int(match[2]) * (1 + (match[1] == "D")) > _LARGEST // 2:
        raise ValueError(f"{name!r} is no symmetry: give C1, Cn, Dn, T, O, I or I1 to I4")
    main = (int(match[2]), (0.0, 0.0, 1.0))
    return (main,) if match[1] == "C" else (main, (2, (1.0, 0.0, 0.0)))


def _about(axis: tuple[float, float, float], angle_deg: float) -> Tensor:
    vector = torch.tensor(axis, dtype=torch.float64)
    return exp_map(torch.deg2rad(torch.tensor(angle_deg, dtype=torch.float64)) * vector)
