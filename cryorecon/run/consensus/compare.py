"""Several reconstructions of the same particles: how far they agree, and what they agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from cryorecon.conventions import angst_to_shell
from cryorecon.errors import CryoreconError
from cryorecon.maps.chance import chance_fsc
from cryorecon.physics.masks import Support
from cryorecon.run.consensus.agreed import write_agreed_map, write_agreed_poses
from cryorecon.run.consensus.inputs import MAP, POSES, Candidate, read_candidates
from cryorecon.run.consensus.pairs import Pairing, Verdict, all_pairs, judge
from cryorecon.run.consensus.results import (
    Frame,
    in_one_frame,
    write_agreement,
    write_curves,
    write_pictures,
)
from cryorecon.run.job import Job, Task, open_job, write_output_nodes
from cryorecon.run.settings import point_group
from cryorecon.run.width import ROUNDED, WIDEST, widest_text

# Agreement that counts reaches this many cycles per particle diameter: a cycle beyond what any
# unlike maps of one size were seen to reach once chance was taken out (docs/consensus.md).
NEEDED_CYCLES = 4.0
_DIAMETER = 0.8


@dataclass(frozen=True)
class ConsensusOptions:
    """What a user chooses.

    Attributes
    ----------
    diameter_angst : float, optional
        Of the particle; default: what the first job's settings say, else 0.8 of the box.
    agree_to_angst : float
        Resolution that agreement must reach; 0: a quarter of the diameter.
    within_deg : float
        Poses that differ by no more agree.
    symmetry : str
        Point group of the particle, on whose axes the jobs' maps lie.
    allow_ambiguous : bool
        Write the best map even if the jobs disagree.
    chance_trials : int
        Maps of noise that tell what alignment alone brings.
    """

    diameter_angst: float | None = None
    agree_to_angst: float = 0.0
    within_deg: float = 5.0
    symmetry: str = "C1"
    allow_ambiguous: bool = False
    chance_trials: int = 6
    seed: int = 0


def consensus(
    paths: list[Path],
    output: Path,
    options: ConsensusOptions,
    console: Console,
    *,
    failed: dict[str, str] | None = None,
    inputs: Path | None = None,
) -> None:
    """Compare jobs two by two and write what the majority agrees on.

    Parameters
    ----------
    paths : list of Path
        Job directories, or maps; the first agreeing one gives the frame.
    output : Path
        Job directory.
    failed : dict of str, optional
        Why further jobs gave nothing, by name.
    inputs : Path, optional
        What job.yaml names as input; default the first job's particles or map.

    Raises
    ------
    CryoreconError
        If the jobs cannot be compared, or no majority agrees.
    """
    group = point_group(options.symmetry)
    jobs, without = read_candidates(paths)
    without |= failed or {}
    if not jobs and inputs is None:
        raise _nothing(without)
    _refuse_options(jobs, options)
    first, n_rows = _first_file(jobs) if jobs else (Path(), 0)
    settings, seed = {"jobs": list(paths), "consensus": options}, options.seed
    task = Task("consensus", inputs or first, n_rows, settings, settings, seed)
    with open_job(output, console, task) as job:
        if not jobs:
            raise _nothing(without)
        _run(job, jobs, without, options, group)


def _nothing(without: dict[str, str]) -> CryoreconError:
    reasons = "; ".join(f"{name}: {why}" for name, why in without.items())
    return CryoreconError(f"No agreement: no job has a map ({reasons})", "See their run.log")


def _run(
    job: Job,
    jobs: list[Candidate],
    without: dict[str, str],
    options: ConsensusOptions,
    group: Tensor,
) -> None:
    diameter = _diameter(jobs, options)
    needed = _needed(jobs, diameter, options)
    mask = Support(diameter / 2).on(jobs[0].box)
    _tell_jobs(job, jobs, without)
    pairs = _compare(job, jobs, mask, group, options)
    verdict = judge(jobs, pairs, needed)
    write_agreement(job, jobs, without, pairs, verdict, options.within_deg)
    _tell(job, jobs, verdict)
    frame = _frame(jobs, pairs, verdict, mask)
    _draw(job, jobs, pairs, verdict, frame, mask)
    if not verdict.agreed and not options.allow_ambiguous:
        raise CryoreconError(_disagreement(pairs, verdict), _REMEDY)
    nodes = write_agreed_map(job, jobs, frame, verdict, diameter)
    if write_agreed_poses(job, jobs, frame, verdict, options.within_deg, group):
        nodes[POSES] = 3
    write_output_nodes(job.folder, nodes)
    for name in ("agreement.star", "fsc.png", "slices.png", "difference.png", *nodes):
        if job.path(name).exists():
            job.say(f"{job.path(name)}")


def _first_file(jobs: list[Candidate]) -> tuple[Path, int]:
    """What job.yaml names as input, the first job's that has poses, and its rows."""
    for job in jobs:
        if job.poses is not None:
            return job.path / POSES, len(job.poses.images)
    first = jobs[0]
    return (first.path / MAP if first.path.is_dir() else first.path), 0


