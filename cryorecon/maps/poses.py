"""How poses follow their map, and how two sets of poses of the same images compare.

With A a pose and V a map (see :mod:`cryorecon.conventions`), the same images come from

* the turned map ``V'(r) = V(R.T r)`` at poses ``A R.T``;
* the mirrored map ``V'(r) = V(M r)``, M = diag(-1, 1, 1), at poses ``D A M`` with
  D = diag(1, 1, -1): D reverses the direction of projection, which a sum along it does not notice;
* the shifted map ``V'(r) = V(r - t)`` at origins larger by ``(A t)_xy``: the projected content
  moves by that much, and an origin moves content by its negative.

Origins are measured in the image, so turning and mirroring the map leave them alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.physics.rotations import geodesic_distance_deg, of_quaternions
from cryorecon.physics.symmetry import commonest_turn, nearest_copies

# Candidates for the common rotation, and images that vote on them.
_N_CANDIDATES = 1024
_N_VOTERS = 2048
# Images that are asked whether their poses lie one turn apart.
_N_TURNS = 5000
# Misfit at which an image's vote has fallen to one quarter; also the widest and narrowest scale
# of the refinement.
_VOTE_SCALE_DEG = 12.0
_SCALE_RANGE_DEG = (0.05, 12.0)
_MAX_ITERATIONS = 100
FRACTION_LIMITS_DEG = (1.0, 2.0, 5.0, 10.0, 30.0)


def rotate_poses(rotations: Tensor, rotation: Tensor) -> Tensor:
    """Poses of the same images for a map turned by `rotation`: ``A R.T``.

    Parameters
    ----------
    rotations : Tensor, shape (..., 3, 3)
        A, reference to image coordinates.
    rotation : Tensor, shape (3, 3)
        R of ``V'(r) = V(R.T r)``, as in :class:`cryorecon.maps.align.Alignment`.
    """
    return rotations @ rotation.transpose(-1, -2).to(rotations)


def mirror_poses(rotations: Tensor) -> Tensor:
    """Poses of the same images for the map of the other hand: ``D A M``; origins stay.

    Parameters
    ----------
    rotations : Tensor, shape (..., 3, 3)
    """
    signs = torch.tensor([[-1, 1, 1], [-1, 1, 1], [1, -1, -1]])
    return rotations * signs.to(rotations)


def shift_origins(origins: Tensor, rotations: Tensor, shift: Tensor) -> Tensor:
    """Origins of the same images for a map whose content moved by `shift`: ``o + (A t)_xy``.

    Parameters
    ----------
    origins : Tensor, shape (n, 2)
    rotations : Tensor, shape (n, 3, 3)
        Poses for the shifted map: after any rotation of it.
    shift : Tensor, shape (3,)
        (x, y, z) in the unit of the origins.
    """
    return origins + rotations[..., :2, :] @ shift.to(rotations)


@dataclass(frozen=True)
class PoseComparison:
    """Two sets of poses of the same images after one global alignment of their frames.

    Attributes
    ----------
    rotation : Tensor, shape (3, 3), float64
        R that takes the second set to the first: ``A_i ~ B_i R.T``, with B mirrored first if
        `flipped`. The first set's map is the second's turned by R.
    flipped : bool
        Whether the second set is of the other hand.
    angles_deg : Tensor, shape (n,), float64
        Geodesic error of each image.
    shift_angst : Tensor, shape (3,), float64, or None without origins
        How far the first map's content is shifted from the turned second's; taken out of
        `offsets_angst`.
    offsets_angst : Tensor, shape (n, 2), float64, or None
        What is left of first minus second origin.
    turned : tuple of float
        Share of the images whose poses lie one turn of the map apart, and its angle in degrees: as
        copies in a symmetric particle do.
    """

    rotation: Tensor
    flipped: bool
    angles_deg: Tensor
    shift_angst: Tensor | None
    offsets_angst: Tensor | None
    turned: tuple[float, float] = (0.0, 0.0)

    @property
    def median_deg(self) -> float:
        """Median geodesic error; about 132 for random poses."""
        return float(self.angles_deg.median())

    @property
    def mean_deg(self) -> float:
        """Mean geodesic error; about 126 for random poses."""
        return float(self.angles_deg.mean())

    def fraction_within(self, limit_deg: float) -> float:
        """Share of images whose error is at most `limit_deg`."""
        return float((self.angles_deg <= limit_deg).double().mean())

    @property
    def median_offset_angst(self) -> float | None:
        """Median length of the remaining origin difference."""
        if self.offsets_angst is None:
            return None
        return float(self.offsets_angst.norm(dim=-1).median())


def _spread(n: int, count: int) -> Tensor:
    """`count` indices spread evenly over n images, fewer if there are fewer."""
    return torch.linspace(0, n - 1, min(n, count), dtype=torch.float64).round().long()


def _votes(candidates: Tensor, voters: Tensor, group: Tensor) -> Tensor:
    """Robust agreement of each candidate with all voters' nearest copies, shape (c,), 0 to 1."""
    # For rotations trace(P.T Q) = 1 + 2 cos(angle), so one matrix product gives all angles; of a
    # copy Q g it is trace((P g.T).T Q).
    largest = candidates.new_full((len(candidates), len(voters)), -1.0)
    for turn in group:
        largest = torch.maximum(largest, (candidates @ turn.mT).flatten(1) @ voters.flatten(1).T)
    scale = 2 - 2 * math.cos(math.radians(_VOTE_SCALE_DEG))
    return ((1 + (3 - largest).clamp(min=0) / scale) ** -2).mean(-1)


