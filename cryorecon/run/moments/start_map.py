"""Is it the moments or the search? A fit of moments from a given map, beside the random starts.

The given map takes no part in the random starts nor in the map that is written as the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cryorecon.engines.moments.fit import Fitter, MomentFit
from cryorecon.engines.moments.forms import MomentsGeometry
from cryorecon.engines.moments.information import expected_fsc, free_map_share, information_bytes
from cryorecon.engines.moments.models import Beads
from cryorecon.engines.moments.starts import fit_from_map, start_steps
from cryorecon.engines.moments.target import Target
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import write_map
from cryorecon.io.star import write_star
from cryorecon.maps.fsc import crossing_shell
from cryorecon.physics.fourier import lowpass
from cryorecon.run.job import Job
from cryorecon.run.moments.maps import aligned, fsc_by_radius, on_images, on_particle_box
from cryorecon.run.moments.trust import AS_GOOD

# Bytes of derivatives beyond which the information is left out.
LARGEST_INFORMATION = 500e6


@dataclass(frozen=True)
class StartMap:
    """A map to start from.

    Attributes
    ----------
    path : Path
        Of the images' box and pixel size; any amplitude.
    blur_angst : float
        Low-passed to this resolution before the start; 0 leaves it sharp.
    """

    path: Path
    blur_angst: float = 0.0


@dataclass(frozen=True)
class NearFit:
    """What became of the start from a map.

    Attributes
    ----------
    name : str
        For the log.
    given : Tensor, shape (N, N, N)
        The sharp map on the images' grid.
    fit : MomentFit
    model, fitted, expected, free : Tensor, shape (K + 1,)
        By radius: FSC of the given map with the volume model laid on the (blurred) map, with the
        fit that began there, what the moments' errors allow near that fit (NaN unless the model is
        Gaussians), and what they would if nothing but the particle's ball were known
        (NaN for the full form).
    """

    name: str
    given: Tensor
    fit: MomentFit
    model: Tensor
    fitted: Tensor
    expected: Tensor
    free: Tensor


def fit_start_map(
    job: Job, fitter: Fitter, start: StartMap, given: Tensor, geometry: MomentsGeometry, seed: int
) -> NearFit:
    """Fit the moments from a map and tell how near to it the fit stays.

    Parameters
    ----------
    given : Tensor, shape (N, N, N)
        The map of `start` on the images' grid.

    Raises
    ------
    CryoreconError
        If the blur leaves nothing of the map or the fit diverges.
    """
    radius = fitter.reach
    inside = on_particle_box(given, geometry, radius)
    blurred, name = _blurred(inside, start, geometry), f"{start.path}"
    name += f" low-passed to {start.blur_angst:g} A" if start.blur_angst > 0 else ""
    generator = torch.Generator().manual_seed(seed)
    with job.bar(f"Start {start.path.name}", start_steps(fitter), "steps") as bar:
        done = 0

        def progress(steps: int) -> None:
            nonlocal done
            done += steps
            bar(done, "")

        try:
            model, fit = fit_from_map(fitter, blurred, generator, progress, like=inside)
        except FloatingPointError as error:
            raise CryoreconError(
                f"The start from {name} diverged: {error}", "Lower --set rate"
            ) from error
    began = fsc_by_radius(on_images(model, geometry, radius), given, geometry, radius)
    found = aligned(on_images(fit.volume, geometry, radius), given, geometry, radius)
    write_map(job.path("from_start_map.mrc"), found.numpy(), geometry.pixel_size_angst)
    few = information_bytes(fitter, fit) <= LARGEST_INFORMATION
    known = few and isinstance(fit.volume, Beads)
    expected = expected_fsc(fitter, fit) if known else torch.full_like(began, torch.nan)
    counted = few and isinstance(fitter.targets[-1], Target)
    free = free_map_share(fitter, fit) if counted else torch.full_like(began, torch.nan)
    fitted = fsc_by_radius(found, given, geometry, radius)
    near = NearFit(name, given, fit, began, fitted, expected, free)
    job.say(
        f"START MAP {name}: laid on it, {fitter.config.volume} reach {_reach(began, geometry)}; "
        f"fitted from there, misfit {fit.misfit:.3g}, {_reach(near.fitted, geometry)} (FSC 0.5)"
    )
    if known:
        job.say(f"near it the moments determine the Gaussians to {_reach(expected, geometry)}")
    if counted:
        job.say(f"of a map free in the particle's ball, to {_reach(free, geometry)}")
    return near


def compare_with_starts(
    job: Job, near: NearFit, misfits: list[float], maps: list[Tensor], geometry: MomentsGeometry
) -> None:
    """Tell whether moments or search hold the random starts back; write ``shells.star``.

    Parameters
    ----------
    misfits : list of float
        Of the random starts, the best first; empty if there were none.
    maps : list of Tensor, shape (N, N, N)
        Theirs, turned onto the best.
    """
    radius = len(near.fitted) - 1
    random = spread = None
    if maps:
        best = aligned(maps[0], near.given, geometry, radius)
        random = fsc_by_radius(best, near.given, geometry, radius)
        limit = AS_GOOD * misfits[0]
        others = [m for m, misfit in zip(maps, misfits, strict=True) if misfit <= limit][1:]
        curves = [fsc_by_radius(other, maps[0], geometry, radius) for other in others]
        spread = torch.stack(curves).amin(0) if curves else None
        job.say(_verdict(near, misfits[0], random, geometry))
    _write_shells(job.path("shells.star"), near, random, spread, geometry)


def _blurred(inside: Tensor, start: StartMap, geometry: MomentsGeometry) -> Tensor:
    if start.blur_angst <= 0:
        return inside
    band = geometry.side_angst / start.blur_angst
    if band < 1:
        raise CryoreconError(
            f"--start-blur {start.blur_angst:g} leaves nothing of {start.path}",
            f"Give less than {geometry.side_angst:.0f} A",
        )
    return lowpass(inside, min(band, (len(inside) - 1) / 2), 3, 1.0)


def _reach(curve: Tensor, geometry: MomentsGeometry) -> str:
    shell = crossing_shell(curve, 0.5)
    return f"{geometry.side_angst / shell:.1f} A" if shell > 0 else "no radius"


def _verdict(near: NearFit, misfit: float, random: Tensor, geometry: MomentsGeometry) -> str:
    """One sentence on moments and search."""
    both = f"misfit {misfit:.3g} against {near.fit.misfit:.3g}"
    reached, goal = crossing_shell(random, 0.5), crossing_shell(near.fitted, 0.5)
    if reached >= goal - 0.5:
        return f"random starts come as near to the start map as the fit from it ({both})"
    where = f"{_reach(random, geometry)}, not {_reach(near.fitted, geometry)}"
    if misfit <= AS_GOOD * near.fit.misfit:
        return (
            f"MOMENTS: the best random start fits as well ({both}) and agrees with the start map "
            f"to {where}: the moments do not tell the two apart"
        )
    return (
        f"SEARCH: the start from the map fits better than every random one ({both}), which agree "
        f"with it to {where}: raise --starts and --set settling"
    )


def _write_shells(
    path: Path,
    near: NearFit,
    random: Tensor | None,
    spread: Tensor | None,
    geometry: MomentsGeometry,
) -> None:
    radii = np.arange(1, len(near.fitted))
    columns: dict[str, Tensor | None] = {
        "cryoreconFscModelOnMap": near.model,
        "cryoreconFscFitFromMap": near.fitted,
        "cryoreconFscRandomWithMap": random,
        "cryoreconFscRandomSpread": spread,
        "cryoreconExpectedFsc": near.expected,
        "cryoreconFreeMapShare": near.free,
    }
    table = pd.DataFrame(
        {"cryoreconRadius": radii, "rlnAngstromResolution": geometry.side_angst / radii}
        | {k: v[1:].numpy() for k, v in columns.items() if v is not None and v.isfinite().all()}
    )
    write_star(path, {"shells": table})