def _frame(jobs: list[Candidate], pairs: list[Pairing], verdict: Verdict, mask: Tensor) -> Frame:
    """All maps on the first agreeing job's; without agreement on the one that claims most."""
    claims = [math.inf if job.claim_angst is None else job.claim_angst for job in jobs]
    best = min(range(len(jobs)), key=lambda n: claims[n])
    return in_one_frame(jobs, pairs, verdict.cluster[0] if verdict.agreed else best, mask)


def _draw(
    job: Job,
    jobs: list[Candidate],
    pairs: list[Pairing],
    verdict: Verdict,
    frame: Frame,
    mask: Tensor,
) -> None:
    if not pairs:
        return
    shown = verdict.limiting if verdict.agreed else None
    shown = shown or min(pairs, key=lambda pair: pair.resolution_angst)
    write_curves(job, jobs, pairs, shown, mask, verdict.mark)
    gain = torch.ones(jobs[0].box // 2 + 1, dtype=torch.float64)
    reach = min(shown.resolution_angst, verdict.needed_angst)
    gain[int(angst_to_shell(reach, jobs[0].box, jobs[0].pixel_size_angst)) + 1 :] = 0
    write_pictures(job, jobs, frame, verdict, mask, gain)


_REMEDY = (
    "Look at slices.png, difference.png and agreement.star; check --diameter, CTF and symmetry, "
    "give more particles or another seed, or write the best map all the same with "
    "--allow-ambiguous"
)


def _side_angst(jobs: list[Candidate]) -> float:
    return jobs[0].box * jobs[0].pixel_size_angst


def _diameter(jobs: list[Candidate], options: ConsensusOptions) -> float:
    """Of the particle, as a fraction of the box."""
    side = _side_angst(jobs)
    if options.diameter_angst is not None:
        if not 0 < options.diameter_angst <= WIDEST * side * ROUNDED:
            raise CryoreconError(
                f"A particle of {options.diameter_angst:g} A does not fit the maps, {side:.4g} A "
                "wide",
                f"Give --diameter in angstrom, at most {widest_text(side)}",
            )
        return options.diameter_angst / side
    return next((job.diameter for job in jobs if job.diameter is not None), _DIAMETER)


def _needed(jobs: list[Candidate], diameter: float, options: ConsensusOptions) -> float:
    """Resolution, in angstrom, that agreement must reach."""
    told = options.agree_to_angst
    return told if told > 0 else diameter * _side_angst(jobs) / NEEDED_CYCLES


def _refuse_options(jobs: list[Candidate], options: ConsensusOptions) -> None:
    """Before anything of an earlier comparison is removed."""
    if not options.within_deg > 0:
        raise CryoreconError(
            f"Poses cannot agree within {options.within_deg:g} degrees", "Give a positive angle"
        )
    finest = 2 * jobs[0].pixel_size_angst if jobs else 0.0
    if 0 < options.agree_to_angst < finest:
        raise CryoreconError(
            f"Agreement to {options.agree_to_angst:g} A is asked for, beyond the maps' Nyquist, "
            f"{finest:g} A",
            "Give a coarser resolution",
        )


def _tell_jobs(job: Job, jobs: list[Candidate], without: dict[str, str]) -> None:
    for found in jobs:
        claims = "claims no resolution"
        if found.claim_angst is not None:
            claims = f"claims {found.claim_angst:.2f} A ({found.claim})"
        poses = "no poses" if found.poses is None else f"{len(found.poses.images)} poses"
        job.say(f"{found.name}: {claims}, {poses}")
    for name, reason in without.items():
        job.say(f"WARNING: {name} has no map: {reason}")


def _compare(
    job: Job,
    jobs: list[Candidate],
    mask: Tensor,
    group: Tensor,
    options: ConsensusOptions,
) -> list[Pairing]:
    if len(jobs) < 2:
        return []
    generator = torch.Generator().manual_seed(options.seed)
    chance = chance_fsc(
        jobs[1].volumes.joint,
        jobs[0].volumes.joint,
        mask,
        jobs[0].pixel_size_angst,
        generator,
        options.chance_trials,
    )
    job.say(
        f"noise aligned in place of a map would agree with an FSC of up to "
        f"{float(chance[1:].max()):.2f}, which is taken out"
    )
    pairs = all_pairs(jobs, mask, chance, group)
    for pair in pairs:
        job.say(pair.text(options.within_deg))
    return pairs


def _tell(job: Job, jobs: list[Candidate], verdict: Verdict) -> None:
    """The verdict, and what it does not say."""
    for number in range(len(jobs)):
        role = verdict.role(number).replace("_", " ")
        if number in verdict.voices:
            job.say(f"{jobs[number].name} is too coarse to vote: {role}")
        elif role == "disagrees":
            job.say(f"WARNING: {jobs[number].name} disagrees with the majority")
    if verdict.limiting is None or not verdict.agreed:
        return
    names = ", ".join(jobs[n].name for n in verdict.cluster)
    reached = verdict.limiting.resolution_angst
    job.say(
        f"AGREEMENT: {len(verdict.cluster)} of {len(verdict.voters)} ({names}) agree to "
        f"{reached:.2f} A; {verdict.needed_angst:.2f} A were needed"
    )
    if not verdict.limiting.maps.crossed:
        job.say(
            "they share their images' noise, which agrees too: this is no resolution of the map"
        )
    job.say(
        "the same images went into all of them: agreement speaks for the poses, not for the "
        "data, nor for anything beyond the half maps' own FSC"
    )


def _disagreement(pairs: list[Pairing], verdict: Verdict) -> str:
    needed = f"{verdict.needed_angst:.1f} A are needed"
    if len(verdict.voters) < 2:
        count = "one job claims" if verdict.voters else "no job claims"
        return f"No agreement: {count} enough to vote, {needed}"
    voting = [p for p in pairs if {p.first, p.second} <= set(verdict.voters)]
    best = min(voting, key=lambda pair: pair.resolution_angst)
    if len(verdict.cluster) >= 2:
        return (
            f"No agreement: of {len(verdict.voters)} jobs that vote, no more than "
            f"{len(verdict.cluster)} agree to {verdict.needed_angst:.1f} A"
        )
    reach = "nowhere" if math.isinf(best.resolution_angst) else f"to {best.resolution_angst:.1f} A"
    who = f"{best.names[0]} and {best.names[1]}"
    nearest = who if len(voting) == 1 else f"even {who}, the nearest,"
    return f"No agreement: {nearest} agree {reach}; {needed}"
