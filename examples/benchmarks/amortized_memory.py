"""Peak memory of engine amortized's training as the number of particles grows.

    python examples/benchmarks/amortized_memory.py STACK OUT [--counts 10000 1000000]

The images of STACK/blind.star are repeated, each row with a defocus, coordinates and micrograph of
its own, so that the disk holds any number; images are read from disk. Tells what the process holds
once the table is read, what measuring the noise and training on 20,000 images add to it, the peak,
and the training's rate.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

MEGABYTE = 2**20


def trained(star: Path) -> None:
    """One process: prints what it needed."""
    import resource

    import psutil
    import torch

    from cryorecon.engines.amortized import Amortized, AmortizedConfig
    from cryorecon.io.particles import read_particles
    from cryorecon.run.load import load_observations

    def held() -> float:
        return psutil.Process().memory_info().rss / MEGABYTE

    start = time.monotonic()
    particles = read_particles(star)
    found = {"particles": len(particles), "table_mb": held(), "table_s": time.monotonic() - start}
    config = AmortizedConfig(images_seen=20_000)
    images = load_observations(particles, config.diameter, keep="disk")
    generator = torch.Generator().manual_seed(0)
    run = Amortized(config, images, particles.pixel_size_angst, generator)
    start = time.monotonic()
    while run.seen < config.images_seen:
        run.step()
    found["training_mb"] = held() - found["table_mb"]
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
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
    from memory import distinct

    print("| particles | table, s | table, MB | training, MB | peak MB | ms an image |")
    print("|---|---|---|---|---|---|")
    for count in args.counts:
        command = [sys.executable, __file__, str(distinct(args.stack, count))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {found['particles']} | {found['table_s']:.0f} | {found['table_mb']:.0f} | "
            f"{found['training_mb']:.0f} | {found['peak_mb']:.0f} | {found['ms_an_image']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
