"""Fits of moments with and without the third, start by start, against the true map.

    python examples/reproduce/moments_third_fits.py MOMENTS.h5 TRUTH.mrc
        [--radius 4] [--third 0 4] [--starts 6] [--set iterations=500 ...]

MOMENTS: of `moments estimate --third N`, or of moments_molecules.py --third N (OUT/4ake/exact/
moments.h5, the true map beside it in stack/). The starts are those of `moments reconstruct` with
seed 0; the last one begins at the true map. Told: misfit, relative errors of the first two moments,
FSC with the truth by radius, CPU seconds.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from cryorecon.engines.moments.config import MomentFitConfig
from cryorecon.engines.moments.fit import Fitter
from cryorecon.engines.moments.starts import fit_from_map
from cryorecon.io.mrc import read_map
from cryorecon.run.moments.maps import aligned, fsc_by_radius, on_images, on_particle_box
from cryorecon.run.moments.store import read_moments
from cryorecon.run.settings import with_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("moments", type=Path)
    parser.add_argument("truth", type=Path)
    parser.add_argument("--radius", type=int, default=4)
    parser.add_argument("--third", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--set", nargs="*", default=[], help="Of `moments reconstruct`.")
    args = parser.parse_args()
    moments, truth = read_moments(args.moments), torch.from_numpy(read_map(args.truth).data)
    geometry, radius = moments.geometry, args.radius
    given = on_particle_box(truth, geometry, radius)
    print("| M3 to | start | misfit | M1 | M2 | FSC by radius | CPU s |\n" + "|---" * 7 + "|")
    for third in args.third:
        config = with_settings(MomentFitConfig(radius=radius), None, args.set)
        fitter = Fitter.of(moments, replace(config, third_radius=third), radius)
        for start in range(args.starts + 1):
            begun, generator = time.process_time(), torch.Generator().manual_seed(start)
            if start < args.starts:
                name, fit = str(start + 1), fitter.fit(generator)
            else:
                name, fit = "truth", fit_from_map(fitter, given, generator.manual_seed(0))[1]
            spent = time.process_time() - begun
            found = aligned(on_images(fit.volume, geometry, radius), truth, geometry, radius)
            curve = fsc_by_radius(found, truth, geometry, radius)[1:]
            told = " ".join(f"{value:.2f}" for value in curve)
            one, two = fit.frobenius
            print(f"| {third} | {name} | {fit.misfit:.3g} | {one:.4f} | {two:.4f} | {told} | "
                  f"{spent:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
