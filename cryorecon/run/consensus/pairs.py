"""What every two jobs have in common, and which jobs agree with each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from cryorecon.conventions import angst_to_shell
from cryorecon.maps.agreement import (
    MapAgreement,
    largest_cluster,
    map_agreement,
    moved_poses,
)
from cryorecon.maps.fsc import crossing_shell
from cryorecon.physics.rotations import log_map
from cryorecon.physics.symmetry import distance_under_deg
from cryorecon.run.consensus.inputs import Candidate, common_rows, half_sets_match
from cryorecon.run.curves import FscCurve


@dataclass(frozen=True)
class Pairing:
    """Two jobs, the second moved onto the first.

    Attributes
    ----------
    first, second : int
        Numbers of the jobs.
    names : tuple of str
    maps : MapAgreement
    curve : FscCurve
        Its FSC with the conditions.
    angles_deg : Tensor, shape (n,), or None
        Difference of the poses of the common images; None where a job has no poses.
    """

    first: int
    second: int
    names: tuple[str, str]
    maps: MapAgreement
    curve: FscCurve
    angles_deg: Tensor | None

    @property
    def kind(self) -> str:
        """What was compared."""
        return "half sets crossed" if self.maps.crossed else "maps that share their images' noise"

    @property
    def resolution_angst(self) -> float:
        """Where the FSC falls below the threshold; infinite if it never is above."""
        return self.curve.resolution_angst(self.maps.threshold)

    @property
    def shell(self) -> float:
        """The same in cycles per box."""
        return crossing_shell(self.maps.curve, self.maps.threshold)

    @property
    def turn_deg(self) -> float:
        """Angle by which the second map was turned."""
        return math.degrees(float(log_map(self.maps.alignment.rotation).norm()))

    def share_within(self, limit_deg: float) -> float | None:
        """Share of the common images whose poses agree to so many degrees."""
        if self.angles_deg is None:
            return None
        return float((self.angles_deg <= limit_deg).double().mean())

    def text(self, limit_deg: float) -> str:
        """One line for the log."""
        hand = "mirrored" if self.maps.alignment.flipped else "same hand"
        line = (
            f"{self.names[0]} and {self.names[1]}: {self.kind}, "
            f"{self.curve.resolution_text(self.maps.threshold)}; {hand}; "
        )
        if self.angles_deg is None:
            return line + "no poses to compare"
        share, median = self.share_within(limit_deg) or 0.0, float(self.angles_deg.median())
        return line + (
            f"{100 * share:.0f} % of {len(self.angles_deg)} poses within {limit_deg:g} degrees "
            f"(median {median:.1f})"
        )


def pair_of(
    jobs: list[Candidate],
    first: int,
    second: int,
    mask: Tensor,
    chance: Tensor,
    group: Tensor,
) -> Pairing:
    """Move the second job onto the first and compare maps and poses.

    Parameters
    ----------
    mask : Tensor, shape (N, N, N)
    chance : Tensor, shape (N // 2 + 1,)
    group : Tensor, shape (g, 3, 3)
        Symmetry of the particle.
    """
    one, two = jobs[first], jobs[second]
    crossed = half_sets_match(one, two)
    pixel = one.pixel_size_angst
    last = min(one.last_shell, two.last_shell)
    found = map_agreement(
        two.volumes, one.volumes, mask, pixel, chance, crossed=crossed, last_shell=last
    )
    what = "half set 1 of one with 2 of the other" if crossed else "same images, same noise"
    label = f"{one.name} and {two.name}: {what}"
    curve = FscCurve(found.curve, one.box, pixel, label, "soft sphere, chance taken out", True)
    angles = None
    both = common_rows(one, two)
    if both is not None:
        poses, _ = moved_poses(both[1].rotations, torch.zeros(1, 2), found.alignment)
        angles = distance_under_deg(poses, both[0].rotations, group)
    return Pairing(first, second, (one.name, two.name), found, curve, angles)


@dataclass(frozen=True)
class Verdict:
    """Who agrees with whom.

    Attributes
    ----------
    needed_angst : float
        Resolution that agreement must reach.
    voters : list of int
        Jobs that claim as much, or claim nothing.
    cluster : list of int
        The largest set of voters that all agree with each other.
    voices : dict of int to bool or None
        Of jobs that claim less: whether they agree with the cluster as far as they claim.
    limiting : Pairing or None
        The pair of the cluster that agrees least far.
    """

    needed_angst: float
    voters: list[int]
    cluster: list[int]
    voices: dict[int, bool | None]
    limiting: Pairing | None

    @property
    def mark(self) -> str:
        """What labels begin with where no majority agrees."""
        return "" if self.agreed else "NO AGREEMENT: "

    @property
    def agreed(self) -> bool:
        """Whether more than half of the voters agree, and two at least."""
        return len(self.cluster) >= 2 and 2 * len(self.cluster) > len(self.voters)

    def role(self, number: int) -> str:
        """A word on a job's part."""
        if number in self.voices:
            known = self.voices[number]
            return {None: "silent", True: "coarse_but_agrees", False: "coarse_and_disagrees"}[known]
        if not self.agreed:
            return "undecided"
        return "agrees" if number in self.cluster else "disagrees"


def judge(jobs: list[Candidate], pairs: list[Pairing], needed_angst: float) -> Verdict:
    """Find the largest set of jobs that agree to a resolution.

    A job that claims less than that resolution has no vote: it may only agree, or not, as far
    as it claims.
    """
    voters = [
        n
        for n, job in enumerate(jobs)
        if job.claim_angst is None or job.claim_angst <= needed_angst
    ]
    place = {number: k for k, number in enumerate(voters)}
    matrix = torch.zeros(len(voters), len(voters))
    for pair in pairs:
        if {pair.first, pair.second} <= set(place) and pair.resolution_angst <= needed_angst:
            i, j = place[pair.first], place[pair.second]
            matrix[i, j] = matrix[j, i] = pair.shell
    cluster = [voters[k] for k in largest_cluster(matrix)]
    inside = [p for p in pairs if {p.first, p.second} <= set(cluster)]
    limiting = max(inside, key=lambda pair: pair.resolution_angst, default=None)
    voices = {n: _voice(n, jobs, pairs, cluster) for n in range(len(jobs)) if n not in place}
    return Verdict(needed_angst, voters, cluster, voices, limiting)


def _voice(
    number: int, jobs: list[Candidate], pairs: list[Pairing], cluster: list[int]
) -> bool | None:
    """Whether a coarse job agrees with the cluster as far as it claims, within a shell."""
    job = jobs[number]
    if not cluster or job.claim_angst is None or math.isinf(job.claim_angst):
        return None
    wanted = angst_to_shell(job.claim_angst, job.box, job.pixel_size_angst) - 1
    shells = [
        pair.shell
        for pair in pairs
        if number in (pair.first, pair.second) and (pair.first in cluster or pair.second in cluster)
    ]
    return bool(shells) and sum(shells) / len(shells) >= wanted


def all_pairs(jobs: list[Candidate], mask: Tensor, chance: Tensor, group: Tensor) -> list[Pairing]:
    """Every two jobs, the later one moved onto the earlier."""
    return [pair_of(jobs, i, j, mask, chance, group) for i, j in combinations(range(len(jobs)), 2)]
