"""What third moments add to what first and second moments fix of a map.

    python examples/reproduce/moments_third.py [MAP.mrc] [--radius 4] [--third 2 4]
        [--concentration 10] [--snr 0.1] [--draws 8000]

The information of N images in their moments, near the truth: the covariance of all entries
together (M1, M2 and M3, views and noise of an image meet in all of them) is that of simulated
images, their moments' slopes are those of exact slices. A map free in the particle's ball is
unknown, each voxel with the prior that its shell's power sets, and the density of views (48
harmonics). Told by radius: the share of the map's power that the moments fix, rotations left
out. `floor` is what the model errs by, relative to the power of an entry's radii, the 0.3 % of
`moments reconstruct` or less. MAP: default the 4AKE that comes with the package in 63 px.
Concentration 0: all views alike; 10: eight von Mises-Fisher clusters.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import reduce
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from cryorecon.engines.moments.forms import MomentsGeometry, steerable_moments
from cryorecon.engines.moments.information import _by_shell, _FreeMap
from cryorecon.engines.moments.third import order_pairs, third_moment
from cryorecon.io.mrc import read_map
from cryorecon.physics.masks import Support
from cryorecon.physics.polar import PolarSlices, noise_by_shell
from cryorecon.physics.resampling import resample_sums, sample_volume
from cryorecon.physics.sphere import frames, lebedev, real_harmonics

BOX, SHARE = 63, 0.8
CASES = ((2e4, 3e-3), (2e4, 1e-5), (1e6, 1e-5), (math.inf, 1e-5))


@dataclass(frozen=True)
class Entries:
    """Which numbers of the moments stand for all: real parts, then imaginary ones."""

    second: tuple[Tensor, Tensor]
    third: tuple[Tensor, Tensor]

    @staticmethod
    def of(geometry: MomentsGeometry) -> "Entries":
        k = torch.arange(geometry.max_radius)
        largest = torch.tensor([geometry.order_at(int(r) + 1) for r in k])
        order = torch.arange(geometry.max_order + 1)[:, None]
        has = order <= largest
        two = has[:, :, None] & has[:, None, :] & (k[:, None] <= k)
        two_imaginary = two & (order[:, :, None] > 0) & (k[:, None] < k)
        low = k[: geometry.third_radius]
        one, other, last = torch.meshgrid(low, low, low, indexing="ij")
        three, three_imaginary = [], []
        for m, n in order_pairs(geometry.third_order).tolist():
            kept = (largest[one] >= m) & (largest[other] >= n) & (largest[last] >= m + n)
            real_only = torch.zeros_like(kept)
            if n == 0:
                kept &= (one <= other) & (other <= last)
                real_only[:] = True
            elif m == 0:
                kept &= other <= last
                real_only = other == last
            elif m == n:
                kept &= one <= other
            three.append(kept)
            three_imaginary.append(kept & ~real_only)
        return Entries((two, two_imaginary), (torch.stack(three), torch.stack(three_imaginary)))

    def flat(self, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        (a, b), (c, d) = self.second, self.third
        parts = (first, second.real[a], second.imag[b], third.real[c], third.imag[d])
        return torch.cat(parts)

    @property
    def few(self) -> int:
        """Numbers of the second moment."""
        return int(self.second[0].sum() + self.second[1].sum())


def moments(harmonics: Tensor, one: Tensor, other: Tensor, g: MomentsGeometry) -> tuple:
    low = harmonics[:, : g.third_radius, : g.third_order + 1]
    return (*steerable_moments(harmonics, one, other), third_moment(low, one, other))


def covariance(
    s: Tensor, weights: Tensor, noise: Tensor, g: MomentsGeometry, entries: Entries, draws: int
) -> Tensor:
    """Of the debiased entries of one image."""
    random = torch.Generator().manual_seed(0)
    level = 1e-12 * noise[0].diagonal().real.mean()
    root = torch.linalg.cholesky(noise + level * torch.eye(len(noise[0])))
    sign = 1.0 - 2.0 * (torch.arange(s.shape[2]) % 2)
    pairs, R = order_pairs(g.third_order), g.third_radius
    low = noise[: g.third_order + 1, :R, :R]
    rows = []
    for number in torch.multinomial(weights, draws, True, generator=random).tolist():
        x = s[number % len(s)]
        x = x if number < len(s) else x.conj() * sign
        white = torch.randn(len(noise), len(x), 2, generator=random, dtype=torch.float64)
        n = torch.view_as_complex(white) / 2**0.5
        n[0] = white[0, :, 0] + 0j
        y = x + (root @ n[..., None])[..., 0].T
        second = y.T[:, :, None] * y.T.conj()[:, None, :]
        t = y[:R, : g.third_order + 1].T
        both = t[pairs[:, 0]][:, :, None] * t[pairs[:, 1]][:, None, :]
        third = both[..., None] * t[pairs.sum(1)].conj()[:, None, None, :]
        own = t[0].real[:, None, None] * low[:, None]
        third[: len(low)] -= own
        third[0] -= own[0].permute(1, 0, 2) + own[0].permute(1, 2, 0)
        rows.append(entries.flat(y[:, 0].real, second, third))
    return torch.cov(torch.stack(rows).T)


def shares(args: argparse.Namespace, path: Path, third_radius: int) -> None:
    given = read_map(path)
    volume, radius = torch.from_numpy(given.data).double(), args.radius
    box, pixel = len(volume), given.pixel_size_angst
    side = box * pixel
    order = int(math.pi * radius * SHARE) + 2
    g = MomentsGeometry("steerable", box, pixel, SHARE * side, side, radius, order,
                        third_radius=third_radius)  # fmt: skip
    rule = lebedev(2 * order + 15).hemisphere()
    both = torch.cat([rule.directions, -rule.directions])
    random = torch.Generator().manual_seed(0)
    poles = torch.randn(8, 3, generator=random, dtype=torch.float64)
    poles = torch.nn.functional.normalize(poles, dim=-1)
    weights = torch.exp(args.concentration * (both @ poles.T - 1)).sum(-1)
    weights = weights * rule.weights.repeat(2) / (weights * rule.weights.repeat(2)).sum()
    one, other = weights.chunk(2)
    size = max(20, 2 * (radius + 4))
    small = sample_volume(volume, size, box / size) * (box / size) ** 3
    slices = PolarSlices(size, g.map_grid(), frames(rule.directions), torch.float64)
    s = slices.harmonics(small)
    noise = reduce(torch.add, noise_by_shell(box, g.map_grid()))
    noise = noise * box**2 * noise_variance(volume, args.snr)
    noise = noise[len(noise) // 2 :][: order + 1]
    entries = Entries.of(g)
    spread = covariance(s, weights, noise, g, entries, args.draws)
    free = _FreeMap.of(resample_sums(small, 2 * radius + 2), radius, Support(SHARE / 2))
    slopes, step = [], 1e-2
    for number in range(free.whitened.shape[1]):
        moved = step * slices.harmonics(resample_sums(free.map_of(number), size))
        ends = [entries.flat(*moments(s + sign * moved, one, other, g)) for sign in (1, -1)]
        slopes.append((ends[0] - ends[1]) / (2 * step))
    tilt = real_harmonics(6, both)[:, 1:]
    tilt = weights[:, None] * (tilt - weights @ tilt)
    tilts = zip(*(part.T for part in tilt.chunk(2)), strict=True)
    slopes += [entries.flat(*moments(s, near, far, g)) for near, far in tilts]
    slope = torch.stack(slopes, -1)
    twice = torch.where(torch.arange(order + 1) > 0, 2.0, 1.0).double()
    power = (s.abs().square() * twice).sum(2).T @ (one + other)
    pair = (power[:, None] * power).expand(order + 1, -1, -1)
    low = power[:third_radius]
    cube = (low[:, None, None] * low[:, None] * low).expand(len(entries.third[0]), -1, -1, -1)
    floor = entries.flat(power, torch.complex(pair, pair), torch.complex(cube, cube))
    count = radius + entries.few
    for images, error in CASES:
        for name, kept in (("M1 + M2", count), (f"... + M3 to {third_radius}", len(floor))):
            # The inverse of a sample's covariance is too large by this factor.
            excess = (args.draws - 1) / (args.draws - kept - 2)
            whole = excess / images * spread[:kept, :kept] + torch.diag(error**2 * floor[:kept])
            share = fixed(whole, slope[:kept], free)
            told = " ".join(f"{x:.2f}" for x in share[1:])
            print(f"| {args.concentration:g} | {images:g} | {error:g} | {name} | {kept} | {told} |",
                  flush=True)  # fmt: skip


def noise_variance(volume: Tensor, snr: float) -> float:
    """Of a pixel: the pixels' variance over the images, by the power in Fourier space, over SNR."""
    box = len(volume)
    power = torch.fft.fftn(volume).abs().square()
    axis = torch.fft.fftfreq(box, 1 / box).double()
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    k = (x**2 + y**2 + z**2).sqrt()
    kept = (k > 0) & (k <= box // 2)
    # A shell's mean power, over a circle of its radius.
    return float((power[kept] / (2 * k[kept])).sum()) / box**4 / snr


def fixed(spread: Tensor, slope: Tensor, free: _FreeMap) -> Tensor:
    """Share of each shell's power that the moments fix."""
    scale = spread.diagonal().sqrt()
    whole = spread / scale[:, None] / scale
    whole.diagonal().add_(1e-9)
    root = torch.linalg.cholesky(whole)
    white = torch.linalg.solve_triangular(root, slope / scale[:, None], upper=False)
    information = white.T @ white
    information.diagonal().add_(1.0)
    columns = free.whitened
    still = columns.new_zeros(len(columns), slope.shape[1] - columns.shape[1])
    moves = torch.cat([columns, still], 1)
    root = torch.linalg.cholesky(information)
    left = torch.linalg.solve_triangular(root, moves.T, upper=False).T
    left = left - free.turns @ (free.turns.T @ left)
    return 1 - _by_shell(left, free.shell) / _by_shell(columns, free.shell).clamp(min=1e-30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("map", nargs="?", type=Path)
    parser.add_argument("--radius", type=int, default=4)
    parser.add_argument("--third", type=int, nargs="+", default=[4])
    parser.add_argument("--concentration", type=float, default=10.0)
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--draws", type=int, default=8000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.map or Path(folder) / "map.mrc"
        if args.map is None:
            atoms = str(files("cryorecon") / "data/4ake_chain_a_heavy.pdb")
            words = ["simulate", atoms, "-o", folder, "--n", "1", "--box", str(BOX)]
            command = [sys.executable, "-m", "cryorecon", *words, "--overwrite"]
            subprocess.run(command, check=True, stdout=sys.stderr)
        columns = "kappa", "images", "floor", "moments", "numbers", "share fixed by radius"
        print("| " + " | ".join(columns) + " |\n" + "|---" * 6 + "|")
        for radius in args.third:
            shares(args, path, radius)
    print(f"{time.process_time():.0f} CPU seconds", file=sys.stderr)


if __name__ == "__main__":
    main()
