"""What agreement is worth, and which agreed map is best: the tables of docs/consensus.md.

    python examples/benchmarks/consensus.py unlike A.mrc B.mrc
    python examples/benchmarks/consensus.py agreed particles.star map.mrc JOB_A JOB_B

`unlike` aligns maps that have nothing in common (A, B, 32 px, and random blobs). `agreed` takes two
jobs of a simulated stack (particles.star with the true poses) and judges maps against the truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from cryorecon.conventions import euler_to_matrix
from cryorecon.engines.reconstruction import Reconstruction
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.engines.rounds import refine_round
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.maps.agreement import (
    map_agreement,
    mean_map,
    mean_rotations,
    moved_poses,
)
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.chance import beyond_chance, chance_fsc
from cryorecon.maps.fsc import crossing_shell, fsc_curve, resolution_at
from cryorecon.maps.poses import compare_pose_sets
from cryorecon.physics.fourier import lowpass, radius_grid
from cryorecon.physics.masks import Support
from cryorecon.physics.rotations import geodesic_distance_deg
from cryorecon.run.consensus.inputs import common_rows, half_sets_match, read_candidates
from cryorecon.run.load import load_observations

_DIAMETER = 0.8


def blob(seed: int, box: int) -> Tensor:
    """Random detail inside a random compact shape, a tenth of the box's voxels."""
    generator = torch.Generator().manual_seed(seed)
    detail = torch.randn(box, box, box, generator=generator)
    torch.randn(box, box, box, generator=generator)
    rough = torch.randn(box, box, box, generator=generator)
    near = radius_grid(box, 3)
    shape = lowpass(rough * (near < 0.344 * box), 2.5, 3)
    inside = (shape > shape.flatten().quantile(0.9)) & (near < 0.375 * box)
    return lowpass(inside.float() * detail.abs(), 0.344 * box, 3)


def unlike(first: Path, second: Path) -> None:
    """Cycles per diameter to which unlike maps agree, before and after chance is taken out."""
    source = read_map(first)
    a, b = torch.from_numpy(source.data), torch.from_numpy(read_map(second).data)
    box, pixel = len(a), source.pixel_size_angst
    mask = Support(_DIAMETER / 2).on(box)
    chance = chance_fsc(a, a, mask, pixel, torch.Generator().manual_seed(0))
    pairs = {"B, A": (b, a), "B, blob 4": (b, blob(4, box))}
    pairs |= {f"blob {s}, A": (blob(s, box), a) for s in (1, 2, 3)}
    pairs |= {f"blobs {s}, {s + 10}": (blob(s, box), blob(s + 10, box)) for s in (1, 2, 3)}
    print("maps, FSC 0.143 and 0.5 as it is, 0.143 and 0.5 with chance out (cycles per diameter)")
    for name, (moving, fixed) in pairs.items():
        moved = apply_alignment(moving, align_maps(moving, fixed, pixel))
        plain = fsc_curve(moved, fixed, mask)
        curves = plain, beyond_chance(plain, chance)
        found = [_DIAMETER * crossing_shell(c, t) for c in curves for t in (0.143, 0.5)]
        print(name, *(f"{value:.2f}" for value in found), flush=True)


def agreed(star: Path, truth_path: Path, paths: list[Path], project: Path | None) -> None:
    """FSC against the truth of both jobs' maps, their mean, and maps made of their poses."""
    (one, two), _ = read_candidates(paths)
    pixel, box = one.pixel_size_angst, one.box
    mask = Support(_DIAMETER / 2).on(box)
    none = torch.zeros(box // 2 + 1, dtype=torch.float64)
    crossed = half_sets_match(one, two)
    found = map_agreement(two.volumes, one.volumes, mask, pixel, none, crossed=crossed)
    truth = torch.from_numpy(read_map(truth_path).data)
    placed = align_maps(one.volumes.joint, truth, pixel)
    particles = read_particles(star, project)
    true = euler_to_matrix(torch.from_numpy(particles.euler_deg()))
    images = load_observations(particles, _DIAMETER)
    both = common_rows(one, two)
    if both is None or both[0].half_sets is None:
        raise SystemExit("both jobs need run_data.star with half sets")
    half = torch.from_numpy(both[0].half_sets).long() - 1
    a, a_origins = both[0].rotations, both[0].origins_angst
    if a_origins is None or both[1].origins_angst is None:
        raise SystemExit("both jobs' run_data.star need origins")
    b, b_origins = moved_poses(both[1].rotations, both[1].origins_angst, found.alignment, pixel)
    same = geodesic_distance_deg(b, a) <= 5

    def judge(name: str, volume: Tensor) -> None:
        curve = fsc_curve(apply_alignment(volume, placed), truth, mask)
        angst = resolution_at(curve, 0.5, box, pixel)
        print(f"{name}: FSC 0.5 {angst:.3f} A, mean {float(curve[1 : box // 2].mean()):.4f}")

    def anew(name: str, poses: Tensor, origins: Tensor, rows: Tensor) -> None:
        start = [one.volumes.joint, one.volumes.joint]
        at = poses[rows].float(), (origins[rows] / pixel).float()
        state = Reconstruction(*at, half[rows], start, box / 2 - 1.0, Support(_DIAMETER / 2))
        for joint in (False, True):
            refine_round(state, images.apart(rows), RmfnConfig(), fsc_curve, joint=joint, n_steps=0)
        error = compare_pose_sets(poses[rows], true[rows]).median_deg
        judge(f"{name} ({len(rows)} images, {error:.3f} deg)", state.maps[0])

    print(f"half sets crossed: {crossed}; {float(same.double().mean()):.1%} within 5 degrees")
    judge("first map", one.volumes.joint)
    judge("second map", found.moved.joint)
    judge("mean", mean_map([one.volumes.joint, found.moved.joint]))
    mean, mean_origins = mean_rotations([a, b]), (a_origins + b_origins) / 2
    everyone, agreeing = torch.arange(len(a)), torch.nonzero(same)[:, 0]
    anew("first poses", a, a_origins, everyone)
    anew("first poses, agreed", a, a_origins, agreeing)
    anew("second poses", b, b_origins, everyone)
    anew("mean poses, agreed", mean, mean_origins, agreeing)
    mixed = torch.where(same[:, None, None], mean, a)
    anew("mean, else first", mixed, torch.where(same[:, None], mean_origins, a_origins), everyone)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["unlike", "agreed"])
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--project", type=Path)
    given = parser.parse_args()
    if given.what == "unlike":
        unlike(*given.paths)
    else:
        agreed(given.paths[0], given.paths[1], given.paths[2:], given.project)