def _consensus(relative: Tensor, group: Tensor) -> Tensor:
    """The rotation that most others, or copies of theirs, lie near."""
    candidates = relative[_spread(len(relative), _N_CANDIDATES)]
    votes = _votes(candidates, relative[_spread(len(relative), _N_VOTERS)], group)
    return candidates[votes.argmax()]


def _robust_mean(relative: Tensor, start: Tensor) -> Tensor:
    """Mean rotation with Geman-McClure weights whose scale follows the median misfit.

    Each step is the weighted chordal mean, the eigenvector of the largest eigenvalue of the
    quaternions' weighted second moment (Markley et al. 2007).
    """
    import roma  # loads torch._dynamo, which takes a second: only when needed

    quaternions = roma.rotmat_to_unitquat(relative)
    low, high = _SCALE_RANGE_DEG
    mean = start
    for _ in range(_MAX_ITERATIONS):
        angles = geodesic_distance_deg(relative, mean)
        # Images beyond the widest scale are outliers and say nothing about the spread.
        near = angles[angles <= 2 * high]
        scale = min(max(float(near.median()) if len(near) else high, low), high)
        weights = (1 + (angles / scale) ** 2) ** -2
        moment = (quaternions * weights[:, None]).T @ quaternions
        previous, mean = mean, of_quaternions(torch.linalg.eigh(moment)[1][:, -1])
        if float(geodesic_distance_deg(previous, mean)) < 1e-7:
            break
    return mean


def _common_shift(rotations: Tensor, differences: Tensor, trusted: Tensor) -> Tensor:
    """Shift t that minimises the sum of ``|d_i - (A_i t)_xy|``, by iterative reweighting.

    Parameters
    ----------
    rotations : Tensor, shape (n, 3, 3)
    differences : Tensor, shape (n, 2)
    trusted : Tensor, shape (n,)
        Weight of each image: an image with a wrong rotation has a meaningless origin.
    """
    rows = rotations[:, :2, :]
    weights = trusted
    shift = differences.new_zeros(3)
    for _ in range(_MAX_ITERATIONS):
        weighted = rows * weights[:, None, None]
        normal = torch.einsum("nij,nik->jk", weighted, rows)
        right = torch.einsum("nij,ni->j", weighted, differences)
        # All views alike leave the shift along them open: the smallest solution is taken.
        previous, shift = shift, torch.linalg.lstsq(normal, right, driver="gelsd").solution
        left = (differences - rows @ shift).norm(dim=-1)
        weights = trusted / left.clamp(min=1e-3)
        if float((shift - previous).norm()) < 1e-6:
            break
    return shift


def compare_pose_sets(
    rotations_a: Tensor,
    rotations_b: Tensor,
    offsets_a_angst: Tensor | None = None,
    offsets_b_angst: Tensor | None = None,
    group: Tensor | None = None,
) -> PoseComparison:
    """Compare two sets of poses of the same images, in the same order, up to frame and hand.

    Two reconstructions from scratch differ by a global rotation, perhaps by the hand, and by a
    shift of the map. ``B_i.T A_i`` is the same for every image both sets agree on: the
    rotation that most images vote for is the start of a robust mean, once for B and once for
    its mirror image, and the hand with more votes stays. Half of the images may be outliers.
    The map's shift t changes origins by ``(A_i t)_xy``; it is found by least absolute
    deviations, over images whose rotations agree, and taken out. Symmetry is not looked for:
    poses that differ by a symmetry of the particle count as different, unless `group` is given.

    Parameters
    ----------
    rotations_a, rotations_b : Tensor, shape (n, 3, 3)
        n >= 1; any float type, computed in float64.
    offsets_a_angst, offsets_b_angst : Tensor, shape (n, 2), optional
        RELION origins in angstrom; both or none.
    group : Tensor, shape (g, 3, 3), optional
        Symmetry of the particle, on whose axes the first set's map lies: of its equal poses A g the
        one nearest to the second set's counts.

    Raises
    ------
    ValueError
        If the sets differ in length, are empty, or only one has origins.
    """
    if rotations_a.shape != rotations_b.shape or len(rotations_a) == 0:
        raise ValueError(f"{len(rotations_a)} and {len(rotations_b)} poses cannot be compared")
    if (offsets_a_angst is None) != (offsets_b_angst is None):
        raise ValueError("give the origins of both sets or of none")
    a, b = rotations_a.double(), rotations_b.to(rotations_a.device).double()
    group = (torch.eye(3)[None] if group is None else group).to(a)
    found = []
    for flipped, poses in ((False, b), (True, mirror_poses(b))):
        relative = poses.mT @ a
        start = _consensus(relative, group)
        mean = _robust_mean(nearest_copies(relative, start, group), start)
        found.append((float(_votes(mean[None], relative, group)), flipped, poses @ mean, mean))
    _, flipped, there, mean = max(found, key=lambda entry: entry[0])
    a = nearest_copies(a, there, group)
    angles = geodesic_distance_deg(a, there)
    some = _spread(len(a), _N_TURNS)
    turned = commonest_turn(there[some].mT @ a[some])
    shift = left = None
    if offsets_a_angst is not None and offsets_b_angst is not None:
        differences = offsets_a_angst.to(a) - offsets_b_angst.to(a)
        trusted = (1 + (angles / _SCALE_RANGE_DEG[1]) ** 2) ** -2
        shift = _common_shift(a, differences, trusted)
        left = differences - a[:, :2, :] @ shift
    return PoseComparison(mean.T, flipped, angles, shift, left, turned)
