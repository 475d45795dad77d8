"""Particles that lie close together, so that images show parts of their neighbours.

    python examples/benchmarks/crowded.py OUT [-n 1500] [--neighbours 0 3] [--snr 0.05]
        [--options "--diameter 70"]

Images of 4AKE, 64 px of 2.2 A, two diameters wide. Other particles of the same ice, so many an
image on average, lie anywhere within 64 px of the centre but 0.95 diameters from each other. White
noise; the SNR is that of the particle in the middle. `cryorecon abinitio` runs on each set and is
judged against the truth.
"""

import argparse
import shlex
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
from measure import timed

from cryorecon.io.mrc import open_stack, read_map, stack_writer, write_map
from cryorecon.io.star import read_star, write_star

BOX, PIXEL_SIZE_ANGST, DIAMETER_ANGST = 64, 2.2, 70.0
WIDE, APART = 2 * BOX, 0.95
Place = tuple[int, int]


def clean(out: Path, n: int) -> Path:
    """Images without noise, wide enough that a neighbour's whole image can be cut from them."""
    model = str(files("cryorecon") / "data/4ake_chain_a_heavy.pdb")
    command = [sys.executable, "-m", "cryorecon", "simulate", model, "-o", str(out / "clean")]
    size = ["-n", str(n), "--box", str(WIDE), "--pixel-size", str(PIXEL_SIZE_ANGST), "--snr", "inf"]
    timed([*command, *size, "--overwrite"], out / "clean.json")
    return out / "clean"


def seen_at(image: np.ndarray, place: Place, box: int) -> np.ndarray:
    """What a box shows of a particle whose centre lies somewhere, in pixels from its own."""
    wide = len(image)
    rows, columns = (wide + wide // 2 - box // 2 - shift for shift in place)
    return np.pad(image, wide)[rows : rows + box, columns : columns + box]


def places(generator: np.random.Generator, mean: float) -> list[Place]:
    """Where neighbours lie around one particle."""
    least, taken = APART * DIAMETER_ANGST / PIXEL_SIZE_ANGST, [(0, 0)]
    for _ in range(generator.poisson(mean)):
        for _ in range(50):
            radius, angle = BOX * generator.random() ** 0.5, 2 * np.pi * generator.random()
            new = round(radius * np.sin(angle)), round(radius * np.cos(angle))
            if all(np.hypot(new[0] - y, new[1] - x) > least for y, x in taken):
                taken.append(new)
                break
    return taken[1:]


def crowd(source: Path, folder: Path, mean: float, snr: float) -> float:
    """Write a stack, its STAR file and the truth; neighbours an image."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    wide = np.array(open_stack(source / "particles.mrcs"), np.float32)
    images, count = np.stack([seen_at(image, (0, 0), BOX) for image in wide]), 0
    noise = (images.var() / snr) ** 0.5
    for image in images:
        for place in places(generator, mean):
            image += seen_at(wide[generator.integers(len(wide))], place, BOX)
            count += 1
    images += noise * generator.standard_normal(images.shape, dtype=np.float32)
    with stack_writer(folder / "particles.mrcs", BOX, PIXEL_SIZE_ANGST) as written:
        written.append(images)
    tables = read_star(source / "particles.star")
    numbers = tables["particles"]["rlnImageName"].str.partition("@")[0]
    tables["particles"] = tables["particles"].assign(rlnImageName=numbers + "@particles.mrcs")
    tables["optics"] = tables["optics"].assign(rlnImageSize=BOX)
    write_star(folder / "particles.star", tables)
    cut = slice(WIDE // 2 - BOX // 2, WIDE // 2 + BOX // 2)
    truth = read_map(source / "map.mrc").data[cut, cut, cut]
    write_map(folder / "map.mrc", truth, PIXEL_SIZE_ANGST)
    return count / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("-n", type=int, default=1500)
    parser.add_argument("--neighbours", type=float, nargs="+", default=[0.0, 3.0])
    parser.add_argument("--snr", type=float, default=0.05)
    parser.add_argument("--options", default="", help="of cryorecon abinitio")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    source = clean(args.output, args.n)
    columns = ["neighbours an image", "CPU s", "FSC 0.5 (A)", "median deg", "within 5 deg"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    for mean in args.neighbours:
        stack = args.output / f"crowd{mean:g}"
        count, job = crowd(source, stack, mean, args.snr), stack / "abinitio"
        words = [sys.executable, "-m", "cryorecon", "abinitio", str(stack / "particles.star")]
        options = ["-o", str(job), "--overwrite", *shlex.split(args.options)]
        cost = timed([*words, *options], job.with_suffix(".json"))
        # It loads torch, see measure.timed.
        from score import score

        found = score(stack, job / "initial_model.mrc", job / "run_data.star")
        told = f"{found['fsc_0.5_angst']:.2f} | {found['median_deg']:.2f}"
        share = 100 * found["within_5_deg"]
        print(f"| {count:.1f} | {cost['cpu_s']:.0f} | {told} | {share:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
