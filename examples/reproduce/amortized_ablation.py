"""Figure 5 and table S1 of Levy et al. 2022: what each part of the amortized engine is worth.

    python examples/reproduce/amortized_ablation.py OUT [--full] [--seeds 0 1 2] [--only NAME ...]

Simulates particles of 4AKE at SNR 0 dB with shifts, trains with one part changed at a time, from
several seeds, and judges the encoder's poses (no refinement) and the map: median pose error, share
of images within 10 degrees, and whether the map has a mirror plane that the molecule lacks. Small
by default: 2,000 images of 32 px, 40,000 seen in training; `--full` takes 10,000 images of 64 px, a
million seen, the paper's encoder and networks 256 wide, which wants a GPU (--device cuda).
Finished runs are kept in OUT/*.json and not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch

from cryorecon.conventions import euler_to_matrix
from cryorecon.engines.amortized import Amortized, AmortizedConfig
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.maps.mirror import mirror_score
from cryorecon.maps.poses import compare_pose_sets
from cryorecon.run.load import load_observations

PLAIN = {"symmetric": False, "heads": 1}
VARIANTS: dict[str, dict] = {
    "default": {},
    "no reverse task": {"reverse": 0.0},
    "reverse task at half weight": {"reverse": 0.5},
    "reverse task at quarter weight": {"reverse": 0.25},
    "one guess": PLAIN,
    "one guess, no reverse task": {**PLAIN, "reverse": 0.0},
    "symmetric loss alone": {"heads": 1},
    "symmetric loss alone, no reverse task": {"heads": 1, "reverse": 0.0},
    "heads alone": {"symmetric": False},
    "heads alone, no reverse task": {"symmetric": False, "reverse": 0.0},
    "squared error": {"loss": "l2"},
    "images not multiplied by CTF": {"reweighted": False},
    "convolutional encoder": {"encoder": "small"},
    "decoder log-grid": {"decoder": "log-grid"},
    "decoder rmfn": {"decoder": "rmfn", "decoder_rate": 1e-2},
    "decoder fouriernet": {"decoder": "fouriernet", "decoder_rate": 1e-3},
    "decoder siren": {"decoder": "siren", "decoder_rate": 1e-3},
    "decoder positional": {"decoder": "positional", "decoder_rate": 1e-3},
}


def simulated(folder: Path, n: int, box: int) -> Path:
    """A stack of 4AKE in a box 76.8 A wide."""
    model = files("cryorecon") / "data" / "4ake_chain_a_heavy.pdb"
    if not (folder / "particles.star").exists():
        command = [sys.executable, "-m", "cryorecon", "simulate", str(model), "-o", str(folder)]
        command += ["--n", str(n), "--box", str(box), "--pixel-size", str(76.8 / box)]
        command += ["--snr", "1", "--offset-range", "5", "--seed", "3"]
        subprocess.run(command, check=True)
    return folder


def judged(stack: Path, config: AmortizedConfig, seed: int, device: str) -> dict:
    """Train once and compare with the truth."""
    particles = read_particles(stack / "particles.star")
    images = load_observations(particles, config.diameter, device=device)
    generator = torch.Generator().manual_seed(seed)
    start = time.monotonic()
    run = Amortized(config, images, particles.pixel_size_angst, generator)
    while run.seen < config.images_seen:
        run.step()
    seconds = time.monotonic() - start
    rows = torch.arange(len(images)).split(500)
    found = torch.cat([run.read_poses(images, part)[0] for part in rows])
    errors = compare_pose_sets(
        found.double(), euler_to_matrix(torch.from_numpy(particles.euler_deg()))
    )
    return {
        "median_deg": errors.median_deg,
        "within_10_deg": errors.fraction_within(10.0),
        "mirror": mirror_score(run.volume()),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    n, box, seen = (10_000, 64, 1_000_000) if args.full else (2000, 32, 40_000)
    base = AmortizedConfig(images_seen=seen, width=256 if args.full else 64)
    if args.full:
        base = replace(base, encoder="paper")
    stack = simulated(args.output / "stack", n, box)
    own = mirror_score(torch.from_numpy(read_map(stack / "map.mrc").data))
    limit = (1 + own) / 2
    print(f"mirror score of the molecule {own:.2f}; above {limit:.2f} counts as a plane\n")
    print("| changed | median deg, by seed | within 10 deg | mirror planes | s a run |")
    print("|---|---|---|---|---|")
    for name in args.only:
        runs = []
        for seed in args.seeds:
            record = args.output / f"{name.replace(' ', '_').replace(',', '')}_{seed}.json"
            if not record.exists():
                found = judged(stack, replace(base, **VARIANTS[name]), seed, args.device)
                record.write_text(json.dumps(found))
            runs.append(json.loads(record.read_text()))
        medians = ", ".join(f"{run['median_deg']:.1f}" for run in runs)
        share = statistics.mean(run["within_10_deg"] for run in runs)
        planes = sum(run["mirror"] > limit for run in runs)
        seconds = statistics.median(run["seconds"] for run in runs)
        print(
            f"| {name} | {medians} | {100 * share:.0f} % | {planes} of {len(runs)} | "
            f"{seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
