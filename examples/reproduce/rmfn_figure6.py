"""Figure 6 of Shekarforoush et al. 2022: poses from 45-90 degrees off, coarse to fine or not.

    python examples/reproduce/rmfn_figure6.py OUT [--full] [--model MODEL] [--pixel-size A]

Simulates particles of 4AKE (or MODEL), runs the published protocol coarse to fine and with all
epochs at the full scale from scratch, and compares the poses with the truth. Small by default:
1,000 images of 32 px, bands of 3, 7 and 15 cycles per box, the first of which is the paper's;
`--n 2000 --box 64` takes the paper's box, `--full` its 50,000 images too. An image has as much
signal in all over its noise as one of the paper's: SNR 0.1 at 64 px, 0.4 at 32. Poses of as many
images move at a time as keep the paper's 83 turns an epoch. Histograms are OUT/*/pose_errors.png.
"""

import argparse
import json
import math
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from cryorecon.maps.poses import FRACTION_LIMITS_DEG
from cryorecon.run.compare_poses import compare_pose_files

# Mini-batches of 600 images in an epoch of the paper's 50,000.
TURNS = 83
# Of the paper's 64 px.
SNR = 0.1


def cryorecon(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "cryorecon", *map(str, words)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--model", default=str(files("cryorecon") / "data/4ake_chain_a_heavy.pdb"))
    parser.add_argument("--pixel-size", type=float, help="angstrom at 64 px; default 1.2")
    parser.add_argument("--stages", default="25,25,50", help="epochs a scale; 1OL5: 15,15,70")
    parser.add_argument("--n", type=int, default=1_000)
    parser.add_argument("--box", type=int, default=32)
    args = parser.parse_args()
    box, n = (64, 50_000) if args.full else (args.box, args.n)
    settings = [] if args.full else ["--set", f"pose_batch={math.ceil(n / TURNS)}"]
    settings += ["--set", "coarsest=3"] if box < 64 else []
    pixel = (args.pixel_size or 1.2) * 64 / box
    stack = args.output / "stack"
    if not (stack / "particles.star").exists():
        cryorecon("simulate", args.model, "-o", stack, "--n", n, "--box", box,
                  "--pixel-size", pixel, "--snr", SNR * (64 / box) ** 2)  # fmt: skip
    stages = [int(count) for count in args.stages.split(",")]
    runs = {"coarse_to_fine": stages, "full_scale": [0, 0, sum(stages)]}
    for name, epochs in runs.items():
        job = args.output / name
        if not (job / "RELION_JOB_EXIT_SUCCESS").exists():
            cryorecon("abinitio-rmfn", stack / "particles.star", "-o", job, "--init", "perturbed",
                      "--set", f"epochs={epochs}", *settings, "--overwrite")  # fmt: skip
        found = compare_pose_files(job / "run_data.star", stack / "particles.star")
        within = {f"{limit:g}": found.fraction_within(limit) for limit in FRACTION_LIMITS_DEG}
        print(json.dumps({"run": name, "median_deg": found.median_deg, "within_deg": within}))


if __name__ == "__main__":
    main()
