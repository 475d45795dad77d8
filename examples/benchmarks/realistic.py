"""Images as a microscope gives them, with all that goes wrong in them at once.

    python examples/benchmarks/realistic.py MODEL OUT [-n 4000] [--box 96] [--pixel-size 2.4]
        [--snr 0.04] [--junk 0.12] [--options ""]

Of an atomic model (PDB or mmCIF): three images in five from two preferred views, origins to 12 A
off centre, 60 micrographs whose ice differs by a fifth and particles whose contrast differs by
a sixth, one neighbour an image on average, a quarter of the noise falling with frequency, its
level different by a tenth from image to image, gradients, dead pixels in one image of twenty,
defocus wrong by 200 A; a share of the images shows no particle: noise, or blobs of contamination.
Normalised as on extraction. OUT/blind.star has no poses; OUT/particles.star has the true ones of
the images that show the particle, OUT/map.mrc is the true map. `cryorecon abinitio` runs and is
judged.
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from crowded import seen_at
from measure import timed

from cryorecon.io.mrc import open_stack, read_map, stack_writer, write_map
from cryorecon.io.star import read_star, write_star

MICROGRAPHS, B_FACTOR_ANGST2, OFFSETS_ANGST = 60, 60.0, 12.0
PREFERRED, VIEWS, KAPPA = 0.6, 2, 4.0
ICE, CONTRAST, LEVEL_OF_NOISE = 0.2, 0.15, 0.1
NEIGHBOURS, NEAREST, FARTHEST = 1.0, 0.55, 0.95
# Share of the noise's power that falls with frequency, and where it has fallen to a quarter.
COLOURED, FALLS_AT = 0.25, 0.06
GRADIENT, DEAD_PIXELS, DEAD_VALUE, DEFOCUS_ERROR_ANGST = 0.4, 0.05, 20.0, 200.0
Generator = np.random.Generator


def simulated(args: argparse.Namespace, name: str, n: int, words: list[str]) -> Path:
    """Images without noise, in a box twice as wide, so that neighbours can be cut from them."""
    folder = args.output / name
    command = [sys.executable, "-m", "cryorecon", "simulate", args.model, "-o", str(folder)]
    size = ["-n", str(n), "--box", str(2 * args.box), "--pixel-size", f"{args.pixel_size:g}"]
    kind = ["--snr", "inf", "--offset-range", f"{OFFSETS_ANGST:g}", "--b-factor"]
    kind += [f"{B_FACTOR_ANGST2:g}", "--overwrite", *words]
    timed([*command, *size, *kind], args.output / f"{name}.json")
    return folder


def clean(args: argparse.Namespace, generator: Generator) -> tuple[np.ndarray, pd.DataFrame]:
    """Images of all views and of the preferred ones, mixed, and their table."""
    n = round(args.n * PREFERRED)
    views = ["--view-clusters", str(VIEWS), "--view-concentration", f"{KAPPA:g}", "--seed", "2"]
    folders = [
        simulated(args, "all_views", args.n - n, ["--seed", "1"]),
        simulated(args, "preferred_views", n, views),
    ]
    images = np.concatenate([np.array(open_stack(f / "particles.mrcs")) for f in folders])
    tables = [read_star(folder / "particles.star")["particles"] for folder in folders]
    order = generator.permutation(args.n)
    return images[order], pd.concat(tables).iloc[order].reset_index(drop=True)


def particles_seen(
    wide: np.ndarray, micrograph: np.ndarray, shows: np.ndarray, generator: Generator
) -> np.ndarray:
    """What images show without noise: particles, neighbours, contamination, in uneven ice."""
    n, box = len(wide), wide.shape[-1] // 2
    images = np.stack([seen_at(image, (0, 0), box) for image in wide])
    power = images.var()
    ice = 1 + ICE * generator.standard_normal(MICROGRAPHS)
    contrast = ice[micrograph] * (1 + CONTRAST * generator.standard_normal(n))
    axis = np.arange(box) - box // 2
    for i, image in enumerate(images):
        for _ in range(generator.poisson(NEIGHBOURS)):
            radius = generator.uniform(NEAREST, FARTHEST) * box
            angle = generator.uniform(0, 2 * np.pi)
            place = int(radius * np.sin(angle)), int(radius * np.cos(angle))
            image += seen_at(wide[generator.integers(n)], place, box)
        image *= np.clip(contrast[i], 0.4, 1.8)
        if shows[i]:
            continue
        image[:] = 0
        for _ in range(generator.integers(4) if generator.random() < 0.5 else 0):
            width, height = generator.uniform(2, 12), generator.uniform(1, 4) * power**0.5
            y, x = generator.uniform(-box / 3, box / 3, 2)
            distance = (axis[:, None] - y) ** 2 + (axis - x) ** 2
            image += height * np.exp(-distance / (2 * width**2))
    return images


def noise_of(shape: tuple[int, int, int], generator: Generator) -> np.ndarray:
    """White noise and noise that falls with frequency, of unit variance in the mean."""
    n, box = shape[:2]
    white, other = (generator.standard_normal(shape, dtype=np.float32) for _ in range(2))
    frequency = np.hypot(np.fft.fftfreq(box)[:, None], np.fft.rfftfreq(box))
    fall = 1 / (1 + (frequency / FALLS_AT) ** 2)
    coloured = np.fft.irfft2(np.fft.rfft2(other) * fall, s=(box, box)).astype(np.float32)
    noise = (1 - COLOURED) ** 0.5 * white + COLOURED**0.5 * coloured / coloured.std()
    level = np.clip(1 + LEVEL_OF_NOISE * generator.standard_normal(n), 0.6, 1.5)
    return noise * level[:, None, None].astype(np.float32)


def recorded(images: np.ndarray, snr: float, generator: Generator) -> np.ndarray:
    """Images with noise, gradients and dead pixels, normalised outside the inscribed circle."""
    n, box = images.shape[:2]
    spread = (images.var() / snr) ** 0.5
    images = images + spread * noise_of(images.shape, generator)
    axis = (np.arange(box) - box // 2) / box
    slopes = GRADIENT * spread * generator.standard_normal((n, 2, 1, 1))
    images += slopes[:, 0] * axis[:, None] + slopes[:, 1] * axis
    for i in np.flatnonzero(generator.random(n) < DEAD_PIXELS):
        images[i, generator.integers(box), generator.integers(box)] += DEAD_VALUE * spread
    outside = np.hypot(axis[:, None], axis) > 0.45
    level = images[:, outside]
    images -= level.mean(1)[:, None, None]
    return (images / level.std(1)[:, None, None]).astype(np.float32)


def make(args: argparse.Namespace) -> None:
    """Write the stack, its table without poses, the true poses and the true map."""
    generator = np.random.default_rng(1)
    wide, table = clean(args, generator)
    micrograph = np.sort(generator.integers(0, MICROGRAPHS, args.n))
    shows = generator.random(args.n) >= args.junk
    images = recorded(particles_seen(wide, micrograph, shows, generator), args.snr, generator)
    with stack_writer(args.output / "particles.mrcs", args.box, args.pixel_size) as written:
        written.append(images)
    table["rlnImageName"] = [f"{i + 1:06d}@particles.mrcs" for i in range(args.n)]
    table["rlnMicrographName"] = [f"{i:03d}.mrc" for i in micrograph]
    optics = read_star(args.output / "all_views" / "particles.star")["optics"]
    optics = optics.assign(rlnImageSize=args.box)
    write_star(args.output / "particles.star", {"optics": optics, "particles": table[shows]})
    error = DEFOCUS_ERROR_ANGST * generator.standard_normal(args.n)
    for column in ("rlnDefocusU", "rlnDefocusV"):
        table[column] = table[column].astype(float) + error
    poses = [name for name in map(str, table) if name.startswith(("rlnAngle", "rlnOrigin"))]
    blind = {"optics": optics, "particles": table.drop(columns=poses)}
    write_star(args.output / "blind.star", blind)
    # Sample 2 N // 2 of the wide box lies on N // 2 of the narrow one.
    cut = slice(args.box - args.box // 2, 2 * args.box - args.box // 2)
    truth = read_map(args.output / "all_views" / "map.mrc").data[cut, cut, cut]
    write_map(args.output / "map.mrc", truth, args.pixel_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("-n", type=int, default=4000)
    parser.add_argument("--box", type=int, default=96)
    parser.add_argument("--pixel-size", type=float, default=2.4)
    parser.add_argument("--snr", type=float, default=0.04)
    parser.add_argument("--junk", type=float, default=0.12, help="share without a particle")
    parser.add_argument("--options", default="", help="of cryorecon abinitio")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    make(args)
    job = args.output / "abinitio"
    words = [sys.executable, "-m", "cryorecon", "abinitio", str(args.output / "blind.star")]
    words += ["-o", str(job), "--overwrite", *shlex.split(args.options)]
    cost = timed(words, job.with_suffix(".json"))
    # It loads torch, see measure.timed.
    from score import score

    found = score(args.output, job / "initial_model.mrc", job / "run_data.star")
    columns = ["CPU s", "FSC 0.5 (A)", "FSC 0.143 (A)", "median deg", "within 5 deg"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    told = f"{found['fsc_0.5_angst']:.2f} | {found['fsc_0.143_angst']:.2f}"
    share = 100 * found["within_5_deg"]
    print(f"| {cost['cpu_s']:.0f} | {told} | {found['median_deg']:.2f} | {share:.1f} % |")


if __name__ == "__main__":
    main()
