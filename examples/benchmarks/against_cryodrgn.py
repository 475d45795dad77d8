"""Engine amortized beside cryoDRGN 4.3.1's ab initio (`cryodrgn abinit --zdim 0`), on one stack.

    python examples/benchmarks/against_cryodrgn.py STACK OUT [--limit-s 1800] [--shift-px 4]

cryoDRGN is installed into OUT/env, an environment of its own, unless --cryodrgn names it. It stops
at the limit; what it has done by then is told: epochs, images searched, and its last map and poses
against the truth. Both run with one thread, one after the other.
"""

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from measure import timed

VERSION = "cryodrgn==4.3.1"


def installed(folder: Path) -> Path:
    """cryoDRGN's command in a fresh environment."""
    command = folder / "bin" / "cryodrgn"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in ("torch", VERSION):
            subprocess.run([str(folder / "bin" / "pip"), "install", "-q", package], check=True)
    return command


def run_cryodrgn(command: Path, stack: Path, output: Path, args) -> dict:
    """Its ab initio reconstruction of the stack, up to the limit."""
    ctf = output / "ctf.pkl"
    star = str(stack / "particles.star")
    parse = [str(command), "parse_ctf_star", star, "-o", str(ctf), "--ps", "0"]
    subprocess.run(parse, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    words = [str(command), "abinit", star, "--datadir", str(stack), "--ctf", str(ctf)]
    words += ["--zdim", "0", "-o", str(output / "cryodrgn"), "--log-interval", "100"]
    words += ["--t-extent", str(args.shift_px), "--checkpoint", "1", "--no-amp"]
    words += ["--no-analysis", "--num-workers", "0", "--max-threads", "1"]
    return timed(words, output / "cryodrgn.json", args.limit_s)


def cryodrgn_poses(pickled: Path) -> list[np.ndarray]:
    """Rotation matrices, which are RELION's, of a pose file."""
    with open(pickled, "rb") as file:
        found = pickle.load(file)
    return found[0] if isinstance(found, tuple) else found


def judge_cryodrgn(stack: Path, folder: Path) -> dict:
    """Its latest poses against the truth."""
    import torch

    from cryorecon.conventions import euler_to_matrix
    from cryorecon.io.particles import read_particles
    from cryorecon.maps.poses import compare_pose_sets

    files = sorted(folder.glob("pose.*.pkl"), key=lambda p: int(p.stem.split(".")[1]))
    if not files:
        return {}
    truth = euler_to_matrix(torch.from_numpy(read_particles(stack / "particles.star").euler_deg()))
    found = torch.as_tensor(cryodrgn_poses(files[-1])).double()
    errors = compare_pose_sets(found, truth)
    return {
        "poses": files[-1].name,
        "median_deg": errors.median_deg,
        "within_10_deg": errors.fraction_within(10.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--limit-s", type=float, default=1800)
    parser.add_argument("--shift-px", type=float, default=4.0)
    parser.add_argument("--cryodrgn", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    job = args.output / "ours"
    ours = [sys.executable, "-m", "cryorecon", "abinitio-amortized", str(args.stack / "blind.star")]
    cost = timed([*ours, "-o", str(job), "--overwrite"], args.output / "ours.json")
    command = args.cryodrgn or installed(args.output / "env")
    peer = run_cryodrgn(command, args.stack, args.output, args)
    from score import score  # loads torch, see measure.timed

    found = score(args.stack, job / "initial_model.mrc", job / "run_data.star")
    print(json.dumps({"run": "cryorecon", **cost, **{k: found[k] for k in found if k != "fsc"}}))
    log = (args.output / "cryodrgn.log").read_text()
    told = re.findall(r"# \[Train Epoch: (\d+/\d+)\] \[(\d+/\d+) particles\]", log)
    print(json.dumps({"run": VERSION, **peer, "epoch, particles": told[-1:]}))
    print(json.dumps(judge_cryodrgn(args.stack, args.output / "cryodrgn")))
    maps = sorted((args.output / "cryodrgn").glob("*.mrc"), key=lambda p: p.stat().st_mtime)
    if maps:
        found = score(args.stack, maps[-1], args.stack / "particles.star")
        print(json.dumps({"map": maps[-1].name, "fsc_0.5_angst": found["fsc_0.5_angst"]}))


if __name__ == "__main__":
    main()
