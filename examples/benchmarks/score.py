"""Judge maps and poses of one stack against its truth, side by side.

    python examples/benchmarks/score.py STACK NAME=MAP.mrc[,PARTICLES.star] ... [--json]
        [--mask-band 7]

STACK holds the true map.mrc and particles.star. Every map is aligned to the truth (rotation,
shift, hand) and masked by one soft sphere, 0.8 of the box wide, before the FSC; poses are
compared after one global alignment, of the images that are in both files. With --mask-band every
map wears a mask around its own molecule, low-passed to so many cycles per box. Prints a table of
the runs and one of the shells.
"""

import argparse
import json
from pathlib import Path

import torch

from cryorecon.io.mrc import read_map
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve, resolution_at
from cryorecon.physics.masks import molecule_mask, soft_ball
from cryorecon.run.compare_poses import compare_pose_files


def score(stack: Path, map_path: Path, star: Path | None, mask_band: float = 0.0) -> dict:
    """FSC by shell, crossings in angstrom, and pose errors of one run.

    With a `mask_band` the map wears a mask around its own molecule, as it stands out at so many
    cycles per box.
    """
    source = read_map(stack / "map.mrc")
    truth, pixel = torch.from_numpy(source.data), source.pixel_size_angst
    found = torch.from_numpy(read_map(map_path).data)
    box = len(truth)
    mask = soft_ball(box, 0.4 * box, 0.07 * box, 3)
    worn = molecule_mask(found, mask_band) if mask_band > 0 else 1.0
    moved = apply_alignment(found * worn, align_maps(found, truth, pixel))
    curve = fsc_curve(moved * mask, truth * mask)
    result = {
        "fsc_0.5_angst": resolution_at(curve, 0.5, box, pixel),
        "fsc_0.143_angst": resolution_at(curve, 0.143, box, pixel),
        "fsc": [float(value) for value in curve],
    }
    return result | (pose_errors(star, stack / "particles.star") if star else {})


def pose_errors(star: Path, truth: Path) -> dict:
    poses = compare_pose_files(star, truth, common_only=True)
    return {
        "images_with_poses": len(poses.angles_deg),
        "median_deg": poses.median_deg,
        "mean_deg": poses.mean_deg,
        "within_5_deg": poses.fraction_within(5.0),
        "median_offset_angst": poses.median_offset_angst,
    }


def print_scores(scores: dict[str, dict]) -> None:
    """Tables of the runs and of the shells."""
    columns = {
        "fsc_0.5_angst": "FSC 0.5 (A)",
        "fsc_0.143_angst": "FSC 0.143 (A)",
        "median_deg": "median deg",
        "mean_deg": "mean deg",
        "within_5_deg": "within 5 deg",
        "median_offset_angst": "median A",
    }
    print("| run | " + " | ".join(columns.values()) + " |\n|---" + "|---" * len(columns) + "|")
    for name, s in scores.items():
        told = (s.get(column) for column in columns)
        print(f"| {name} | " + " | ".join("-" if t is None else f"{t:.3g}" for t in told) + " |")
    print("\n| shell | " + " | ".join(scores) + " |")
    print("|---|" + "---|" * len(scores))
    for shell in range(1, len(next(iter(scores.values()))["fsc"])):
        row = " | ".join(f"{s['fsc'][shell]:.3f}" for s in scores.values())
        print(f"| {shell} | {row} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=MAP[,STAR]")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mask-band", type=float, default=0.0, help="cycles per box; 0: no mask")
    args = parser.parse_args()
    scores = {}
    for run in args.runs:
        name, _, files = run.partition("=")
        map_path, _, star = files.partition(",")
        given = Path(star) if star else None
        scores[name] = score(args.stack, Path(map_path), given, args.mask_band)
    if args.json:
        print(json.dumps(scores))
    else:
        print_scores(scores)


if __name__ == "__main__":
    main()
