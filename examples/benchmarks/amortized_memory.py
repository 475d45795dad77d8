"""Peak memory of engine amortized's training as the number of particles grows.

    python examples/benchmarks/amortized_memory.py STACK OUT [--counts 10000 1000000]

STACK/blind.star is repeated until it has as many rows as asked for, so that the disk holds any
number; images are read from disk. Tells the peak after the table is read, after the noise is
measured, and after training on 20,000 images, and the rate of the training.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

MEGABYTE = 1024


def trained(star: Path) -> None:
    """One process: prints what it needed."""
    import resource

    import torch

    from cryorecon.engines.amortized import Amortized, AmortizedConfig
    from cryorecon.io.particles import read_particles
    from cryorecon.run.load import load_observations

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // MEGABYTE

    start = time.monotonic()
    particles = read_particles(star)
    found = {"particles": len(particles), "table_mb": peak(), "table_s": time.monotonic() - start}
    config = AmortizedConfig(images_seen=20_000)
    images = load_observations(particles, config.diameter, keep="disk")
    found["noise_mb"] = peak()
    generator = torch.Generator().manual_seed(0)
    run = Amortized(config, images, particles.pixel_size_angst, generator)
    start = time.monotonic()
    while run.seen < config.images_seen:
        run.step()
    found["training_mb"] = peak()
    found["ms_an_image"] = 1e3 * (time.monotonic() - start) / run.seen
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 1_000_000])
    args = parser.parse_args()
    if args.output is None:
        trained(args.stack)
        return
    from memory import repeated

    print("| particles | reading the table, s | MB after it | MB in all | training, ms an image |")
    print("|---|---|---|---|---|")
    for count in args.counts:
        command = [sys.executable, __file__, str(repeated(args.stack, count))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {found['particles']} | {found['table_s']:.0f} | {found['table_mb']} | "
            f"{found['training_mb']} | {found['ms_an_image']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
