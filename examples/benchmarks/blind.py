"""Leave the poses out of a STAR file: no column of angles or origins.

python examples/benchmarks/blind.py particles.star blind.star
"""

import argparse
from pathlib import Path

from cryorecon.io.star import read_star, write_star


def write_blind(source: Path, target: Path) -> None:
    """The particles of `source` without rlnAngle* and rlnOrigin*, all else as it is."""
    tables = read_star(source)
    poses = [c for c in tables["particles"] if c.startswith(("rlnAngle", "rlnOrigin"))]
    tables["particles"] = tables["particles"].drop(columns=poses)
    write_star(target, tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    write_blind(args.source, args.target)


if __name__ == "__main__":
    main()
