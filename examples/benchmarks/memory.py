"""Peak memory of `cryorecon abinitio` as the number of particles grows.

    python examples/benchmarks/memory.py STACK OUT [--counts 2000 20000]

STACK/blind.star is repeated until it has as many rows as asked for, so that the disk holds any
number; each count runs with `--images disk` and `--images memory`, one start and two rounds.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from measure import timed

from cryorecon.io.star import read_star, write_star


def repeated(stack: Path, count: int) -> Path:
    """A STAR file of `count` rows beside the stack."""
    path = stack / f"blind_{count}.star"
    tables = read_star(stack / "blind.star")
    particles = tables["particles"]
    copies = -(-count // len(particles))
    tables["particles"] = pd.concat([particles] * copies, ignore_index=True)[:count]
    write_star(path, tables)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[2000, 20000])
    args = parser.parse_args()
    print("| particles | images | wall s | CPU s | peak MB |\n|---|---|---|---|---|")
    for count in args.counts:
        star = repeated(args.stack, count)
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
