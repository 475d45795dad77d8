"""Leave the poses out of a STAR file: no column of angles or origins. Stacks get their whole path.

    python examples/benchmarks/blind.py particles.star blind.star

In both files, so that images have the same names in them.
"""

import argparse
from pathlib import Path

from cryorecon.io.star import read_star, write_star


def write_blind(source: Path, target: Path) -> None:
    """The particles of `source` without rlnAngle* and rlnOrigin*; both readable from any folder."""
    tables = read_star(source)
    particles = tables["particles"]
    # Relative names hold in this folder alone; peers are called in folders of their own.
    section, stack = zip(*(name.split("@") for name in particles["rlnImageName"]), strict=True)
    whole = {name: Path(name).resolve() for name in set(stack)}
    particles["rlnImageName"] = [f"{i}@{whole[n]}" for i, n in zip(section, stack, strict=True)]
    write_star(source, tables)
    poses = [c for c in map(str, particles) if c.startswith(("rlnAngle", "rlnOrigin"))]
    write_star(target, {**tables, "particles": particles.drop(columns=poses)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    write_blind(args.source, args.target)


if __name__ == "__main__":
    main()
