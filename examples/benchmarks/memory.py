"""Peak memory of `cryorecon abinitio` as the number of particles grows.

    python examples/benchmarks/memory.py STACK OUT [--counts 2000 20000]

The images of STACK/blind.star are repeated, each row with a defocus, coordinates and micrograph of
its own, so that the disk holds any number; each count runs with `--images disk` and
`--images memory`, one start and two rounds.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from measure import timed

from cryorecon.io.star import read_star, write_star


def distinct(stack: Path, count: int) -> Path:
    """A STAR file of `count` rows beside the stack: images repeat, their metadata do not."""
    path = stack / f"distinct_{count}.star"
    tables = read_star(stack / "blind.star")
    particles = tables["particles"]
    random = np.random.default_rng(0)

    def pieces() -> Iterator[pd.DataFrame]:
        for start in range(0, count, len(particles)):
            piece = particles[: count - start].copy()
            for column in ("rlnDefocusU", "rlnDefocusV"):
                nearby = particles[column].astype(float)[: len(piece)]
                piece[column] = nearby + random.uniform(-100, 100, len(piece))
            piece["rlnDefocusAngle"] = random.uniform(0, 180, len(piece))
            for axis in "XY":
                piece[f"rlnCoordinate{axis}"] = random.uniform(0, 4096, len(piece))
            row = np.arange(start, start + len(piece))
            piece["rlnMicrographName"] = [f"MotionCorr/job002/mic_{i // 200:06d}.mrc" for i in row]
            yield piece

    write_star(path, {**tables, "particles": pieces()})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[2000, 20000])
    args = parser.parse_args()
    print("| particles | images | wall s | CPU s | peak MB |\n|---|---|---|---|---|")
    for count in args.counts:
        star = distinct(args.stack, count)
        for images in ("disk", "memory"):
            name = f"{count}_{images}"
            command = [sys.executable, "-m", "cryorecon", "abinitio", str(star), "--overwrite"]
            command += ["-o", str(args.output / name), "--images", images, "--starts", "1"]
            for setting in ("half_rounds=1", "joint_rounds=1", "final_steps=2"):
                command += ["--set", setting]
            cost = timed(command, args.output / f"{name}.json")
            numbers = f"{cost['wall_s']:.0f} | {cost['cpu_s']:.0f} | {cost['peak_mb']}"
            print(f"| {count} | {images} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
