"""Symmetric particles from random poses: are the axes found, and what do they buy?

    python examples/benchmarks/symmetric.py OUT [--groups C3 D2 T O I] [--n 1000] [--snr 0.1]

Adenylate kinase, turned by a point group about a centre outside itself, in a box of 48 px that it
fills to 0.7; `cryorecon abinitio --symmetry GROUP --diameter ...` from a STAR file without poses.
One row a group: what the log says of turned copies, FSC 0.5 of the C1 map and of the symmetric one
against the truth, and the median pose error, of each image's nearest equivalent pose.
"""

import argparse
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import torch
from blind import write_blind
from measure import timed

from cryorecon.conventions import euler_to_matrix
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.particles import read_particles
from cryorecon.maps.align import Alignment, align_maps, apply_alignment, rotate_map
from cryorecon.maps.fsc import fsc_curve, resolution_at
from cryorecon.maps.poses import mirror_poses, rotate_poses
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.rotations import exp_map, geodesic_distance_deg
from cryorecon.physics.symmetry import symmetry_group

BOX, FILLED, SNR = 48, 0.7, 0.1
# Distance of the protein from the centre, where copies just touch, and its own radius, in angstrom.
AWAY_ANGST, REACH_ANGST = {3: 26.0, 4: 30.0, 12: 50.0, 24: 68.0, 60: 105.0}, 33.0


def cryorecon(*words: object) -> None:
    command = [sys.executable, "-m", "cryorecon", *map(str, words)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def symmetric_map(group: torch.Tensor, folder: Path) -> Path:
    """Copies of the built-in protein about the group's axes."""
    alone = folder / "one"
    away = AWAY_ANGST[len(group)]
    pixel = 2 * (away + REACH_ANGST) / (FILLED * BOX)
    model = files("cryorecon") / "data/4ake_chain_a_heavy.pdb"
    cryorecon("simulate", model, "-o", alone, "--n", 1, "--box", BOX, "--pixel-size",
              f"{pixel:.3f}", "--overwrite")  # fmt: skip
    protein = torch.from_numpy(read_map(alone / "map.mrc").data)
    place = torch.nn.functional.normalize(
        torch.tensor([0.75, 0.35, 0.56 * (len(group) != 3)]), dim=0
    )
    turn = exp_map(torch.tensor([0.4, -0.2, 0.9]))
    moved = rotate_map(protein, turn, place * (away / pixel))
    whole = torch.stack([rotate_map(moved, rotation.to(moved)) for rotation in group]).sum(0)
    path = folder / "map.mrc"
    write_map(path, whole.numpy(), round(pixel, 3))
    return path


def judged(path: Path, truth: torch.Tensor, pixel: float) -> tuple[float, Alignment]:
    """FSC 0.5 in angstrom, and how the map was moved onto the truth."""
    found = torch.from_numpy(read_map(path).data)
    moved = align_maps(found, truth, pixel)
    mask = soft_ball(BOX, 0.45 * BOX, 0.07 * BOX, 3)
    curve = fsc_curve(apply_alignment(found, moved) * mask, truth * mask)
    return resolution_at(curve, 0.5, BOX, pixel), moved


def row(name: str, folder: Path, n: int, snr: float) -> str:
    """Simulate, reconstruct and judge one group."""
    group = symmetry_group(name).float()
    diameter = 2 * (AWAY_ANGST[len(group)] + REACH_ANGST)
    stack, job = folder / "stack", folder / "job"
    folder.mkdir(parents=True, exist_ok=True)
    cryorecon("simulate", symmetric_map(group, folder), "-o", stack, "--n", n, "--snr", snr,
              "--overwrite")  # fmt: skip
    write_blind(stack / "particles.star", stack / "blind.star")
    command = [sys.executable, "-m", "cryorecon", "abinitio", str(stack / "blind.star"), "-o",
               str(job), "--symmetry", name, "--diameter", str(diameter),
               "--overwrite"]  # fmt: skip
    cost = timed(command, folder / "cost.json")
    log = (job / "run.log").read_text()
    said = re.search(rf"{name}: turned copies of the map correlate (\S+)", log)
    given = read_map(stack / "map.mrc")
    truth, pixel = torch.from_numpy(given.data), given.pixel_size_angst
    plain, _ = judged(job / "initial_model_C1.mrc", truth, pixel)
    final, moved = judged(job / "initial_model.mrc", truth, pixel)
    cells = (name, len(group), said[1] if said else "-", f"{plain:.1f}", f"{final:.1f}",
             f"{pose_error(job, stack, group, moved):.2f}", f"{cost['cpu_s']:.0f}")  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def pose_error(job: Path, stack: Path, group: torch.Tensor, moved: Alignment) -> float:
    """Median distance to the nearest of the equivalent poses, in degrees."""
    found, truth = (
        euler_to_matrix(torch.from_numpy(read_particles(path).euler_deg())).float()
        for path in (job / "run_data.star", stack / "particles.star")
    )
    if moved.flipped:
        found = mirror_poses(found)
    turned = rotate_poses(found, moved.rotation)
    apart = geodesic_distance_deg(turned[:, None] @ group, truth[:, None])
    return float(apart.amin(1).median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--groups", nargs="+", default=["C3", "D2", "T", "O", "I"])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--snr", type=float, default=SNR)
    args = parser.parse_args()
    columns = ("group", "copies", "turned copies correlate", "C1 map, FSC 0.5 (A)",
               "symmetric map (A)", "median deg", "CPU s")  # fmt: skip
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    for name in args.groups:
        print(row(name, args.output / name, args.n, args.snr), flush=True)


if __name__ == "__main__":
    main()
