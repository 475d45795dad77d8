"""Make a benchmark stack whose images RELION itself projects.

    python examples/benchmarks/make_relion_stack.py OUT [--n 2000] [--snr 0.1] [--shift-px 3]
        [--box 64] [--model FILE --pixel-size 6.5]

The map is that of an atomic model, by default 4AKE in a box 76.8 A wide, 64 px at 1.2 A; B = 20
A^2.
``relion_project --ctf`` writes the clean images from Haar-random poses; white noise is added to
reach the SNR (variance of the CTF-modulated signal over the whole box / variance of the noise).
Needs RELION 3.1 on the PATH. OUT/particles.star holds the true poses, OUT/blind.star no pose
column at all.
"""

import argparse
import subprocess
from importlib.resources import files
from pathlib import Path

import numpy as np
from blind import write_blind

from cryorecon.io.mrc import open_stack, stack_writer
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--box", type=int, default=64, help="pixels")
    parser.add_argument("--model", type=Path, help="PDB or mmCIF; default 4AKE")
    parser.add_argument("--pixel-size", type=float, help="angstrom; default 76.8 over the box")
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--shift-px", type=float, default=0.0, help="uniform within +- this")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pixel = args.pixel_size or 76.8 / args.box
    config = SimulateConfig(
        n_particles=args.n,
        box=args.box,
        pixel_size_angst=pixel,
        snr=float("inf"),
        shift_angst=args.shift_px * pixel,
        b_factor_angst2=20.0,
        seed=args.seed,
    )
    model = args.model or files("cryorecon") / "data" / "4ake_chain_a_heavy.pdb"
    simulate(str(model), args.output, config)
    # relion_project reads poses, origins and CTF from the STAR file and writes clean.mrcs.
    clean = args.output / "clean"
    command = ["relion_project", "--i", args.output / "map.mrc", "--ang"]
    command += [args.output / "particles.star", "--ctf", "--angpix", pixel, "--o", clean]
    subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
    images = np.asarray(open_stack(f"{clean}.mrcs"), dtype=np.float32)
    noise_std = float(np.sqrt(images.var() / args.snr))
    generator = np.random.default_rng(args.seed)
    with stack_writer(args.output / "particles.mrcs", images.shape[-1], pixel) as stack:
        for block in np.array_split(images, max(1, len(images) // 256)):
            noise = generator.standard_normal(block.shape, dtype=np.float32)
            # Normalised as RELION asks for: noise of mean 0 and standard deviation 1.
            stack.append((block + noise_std * noise) / noise_std)
    for path in (Path(f"{clean}.mrcs"), Path(f"{clean}.star")):
        path.unlink(missing_ok=True)
    write_blind(args.output / "particles.star", args.output / "blind.star")
    print(f"{args.output}: {len(images)} particles, SNR {args.snr}, noise std {noise_std:.4g}")


if __name__ == "__main__":
    main()
