"""What a report warns of: each known face of failure, judged by one number and a threshold.

``docs/report.md`` has the table of good maps and made-up failures that the thresholds stand on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryorecon.engines.reconstruction import MANY_AT_LIMIT, RefineConfig
from cryorecon.engines.rivals import MOST_IN_DOUBT, SURE
from cryorecon.maps.failures import (
    at_limit,
    hollowness,
    mass_at_rim,
    view_spread,
    whiteness,
)
from cryorecon.maps.fsc import crossing_shell
from cryorecon.maps.mirror import mirror_score
from cryorecon.physics.fourier import crop_or_pad_centred
from cryorecon.physics.resampling import resample_volume
from cryorecon.run.report.inputs import ReportInputs

LEAST_HOLLOWNESS = 0.5
LEAST_WHITENESS = 0.5
MOST_MASS_AT_RIM = 0.2
MOST_MIRROR = 0.65
LEAST_VIEW_SPREAD = 0.15
MOST_EMPTY = 0.02
LEAST_CYCLES = 3.0
# How the log's warning begins that a check repeats.
AT_LIMIT = "many particles lie at the limit"
# How much of its box a particle fills where shapes are judged.
_FILLS = 0.85
# The mirror score sees detail up to 8 cycles per box: a grid of this side holds it all.
_MIRROR_BOX = 24
_LOGGED = re.compile(r" *[0-9.]+ s  ((?:WARNING|AMBIGUOUS): .*)")


@dataclass(frozen=True)
class Finding:
    """One check: what was measured, and what to do where it fires.

    Attributes
    ----------
    name : str
        The face of failure.
    score, threshold : float
    side : str
        "below" or "above": where scores fire.
    meaning : str
        What the score is, in a few words.
    problem, remedy : str
        Said when it fires.
    """

    name: str
    score: float
    threshold: float
    side: str
    meaning: str
    problem: str
    remedy: str

    @property
    def fires(self) -> bool:
        """Whether the user should be warned."""
        if self.side == "below":
            return self.score < self.threshold
        return self.score > self.threshold


def hollow_shell(volume: Tensor) -> Finding:
    """A map that is dark inside; see :func:`cryorecon.maps.failures.hollowness`."""
    return Finding(
        "Hollow shell",
        hollowness(volume),
        LEAST_HOLLOWNESS,
        "below",
        "density in the middle over density at the radius of gyration",
        "The map is hollow: its middle is darker than its rim.",
        "Capsids, ferritin and rings are. If this particle is not, check --contrast, the CTF "
        "columns, the pixel size and --diameter, and run again with another --seed.",
    )


def negative_blob(volume: Tensor) -> Finding:
    """A map that is black on white; see :func:`cryorecon.maps.failures.whiteness`."""
    return Finding(
        "Negative blob",
        whiteness(volume),
        LEAST_WHITENESS,
        "below",
        "skewness of the density about the solvent's level",
        "No white molecule stands out of the map: the strongest density is negative, or all of "
        "it is noise.",
        "Run again with --contrast auto or the other --contrast; if the map is noise, check CTF, "
        "pixel size and --diameter, or give more particles.",
    )


def mass_at_edge(volume: Tensor, radius: float) -> Finding:
    """A molecule that is cut off; see :func:`cryorecon.maps.failures.mass_at_rim`."""
    return Finding(
        "Mass at the edge",
        mass_at_rim(volume, radius),
        MOST_MASS_AT_RIM,
        "above",
        "share of the density in the outermost tenth of the particle's sphere",
        "Much of the density lies at the edge of the particle's sphere, where the map is cut off.",
        "Give a larger --diameter; if it fills the box already, extract the particles anew in a "
        "larger box. Particles far off centre, or neighbours in the images, look the same.",
    )


def mirror_plane(volume: Tensor) -> Finding:
    """A map stuck between its hands; see :func:`cryorecon.maps.mirror.mirror_score`."""
    small = resample_volume(volume, min(_MIRROR_BOX, len(volume))).double()
    return Finding(
        "Mirror plane",
        mirror_score(small),
        MOST_MIRROR,
        "above",
        "correlation with the best reflection of the map, shells whitened",
        "The map is nearly its own mirror image, which no protein is beyond low resolution: the "
        "reconstruction may be stuck between its two hands.",
        "Run again with another --seed, more --starts or more --heads. Of a map that shows no "
        "more than an outline, or of a round particle, this means nothing.",
    )


def collapsed_views(views: Tensor, weights: Tensor | None = None) -> Finding:
    """Images that crowd together; see :func:`cryorecon.maps.failures.view_spread`."""
    return Finding(
        "Collapsed views",
        view_spread(views, weights),
        LEAST_VIEW_SPREAD,
        "below",
        "share of the sphere that the viewing directions fill",
        "The viewing directions crowd together: directions that no image was taken along are "
        "smeared in the map.",
        "Either the poses collapsed: run again with another --seed or more --starts; or the "
        "particles lie in preferred orientations: look for other views in the class averages, "
        "select or tilt for them.",
    )


def farthest_searched(limit_angst: float, side_angst: float) -> bool:
    """Whether offsets were searched as far as new searches ever go by themselves."""
    return limit_angst >= 0.999 * RefineConfig.farthest_offset * side_angst


def offsets_at_limit(
    lengths_angst: Tensor, limit_angst: float, step_angst: float, side_angst: float
) -> Finding:
    """Particles that were found as far off centre as was searched, in a box of some width."""
    remedy = "Give a larger --offset-range, or centre the particles and extract them anew."
    if farthest_searched(limit_angst, side_angst):
        remedy = (
            "Searches went as far as is of use, a quarter of the box or more: such images are "
            "probably junk or neighbours, to be taken out, or need extraction anew, centred."
        )
    return Finding(
        "Offsets at the limit",
        float(at_limit(lengths_angst, limit_angst, step_angst).double().mean()),
        MANY_AT_LIMIT,
        "above",
        f"share of particles as far off centre as was searched, {limit_angst:.1f} A",
        "Many particles were found as far off centre as was searched: more may lie further out.",
        remedy,
    )


def empty_images(log_likelihood: Tensor) -> Finding:
    """Images that the map does not make likelier than nothing in them would.

    Parameters
    ----------
    log_likelihood : Tensor, shape (n,)
        Of each image at its pose, against an empty one.
    """
    return Finding(
        "Images without the particle",
        float((log_likelihood <= 0).double().mean()),
        MOST_EMPTY,
        "above",
        "share of images that fit the map no better than an empty image",
        "Some images fit the map no better than an empty image: noise or other particles.",
        "Take out the rows of run_data.star whose rlnLogLikeliContribution is below 0, or lower "
        "than that of most others (relion_star_handler --select), and run again.",
    )


def unsure_poses(share: Tensor) -> Finding:
    """Images that may as well have another pose.

    Parameters
    ----------
    share : Tensor, shape (n,)
        How much of each image belongs to its pose.
    """
    return Finding(
        "Unsure poses",
        float((share < SURE).double().mean()),
        MOST_IN_DOUBT,
        "above",
        "share of images that may have another pose",
        "Most images may have another pose: the map is wrong, or they hardly tell theirs. Half "
        "maps of a shared search then follow each other's noise, and agree further than they are "
        "right.",
        "Check the CTF columns and the pixel size first. Run again with another --seed or more "
        "--starts, and with --halves independent, whose agreement means what it says; or take "
        "more images, or ones of more contrast.",
    )


def poor_agreement(curve: Tensor, threshold: float, diameter: float) -> Finding:
    """Half maps that agree on no more than an outline.

    Parameters
    ----------
    curve : Tensor, shape (N // 2 + 1,)
        FSC.
    threshold : float
        Where it is read.
    diameter : float
        Of the particle, as a fraction of the box side.
    """
    return Finding(
        "Poor agreement",
        crossing_shell(curve, threshold) * diameter,
        LEAST_CYCLES,
        "below",
        f"resolution at FSC {threshold:g}, in cycles per particle diameter",
        "The two maps agree to no more than an outline.",
        "Run again with another --seed or more --starts, check CTF and pixel size, or give more "
        "particles.",
    )


def around_particle(volume: Tensor, diameter: float) -> Tensor:
    """A map's middle, as wide as the particle and a margin.

    Detail is judged in cycles per box, by thresholds that were found with particles that fill
    theirs: in a wide box the same detail would be no more than an outline.

    Parameters
    ----------
    volume : Tensor, shape (N, N, N)
    diameter : float
        Of the particle, as a fraction of the box side.
    """
    box = len(volume)
    wanted = 2 * round(box * diameter / _FILLS / 2)
    return crop_or_pad_centred(volume, wanted, 3) if 0 < wanted < box else volume


def findings(inputs: ReportInputs) -> list[Finding]:
    """All checks that a job's files allow."""
    found: list[Finding] = []
    if inputs.map is not None:
        volume = torch.from_numpy(inputs.map.data)
        near = around_particle(volume, inputs.diameter or 1.0)
        found += [hollow_shell(near), negative_blob(near)]
        # What is edge of the sphere is edge of the box where the sphere is not known.
        found.append(mass_at_edge(volume, (inputs.diameter or 1.0) / 2))
        if float(near.std()) > 0:
            found.append(mirror_plane(near))
    if inputs.poses is not None:
        found.append(collapsed_views(inputs.poses.rotations[:, 2]))
        limit = inputs.offset_limit_angst
        if limit is not None and inputs.map is not None:
            lengths = inputs.poses.origins_angst.norm(dim=-1)
            step, side = inputs.worked_pixel_angst, inputs.side_angst
            found.append(offsets_at_limit(lengths, limit, step, side))
        if inputs.log_likelihood is not None:
            found.append(empty_images(inputs.log_likelihood))
        if inputs.share is not None:
            found.append(unsure_poses(inputs.share))
    elif inputs.view_density is not None:
        found.append(collapsed_views(*views_of_density(inputs)))
    if inputs.fsc is not None and inputs.diameter is not None:
        threshold = 0.143 if inputs.poses is not None else 0.5
        found.append(poor_agreement(inputs.fsc.values, threshold, inputs.diameter))
    return found


def views_of_density(inputs: ReportInputs) -> tuple[Tensor, Tensor]:
    """Directions and weights of ``view_density.star``; negative densities count as none."""
    table = inputs.view_density
    assert table is not None
    columns = ("rlnAngleRot", "rlnAngleTilt", "cryoreconViewDensity")
    rot, tilt, density = (table[name].to_numpy(np.float64) for name in columns)
    rot, tilt = np.deg2rad(rot), np.deg2rad(tilt)
    flat = [np.sin(tilt) * np.cos(rot), np.sin(tilt) * np.sin(rot), np.cos(tilt)]
    return torch.from_numpy(np.stack(flat, -1)), torch.from_numpy(density).clamp(min=0)


def said_in_log(log: list[str]) -> list[str]:
    """Warnings that the run itself gave."""
    found = (_LOGGED.match(line) for line in log)
    # A job that went on says again what it said at its start.
    return list(dict.fromkeys(match[1] for match in found if match))
