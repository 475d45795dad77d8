"""Images that do not show the particle: is the map still found, and can they be told?

    python examples/benchmarks/junk.py STACK OTHER OUT [--share 0.15] [--ice 0] [--cuts 0 100]
        [--options "--diameter 70"]

Of STACK's images a share become pure noise, and as many those of OTHER, a stack of another molecule
with the same box; a share of the others get a blob of ice, eight times as bright as the noise.
`cryorecon abinitio` runs on all, then on those whose log-likelihood (rlnLogLikeliContribution of
run_data.star) is above each cut. Prints how it lies by kind, and each map's resolution against
STACK's truth.
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from measure import timed

from cryorecon.io.mrc import open_stack, stack_writer
from cryorecon.io.star import read_star, write_star

KINDS = ("the particle", "noise", "another molecule", "with ice")
SHOWN = (1, 50, 99)
# Height in standard deviations of the noise, and half widths in pixels.
ICE, ICE_PX = 8.0, (4.0, 9.0)


def mix(stack: Path, other: Path, out: Path, share: float, ice: float) -> np.ndarray:
    """Write OUT/mixed.star and its stack; the kind of each image."""
    tables = read_star(stack / "blind.star")
    table = tables["particles"]
    images, others = (
        np.array(open_stack(folder / "particles.mrcs"), np.float32) for folder in (stack, other)
    )
    n, generator = len(images), np.random.default_rng(0)
    kind, few = np.zeros(n, int), round(share * n)
    order = generator.permutation(n)
    kind[order[:few]], kind[order[few : 2 * few]] = 1, 2
    kind[order[2 * few : 2 * few + round(ice * n)]] = 3
    level, spread = images[:, :5].mean(), images[:, :5].std()
    noise = generator.standard_normal(images.shape, dtype=np.float32)
    alien = (others[:n] - others[:, :5].mean()) / others[:, :5].std()
    images[kind == 1] = level + spread * noise[kind == 1]
    images[kind == 2] = level + spread * alien[kind == 2]
    add_ice(images, np.flatnonzero(kind == 3), spread, generator)
    pixel = float(tables["optics"]["rlnImagePixelSize"].iloc[0])
    with stack_writer(out / "mixed.mrcs", images.shape[-1], pixel) as written:
        written.append(images)
    numbers = table["rlnImageName"].str.partition("@")[0]
    tables["particles"] = table.assign(rlnImageName=numbers + "@mixed.mrcs")
    write_star(out / "mixed.star", tables)
    return kind


def add_ice(
    images: np.ndarray, rows: np.ndarray, spread: float, generator: np.random.Generator
) -> None:
    """A blob at a random place of each of some images."""
    box = images.shape[-1]
    axis = np.arange(box) - box // 2
    for row in rows:
        x, y = generator.uniform(-box / 4, box / 4, 2)
        squares = (axis[:, None] - y) ** 2 + (axis - x) ** 2
        images[row] += ICE * spread * np.exp(-squares / (2 * generator.uniform(*ICE_PX) ** 2))


def job(star: Path, folder: Path, options: str) -> pd.DataFrame:
    """Run the program; its table."""
    command = [sys.executable, "-m", "cryorecon", "abinitio", str(star), "-o", str(folder)]
    timed([*command, "--overwrite", *shlex.split(options)], folder.with_suffix(".json"))
    return read_star(folder / "run_data.star")["particles"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--share", type=float, default=0.15)
    parser.add_argument("--ice", type=float, default=0.0, help="share of bright images")
    parser.add_argument("--cuts", type=float, nargs="*", default=[0.0, 100.0])
    parser.add_argument("--options", default="--diameter 70", help="of cryorecon abinitio")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    kind = mix(args.stack, args.other, args.output, args.share, args.ice)
    told = job(args.output / "mixed.star", args.output / "all", args.options)
    likelihood = told["rlnLogLikeliContribution"].astype(float).to_numpy()
    print("| images | number | log-likelihood, percentiles 1, 50, 99 |\n|---|---|---|")
    for number, name in enumerate(KINDS):
        of_kind = likelihood[kind == number]
        if len(of_kind) == 0:
            continue
        some = " ".join(f"{v:.0f}" for v in np.percentile(of_kind, SHOWN))
        print(f"| {name} | {len(of_kind)} | {some} |")
    mixed = read_star(args.output / "mixed.star")
    folders = {"all": (args.output / "all", np.ones(len(kind), bool))}
    for cut in args.cuts:
        folder, chosen = args.output / f"above{cut:g}", likelihood > cut
        star = args.output / f"above{cut:g}.star"
        write_star(star, {**mixed, "particles": mixed["particles"][chosen]})
        job(star, folder, args.options)
        folders[f"log-likelihood above {cut:g}"] = folder, chosen
    # It loads torch, see measure.timed.
    from score import score

    columns = ["map of", *KINDS, "FSC 0.5 (A)", "FSC 0.143 (A)"]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, (folder, chosen) in folders.items():
        found = score(args.stack, folder / "initial_model.mrc", None)
        counts = " | ".join(str(int((kind[chosen] == k).sum())) for k in range(len(KINDS)))
        crossings = f"{found['fsc_0.5_angst']:.2f} | {found['fsc_0.143_angst']:.2f}"
        print(f"| {name} | {counts} | {crossings} |")


if __name__ == "__main__":
    main()
