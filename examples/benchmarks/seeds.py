"""Run `cryorecon abinitio` from several seeds on one stack and judge each run against the truth.

    python examples/benchmarks/seeds.py STACK OUT [--seeds 0 1 2 3 4]
        [--options "--method amortized"]

Reads STACK/blind.star, which has no poses; STACK/particles.star and STACK/map.mrc are opened when
all runs are done. One row a seed: wall and CPU seconds, peak memory, resolution, pose error.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from measure import timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--options", default="", help="of cryorecon abinitio, in quotes")
    args = parser.parse_args()
    costs = {}
    for seed in args.seeds:
        job = args.output / f"seed{seed}"
        command = [sys.executable, "-m", "cryorecon", "abinitio", str(args.stack / "blind.star")]
        command += ["-o", str(job), "--seed", str(seed), "--overwrite", *shlex.split(args.options)]
        costs[seed] = timed(command, args.output / f"seed{seed}.json")
    # These load torch, see measure.timed.
    from score import score

    from cryorecon.run.compare_poses import compare_pose_files

    print(
        "| seed | wall s | CPU s | peak MB | FSC 0.5 (A) | FSC 0.143 (A) | median deg | median A | "
        "read by the encoder, median deg |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for seed, cost in costs.items():
        job = args.output / f"seed{seed}"
        found = score(args.stack, job / "initial_model.mrc", job / "run_data.star")
        read = job / "encoder_data.star"
        if read.exists():
            found["read_deg"] = compare_pose_files(read, args.stack / "particles.star").median_deg
        (args.output / f"seed{seed}_score.json").write_text(json.dumps(found))
        print(
            f"| {seed} | {cost['wall_s']:.0f} | {cost['cpu_s']:.0f} | {cost['peak_mb']} | "
            f"{found['fsc_0.5_angst']:.2f} | {found['fsc_0.143_angst']:.2f} | "
            f"{found['median_deg']:.2f} | {found['median_offset_angst']:.2f} | "
            f"{found.get('read_deg', float('nan')):.2f} |"
        )


if __name__ == "__main__":
    main()
