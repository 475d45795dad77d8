"""cryorecon beside RELION 3.1 on one stack, one after the other on the same machine.

    python examples/benchmarks/make_relion_stack.py STACK
    python examples/benchmarks/against_relion.py STACK OUT [--schedules short default] [--refine]

Ours: `cryorecon abinitio` with its defaults. RELION: an initial model (`relion_refine --sgd
--denovo_3dref`) in its default schedule (50 + 200 + 50 iterations, mini-batches of 100 to 500) and
in a short one (25 + 50 + 25, 100 to 200), one class, 25 to 8 A, HEALPix order 1 + oversampling 1,
offsets +-2 px, 2 threads. Both are told the particle's diameter. `--refine` lets RELION's
gold-standard refinement follow each initial model (MPI, one process a half set and an idle
leader), stopped after an hour.

Every run reads STACK/blind.star, which has no poses. Steps that are on record are not run again.
"""

import argparse
import sys
from pathlib import Path

from measure import timed
from peer_relion import SCHEDULES, initial_model, last, refinement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--diameter", type=float, default=70.0, help="angstrom")
    parser.add_argument("--refine", action="store_true")
    args = parser.parse_args()
    star, out = args.stack / "blind.star", args.output
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cryorecon", "abinitio", str(star), "-o", str(out / "ours")]
    command += ["--diameter", f"{args.diameter:g}", "--overwrite"]
    costs = {"ours": timed(command, out / "ours.json")}
    files = {"ours": (out / "ours" / "initial_model.mrc", out / "ours" / "run_data.star")}
    for name in args.schedules:
        command = initial_model(star, out, name, args.diameter)
        costs[f"relion {name}"] = timed(command, out / f"{name}.json")
        model = last(out, name, "class001.mrc")
        files[f"relion {name}"] = (model, last(out, name, "data.star"))
        if args.refine:
            refined = f"{name}_refined"
            command = refinement(star, model, out, refined, args.diameter)
            costs[f"relion {name}, refined"] = timed(command, out / f"{refined}.json", 3600)
            files[f"relion {name}, refined"] = refined_files(out, refined)
    from score import print_scores, score  # loads torch, see measure.timed

    print("| run | wall s | CPU s | peak MB | finished |\n|---|---|---|---|---|")
    for name, cost in costs.items():
        numbers = f"{cost['wall_s']:.0f} | {cost['cpu_s']:.0f} | {cost['peak_mb']}"
        print(f"| {name} | {numbers} | {'yes' if cost['finished'] else 'no'} |")
    print_scores({name: score(args.stack, *pair) for name, pair in files.items()})


def refined_files(out: Path, name: str) -> tuple[Path, Path]:
    """Map and particles of a refinement: the joint ones where it finished, else half set 1."""
    joint = out / f"{name}_class001.mrc"
    if joint.exists():
        return joint, out / f"{name}_data.star"
    return last(out, name, "half1_class001.mrc"), last(out, name, "data.star")


if __name__ == "__main__":
    main()
