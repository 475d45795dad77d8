"""How far a map from moments can be trusted: as far as the starts that fit as well agree."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cryorecon.engines.moments.fit import MomentFit
from cryorecon.engines.moments.forms import MomentsGeometry
from cryorecon.maps.fsc import crossing_shell, fsc_curve
from cryorecon.run.moments.maps import aligned

# Starts whose misfit is within this factor of the best one's fit the moments as well.
AS_GOOD = 2.0
# Moments are explained up to this misfit; 1 is expected of standard errors.
_EXPLAINED = 2.0
# Below this radius, in cycles per particle box, starts agree on an outline only; and two of them
# that agree in part may both be wrong there.
_LEAST_TRUSTED, _LEAST_OTHERS = 3.0, 2


@dataclass(frozen=True)
class Trust:
    """What may be said of the best start's map.

    Attributes
    ----------
    radius : float
        To which the map can be trusted, in cycles per particle box; 0 if it cannot.
    said : str
        Why not as far as the moments were fitted; empty if so far.
    label : str
        The same in a few words, of a map that cannot be trusted.
    """

    radius: float
    said: str
    label: str = ""

    @staticmethod
    def of(
        best: MomentFit, agreement: list[float | None], geometry: MomentsGeometry, radius: int
    ) -> Trust:
        """By the misfit of the best start and the agreement of the others with it.

        Parameters
        ----------
        agreement : list of float or None
            From :func:`agreement_with_best`.
        radius : int
            Largest radius fitted, in cycles per particle box.
        """
        worst = max(best.misfit, best.lower)
        if worst > _EXPLAINED:
            said = f"No start explains the moments: misfit {worst:.3g}, 1 within their errors"
            return Trust(0.0, said, "no start explains the moments")
        known = [agreed for agreed in agreement[1:] if agreed is not None]
        if not known:
            said = "No second start fits the moments as well as the best: it cannot be checked"
            return Trust(0.0, said, "no second start fits as well")
        least = min(known)
        if least >= radius:
            return Trust(float(radius), "")
        reach = f"{geometry.side_angst / least:.0f} A" if least > 0 else "no resolution"
        fitted = f"starts that fit them equally well agree to {reach}, not to the "
        fitted += f"{geometry.side_angst / radius:.0f} A that were fitted"
        if least < _LEAST_TRUSTED or len(known) < _LEAST_OTHERS:
            said = f"The moments do not determine the map: {fitted}"
            return Trust(0.0, said, "starts disagree")
        return Trust(least, f"The moments determine the map in part: {fitted}")


def agreement_with_best(
    fits: list[MomentFit], maps: list[Tensor], geometry: MomentsGeometry, radius: int
) -> list[float | None]:
    """Radius to which each start agrees with the best (FSC 0.5); None where it fits worse.

    The maps are turned onto the best one, so that they can be looked at together.

    Parameters
    ----------
    fits : list of MomentFit
        The best first.
    maps : list of Tensor, shape (N, N, N)
        Theirs, on the images' grid.
    radius : int
        Largest radius fitted, in cycles per particle box.
    """
    found: list[float | None] = [float(radius)]
    per_shell = geometry.side_angst / geometry.image_side_angst
    for number in range(1, len(fits)):
        maps[number] = aligned(maps[number], maps[0], geometry, radius)
        if fits[number].misfit > AS_GOOD * fits[0].misfit:
            found.append(None)
            continue
        shell = crossing_shell(fsc_curve(maps[number], maps[0]), 0.5) * per_shell
        found.append(min(shell, float(radius)))
    return found
