"""What a consensus tells of the jobs: tables, curves and pictures."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from cryorecon.io.star import write_star
from cryorecon.maps.agreement import Volumes, map_agreement, shell_filtered
from cryorecon.maps.align import Alignment
from cryorecon.maps.fsc import fsc_curve
from cryorecon.run.consensus.inputs import Candidate
from cryorecon.run.consensus.pairs import Pairing, Verdict
from cryorecon.run.consensus.pictures import difference_figure, side_by_side_figure
from cryorecon.run.curves import FscCurve, write_fsc_star, write_fsc_xml
from cryorecon.run.job import Job
from cryorecon.run.plots import fsc_figure, save_figure

# Where each job's maps lie once moved onto the reference's; how: None for the reference itself.
Frame = dict[int, tuple[Alignment | None, Volumes]]

_INFINITE_ANGST = 999.0


def _finite(angst: float | None) -> float:
    return _INFINITE_ANGST if angst is None or math.isinf(angst) else angst


def in_one_frame(
    jobs: list[Candidate], pairs: list[Pairing], reference: int, mask: Tensor
) -> Frame:
    """How each job's maps move onto the reference's, and where they then lie."""
    found: Frame = {reference: (None, jobs[reference].volumes)}
    for pair in pairs:
        if pair.first == reference:
            found[pair.second] = pair.maps.alignment, pair.maps.moved
    for number in set(range(len(jobs))) - set(found):
        # Jobs before the reference were the ones to stay when the two were compared.
        moved = map_agreement(
            jobs[number].volumes,
            jobs[reference].volumes,
            mask,
            jobs[reference].pixel_size_angst,
            torch.zeros(len(mask) // 2 + 1, dtype=torch.float64),
            crossed=False,
        )
        found[number] = moved.alignment, moved.moved
    return found


def write_agreement(
    job: Job,
    jobs: list[Candidate],
    without: dict[str, str],
    pairs: list[Pairing],
    verdict: Verdict,
    within_deg: float,
) -> None:
    """The tables of jobs and pairs."""
    rows = [
        {
            "cryoreconJob": found.name,
            "cryoreconRole": verdict.role(number),
            "cryoreconClaimedResolution": _finite(found.claim_angst),
            "cryoreconClaim": found.claim.replace(" ", "_"),
            "cryoreconPoses": 0 if found.poses is None else len(found.poses.images),
        }
        for number, found in enumerate(jobs)
    ]
    rows += [
        {
            "cryoreconJob": name,
            "cryoreconRole": "no_map",
            "cryoreconClaimedResolution": _INFINITE_ANGST,
            "cryoreconClaim": reason.replace(" ", "_"),
            "cryoreconPoses": 0,
        }
        for name, reason in without.items()
    ]
    tables = {"jobs": pd.DataFrame(rows)}
    if pairs:
        tables["pairs"] = pd.DataFrame([_pair_row(p, verdict, within_deg) for p in pairs])
    write_star(job.path("agreement.star"), tables)


def _pair_row(pair: Pairing, verdict: Verdict, within_deg: float) -> dict[str, object]:
    share = pair.share_within(within_deg)
    x, y, z = (float(v) for v in pair.maps.alignment.shift_px * pair.curve.pixel_size_angst)
    angles = pair.angles_deg
    return {
        "cryoreconJobA": pair.names[0],
        "cryoreconJobB": pair.names[1],
        "cryoreconCompared": pair.kind.replace(" ", "_"),
        "cryoreconThreshold": pair.maps.threshold,
        "cryoreconAgreeToAngst": _finite(pair.resolution_angst),
        "cryoreconNeededAngst": verdict.needed_angst,
        "cryoreconAgree": int(pair.resolution_angst <= verdict.needed_angst),
        "cryoreconMirrored": int(pair.maps.alignment.flipped),
        "cryoreconTurnDeg": pair.turn_deg,
        "cryoreconShiftXAngst": x,
        "cryoreconShiftYAngst": y,
        "cryoreconShiftZAngst": z,
        "cryoreconCommonImages": 0 if angles is None else len(angles),
        "cryoreconPosesWithinLimit": -1.0 if share is None else share,
        "cryoreconPoseMedianDeg": -1.0 if angles is None else float(angles.median()),
    }


def write_curves(
    job: Job, jobs: list[Candidate], pairs: list[Pairing], shown: Pairing, mask: Tensor, mark: str
) -> None:
    """FSC of the pair that limits the agreement as files; of all pairs, and half maps, drawn.

    Parameters
    ----------
    mark : str
        What every label begins with, if anything.
    """
    told = replace(shown.curve, maps=f"{mark}{shown.curve.maps}")
    write_fsc_star(job.path("fsc.star"), told, shown.maps.threshold)
    write_fsc_xml(job.path("fsc.xml"), told)
    curves = {
        f"{mark}{pair.names[0]} and {pair.names[1]}, {pair.kind}": pair.curve for pair in pairs
    }
    for found in jobs:
        if found.volumes.halves is not None:
            values = fsc_curve(*found.volumes.halves, mask)
            values[found.last_shell + 1 :] = 0
            own = FscCurve(
                values, found.box, found.pixel_size_angst, "half maps", "soft sphere", False
            )
            curves[f"{found.name}: its own half maps"] = own
    save_figure(fsc_figure(curves), job.path("fsc.png"))


def write_pictures(
    job: Job,
    jobs: list[Candidate],
    frame: Frame,
    verdict: Verdict,
    mask: Tensor,
    gain: Tensor,
) -> None:
    """Slices and projections side by side, and what each map has more than the reference."""
    reference = reference_of(frame)
    filtered = {n: shell_filtered(v.joint * mask, gain) for n, (_, v) in sorted(frame.items())}
    labels = {n: f"{jobs[n].name}\n{verdict.role(n).replace('_', ' ')}" for n in filtered}
    angst = _band_angst(gain, jobs[reference])
    title = f"on {jobs[reference].name}, filtered to {angst:.1f} A"
    rows = [(labels[n], v) for n, v in filtered.items()]
    save_figure(side_by_side_figure(rows, f"aligned {title}"), job.path("slices.png"))
    base = filtered[reference]
    spread = base.std().clamp(min=1e-30)
    differences = []
    for number, volume in filtered.items():
        if number != reference:
            scale = (base * volume).sum() / (volume * volume).sum().clamp(min=1e-30)
            differences.append((f"{jobs[number].name}", (scale * volume - base) / spread))
    if differences:
        figure = difference_figure(
            differences, f"minus {jobs[reference].name}, in its standard deviations; {title}"
        )
        save_figure(figure, job.path("difference.png"))


def _band_angst(gain: Tensor, found: Candidate) -> float:
    last = max(int(torch.nonzero(gain)[-1]), 1)
    return found.box * found.pixel_size_angst / last


def reference_of(frame: Frame) -> int:
    """The job that the others were moved onto."""
    return next(number for number, (found, _) in frame.items() if found is None)
