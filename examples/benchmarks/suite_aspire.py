"""ASPIRE's ab initio pipeline with common lines, as its tutorial `pipeline_demo` builds it.

    ENV/bin/python -I suite_aspire.py PARTICLES.star OUT [--box 64] [--classes 200]
        [--neighbours 20] [--seed 0]

Runs inside ASPIRE's own environment. Images are downsampled to --box, phase-flipped, normalised,
whitened and made white; class averages of the first --classes images and their neighbours are
oriented by synchronised common lines (CLSyncVoting, 72 angles) and back-projected. OUT gets map.mrc
and poses.star, which has one row a class: the pose of its average, under the name of the image
that it was built around.
"""

import argparse
import logging
import time
from pathlib import Path

import numpy as np
from aspire.abinitio import CLSyncVoting
from aspire.classification import RIRClass2D
from aspire.denoising import DebugClassAvgSource
from aspire.reconstruction import MeanEstimator
from aspire.source import OrientedSource, RelionSource
from aspire.utils import Rotation

COLUMNS = ("rlnImageName", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")


def image_names(star: Path) -> list[str]:
    """The particles' names: the only words of the file with an @."""
    return [word for word in star.read_text().split() if "@" in word]


def write_poses(path: Path, names: list[str], angles_deg: np.ndarray) -> None:
    head = "\n".join(f"_{name} #{i}" for i, name in enumerate(COLUMNS, 1))
    rows = (
        f"{n} " + " ".join(f"{a:.6f}" for a in r) for n, r in zip(names, angles_deg, strict=True)
    )
    path.write_text(f"\ndata_particles\n\nloop_\n{head}\n" + "\n".join(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("star", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--box", type=int, default=64, help="pixels")
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--neighbours", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("aspire").setLevel(logging.INFO)
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - start:.0f} s: {text}", flush=True)

    source = RelionSource(str(args.star.resolve()), dtype=np.float32)
    if args.box < source.L:
        source = source.downsample(args.box)
    # Its CTF turns what RELION calls white into black: its own look at the images turns it back.
    source = source.phase_flip().normalize_background().whiten().invert_contrast().cache()
    tell(f"{source.n} images of {source.L} px, phase-flipped and whitened")
    classifier = RIRClass2D(source, n_nbor=args.neighbours, seed=args.seed)
    averages = DebugClassAvgSource(source, classifier=classifier)[: args.classes].cache()
    tell(f"{averages.n} class averages of {args.neighbours} images")
    oriented = OrientedSource(averages, CLSyncVoting(averages, n_theta=72))
    angles = np.rad2deg(Rotation(oriented.rotations).angles)
    write_poses(args.output / "poses.star", image_names(args.star)[: args.classes], angles)
    tell("oriented")
    MeanEstimator(oriented).estimate().save(str(args.output / "map.mrc"), overwrite=True)
    tell("map written")


if __name__ == "__main__":
    main()
