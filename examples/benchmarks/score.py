"""Judge maps and poses of one stack against its truth, side by side.

    python examples/benchmarks/score.py STACK NAME=MAP.mrc,PARTICLES.star ...

STACK holds the true map.mrc and particles.star. Every map is aligned to the truth (rotation,
shift, hand) and masked by one soft sphere, 0.8 of the box wide, before the FSC; poses are
compared after one global alignment. Prints a table of the runs and one of the shells.
"""

import argparse
from pathlib import Path

import torch

from cryorecon.io.mrc import read_map
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve, resolution_at
from cryorecon.physics.masks import soft_ball
from cryorecon.run.compare_poses import compare_pose_files


def score(stack: Path, map_path: Path, star: Path) -> dict:
    """FSC by shell, crossings in angstrom, and pose errors of one run."""
    source = read_map(stack / "map.mrc")
    truth, pixel = torch.from_numpy(source.data), source.pixel_size_angst
    found = torch.from_numpy(read_map(map_path).data)
    box = len(truth)
    mask = soft_ball(box, 0.4 * box, 0.07 * box, 3)
    moved = apply_alignment(found, align_maps(found, truth, pixel))
    curve = fsc_curve(moved * mask, truth * mask)
    poses = compare_pose_files(star, stack / "particles.star")
    return {
        "fsc_0.5_angst": resolution_at(curve, 0.5, box, pixel),
        "fsc_0.143_angst": resolution_at(curve, 0.143, box, pixel),
        "median_deg": poses.median_deg,
        "mean_deg": poses.mean_deg,
        "within_5_deg": poses.fraction_within(5.0),
        "median_offset_angst": poses.median_offset_angst,
        "fsc": [float(value) for value in curve],
    }


def print_scores(scores: dict[str, dict]) -> None:
    """Tables of the runs and of the shells."""
    print("| run | FSC 0.5 (A) | FSC 0.143 (A) | median deg | mean deg | within 5 deg | median A |")
    print("|---|---|---|---|---|---|---|")
    for name, s in scores.items():
        print(
            f"| {name} | {s['fsc_0.5_angst']:.2f} | {s['fsc_0.143_angst']:.2f} | "
            f"{s['median_deg']:.2f} | {s['mean_deg']:.2f} | {100 * s['within_5_deg']:.1f} % | "
            f"{s['median_offset_angst']:.2f} |"
        )
    print("\n| shell | " + " | ".join(scores) + " |")
    print("|---|" + "---|" * len(scores))
    for shell in range(1, len(next(iter(scores.values()))["fsc"])):
        row = " | ".join(f"{s['fsc'][shell]:.3f}" for s in scores.values())
        print(f"| {shell} | {row} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=MAP,STAR")
    args = parser.parse_args()
    scores = {}
    for run in args.runs:
        name, _, files = run.partition("=")
        map_path, _, star = files.partition(",")
        scores[name] = score(args.stack, Path(map_path), Path(star))
    print_scores(scores)


if __name__ == "__main__":
    main()
