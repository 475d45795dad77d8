"""Maps from first and second moments (Khoo, Paul and Sharon 2024, tables 2 and 3).

    python examples/reproduce/moments.py OUT [--n 20000] [--cases exact sigma snr0.1 ctf 4ake]
        [--views harmonics encoder free] [--fit --max-radius 5 --starts 3]

Four Gaussians in a box of 25 A with views of eight von Mises-Fisher clusters, from exact moments
and from images with the paper's noise (sigma 0.5 for a map of norm 1: SNR 0.012 in a box twice as
wide) or less, with and without CTF, and 4AKE at 64 px. One row a case and a density of views:
errors of the moments, how far starts that fit equally well agree, what the program says, the FSC
against the truth after alignment, and CPU seconds.
"""

import argparse
import math
import resource
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import torch

from cryorecon.engines.moments.forms import MomentsGeometry, SteerableMoments, exact_moments
from cryorecon.engines.moments.sums_steerable import SteerableSums
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.star import read_star
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import fsc_curve, resolution_at
from cryorecon.physics.sphere import lebedev
from cryorecon.run.moments.store import Progress, save_progress

BOX, SIDE = 25, 30.0


def cryorecon(*words: object) -> int:
    command = [sys.executable, "-m", "cryorecon", *map(str, words)]
    return subprocess.run(command, check=False).returncode


def four_gaussians(path: Path) -> torch.Tensor:
    """Unit norm, widths 1.5 to 2.3 A, centres 3 to 5.5 A from the middle."""
    axis = (torch.arange(BOX) - BOX // 2).double()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    random = torch.Generator().manual_seed(3)
    volume = torch.zeros(BOX, BOX, BOX, dtype=torch.float64)
    for _ in range(4):
        centre = torch.nn.functional.normalize(torch.randn(3, generator=random), dim=0).double()
        centre = centre * (3 + 2.5 * torch.rand(1, generator=random).double())
        width = 1.5 + 0.8 * torch.rand(1, generator=random).double()
        mass = (0.6 + 0.8 * torch.rand(1, generator=random).double()) / width**3
        squares = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
        volume += mass * torch.exp(-squares / (2 * width**2))
    volume /= volume.norm()
    write_map(path, volume.float().numpy(), 1.0)
    return volume


def write_exact(path: Path, volume: torch.Tensor, radius: int) -> None:
    """Moments without noise, by quadrature, under eight clusters of views."""
    random = torch.Generator().manual_seed(0)
    poles = torch.randn(8, 3, generator=random, dtype=torch.float64)
    poles = torch.nn.functional.normalize(poles, dim=-1)
    rule = lebedev(65)
    weights = rule.weights * torch.exp(10 * (rule.directions @ poles.T - 1)).sum(-1)
    order = int(math.pi * radius * 24 / SIDE) + 2
    geometry = MomentsGeometry("steerable", 50, 1.0, 24.0, SIDE, radius, order)
    grid = geometry.map_grid(BOX)
    first, second = exact_moments(volume, rule.directions, weights / weights.sum(), grid)
    none = torch.zeros_like(second)
    tiny = 1e-9 * float(second.abs().max())
    kept, even = torch.ones(radius, radius, dtype=torch.bool), torch.ones(radius)
    moments = SteerableMoments(geometry, 0, first, second, tiny + 0 * first, tiny + none.real, none,
                               kept, even)  # fmt: skip
    save_progress(path, Progress(SteerableSums(geometry), 1, 1, ("exact",)), moments)


def simulated(folder: Path, model: Path, *words: object) -> tuple[Path, Path]:
    """A moments file of simulated particles, and their true map."""
    stack = folder / "stack"
    if not (folder / "moments.h5").exists():
        cryorecon("simulate", model, "-o", stack, "--view-clusters", 8, "--overwrite", *words[:-1])
        cryorecon("moments", "estimate", stack / "particles.star", "-o", folder / "moments.h5",
                  "--diameter", words[-1])  # fmt: skip
    return folder / "moments.h5", stack / "map.mrc"


def row(case: str, job: Path, moments: Path, truth: Path, *fit: object) -> None:
    words = ["moments", "reconstruct", moments, "-o", job, "--overwrite", *fit]
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    code = cryorecon(*words)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - spent
    if code:
        cryorecon(*words, "--allow-ambiguous")
    starts = read_star(job / "starts.star")["starts"].astype(float)
    agreed = starts["cryoreconAgreementRadius"]
    least = min(agreed[agreed >= 0], default=float("nan"))
    errors = starts.iloc[0][["cryoreconFirstMomentError", "cryoreconSecondMomentError"]]
    found, given = read_map(job / "initial_model.mrc"), read_map(truth)
    volume, target = torch.from_numpy(found.data), torch.from_numpy(given.data)
    moved = apply_alignment(volume, align_maps(volume, target, given.pixel_size_angst))
    curve = fsc_curve(moved, target)
    angst = resolution_at(curve, 0.5, len(target), given.pixel_size_angst)
    whole = job / "initial_model_unfiltered.mrc"
    says = "ambiguous" if code else "map in part" if whole.exists() else "map"
    print(
        f"| {case} | {starts['cryoreconMisfit'].iloc[0]:.3g} | {errors.iloc[0]:.4f} | "
        f"{errors.iloc[1]:.4f} | {least:.1f} | {says} | {angst:.2f} | {spent:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--cases", nargs="+", default=["exact", "sigma", "snr0.1", "ctf", "4ake"])
    parser.add_argument("--views", nargs="+", default=["harmonics"])
    parser.add_argument("--fit", nargs=argparse.REMAINDER, default=[],
                        help="further options of `moments reconstruct`")  # fmt: skip
    args = parser.parse_args()
    flat = ["--defocus-min", 0, "--defocus-max", 0, "--astigmatism", 0, "--cs", 0,
            "--amplitude-contrast", 1]  # fmt: skip
    wide = ["--n", args.n, "--box", 50, "--pixel-size", 1]
    columns = "misfit", "error of M1", "of M2", "starts agree to radius", "says", "FSC 0.5 (A)"
    print("|", " | ".join(["case", *columns, "CPU s"]), "|")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for case in args.cases:
        folder = args.output / case
        folder.mkdir(parents=True, exist_ok=True)
        model = folder / "gaussians.mrc"
        volume = four_gaussians(model)
        if case == "exact":
            moments, truth = folder / "moments.h5", folder / "map50.mrc"
            padded = torch.nn.functional.pad(volume, (13, 12) * 3)
            write_map(truth, padded.float().numpy(), 1.0)
            write_exact(moments, volume, 8)
        elif case == "4ake":
            atoms = Path(str(files("cryorecon") / "data/4ake_chain_a_heavy.pdb"))
            moments, truth = simulated(folder, atoms, "--n", args.n, "--box", 64, "--pixel-size",
                                       2.4, "--snr", 0.1, 76)  # fmt: skip
        else:
            snr = {"sigma": 0.012, "snr0.1": 0.1, "ctf": 0.1}[case]
            optics = ["--defocus-min", 500, "--defocus-max", 2000] if case == "ctf" else flat
            moments, truth = simulated(folder, model, *wide, "--snr", snr, *optics, 24)
        for views in args.views:
            job = folder / f"job_{views}"
            row(f"{case}, {views}", job, moments, truth, "--views", views, *args.fit)


if __name__ == "__main__":
    main()
