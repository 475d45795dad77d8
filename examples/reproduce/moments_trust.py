"""Is a map from moments right as far as its starts agree? Random molecules, many answers.

    python examples/reproduce/moments_trust.py OUT
        [--molecules 8] [--third 0 4] [--radius 6] [--starts 4] [--set iterations=250 ...]

A molecule is a compact random chain of 150 residues in a box of 33 px; its moments are exact, by
quadrature, under eight clusters of views. One row a molecule and largest radius of third moments:
the best misfit, starts that fit as well, the radius to which each of them agrees with the best, and
the radii to which the best start, and the mean of those, agree with the truth (FSC 0.5 each). What
fits as well and how far it agrees is what `moments reconstruct` says.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from moments_molecules import write_exact

from cryorecon.engines.moments.config import MomentFitConfig
from cryorecon.engines.moments.fit import Fitter
from cryorecon.io.mrc import write_map
from cryorecon.maps.fsc import crossing_shell
from cryorecon.run.moments.maps import aligned, fsc_by_radius, on_images
from cryorecon.run.moments.store import read_moments
from cryorecon.run.moments.trust import agreement_with_best
from cryorecon.run.settings import with_settings

BOX, REACH, RESIDUES, WIDTH = 33, 12.0, 150, 1.1


def chain(seed: int) -> torch.Tensor:
    """Density of a random chain that its own middle draws back; shape (BOX, BOX, BOX)."""
    random = torch.Generator().manual_seed(seed)
    pull = 0.9 + 0.09 * float(torch.rand(1, generator=random))
    place, places = torch.zeros(3), []
    for _ in range(RESIDUES):
        place = pull * place + torch.randn(3, generator=random)
        places.append(place)
    points = torch.stack(places)
    points = points - points.mean(0)
    points = points * (REACH / points.norm(dim=-1).max())
    axis = (torch.arange(BOX) - BOX // 2).float()
    waves = [torch.exp(-((axis - c[:, None]) ** 2) / (2 * WIDTH**2)) for c in points.T]
    return torch.einsum("nx,ny,nz->zyx", *waves)


def row(path: Path, truth: torch.Tensor, config: MomentFitConfig) -> str:
    """How far the starts of one molecule agree, and how far they are right."""
    moments = read_moments(path)
    geometry, radius, begun = moments.geometry, config.radius, time.process_time()
    fitter = Fitter.of(moments, config, radius)
    fits = [fitter.fit(torch.Generator().manual_seed(start)) for start in range(config.starts)]
    fits.sort(key=lambda fit: fit.misfit)
    maps = [on_images(fit.volume, geometry, radius) for fit in fits]
    agreed = agreement_with_best(fits, maps, geometry, radius)
    good = [(one, to) for one, to in zip(maps, agreed, strict=True) if to is not None]
    others = [to for _, to in good[1:]]
    mean = torch.stack([one for one, _ in good]).mean(0)

    def right(one: torch.Tensor) -> float:
        curve = fsc_by_radius(aligned(one, truth, geometry, radius), truth, geometry, radius)
        return min(crossing_shell(curve, 0.5), radius)

    cells = (config.third_radius, f"{fits[0].misfit:.3g}", f"{fits[0].lower:.3g}", len(others),
             " ".join(f"{to:.1f}" for to in others) or "-", f"{right(maps[0]):.1f}",
             f"{right(mean):.1f}", f"{time.process_time() - begun:.0f}")  # fmt: skip
    return " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--molecules", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="Number of the first molecule.")
    parser.add_argument("--third", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--radius", type=int, default=6)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--set", nargs="*", default=[], help="Of `moments reconstruct`.")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    columns = ("molecule", "M3 to", "misfit", "M1 and M2", "others as good", "agree to radius",
               "best, truth", "mean, truth", "CPU s")  # fmt: skip
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    for molecule in range(args.first, args.first + args.molecules):
        path, truth = args.output / f"{molecule}.h5", chain(molecule)
        write_map(args.output / f"{molecule}.mrc", truth.numpy(), 2.0)
        if not path.exists():
            low = max(args.third)
            write_exact(path, args.output / f"{molecule}.mrc", args.radius, 10.0, low)
        for third in args.third:
            config = replace(MomentFitConfig(), radius=args.radius, third_radius=third)
            config = with_settings(replace(config, starts=args.starts), None, args.set)
            print(f"| {molecule} | {row(path, truth, config)}", flush=True)


if __name__ == "__main__":
    main()
