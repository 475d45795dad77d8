"""How fast and how right `cryorecon moments` is: the figures of docs/benchmarks.md.

python examples/benchmarks/moments.py speed | accuracy | astigmatism
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from cryorecon.engines.moments.forms import MomentsGeometry, exact_moments
from cryorecon.engines.moments.sums_steerable import SteerableSums
from cryorecon.io.mrc import read_map
from cryorecon.physics.ctf import CtfParameters, ctf
from cryorecon.physics.polar import PolarGrid, PolarSlices, PolarTransform, angles_needed
from cryorecon.physics.sphere import frames, lebedev
from cryorecon.run.moments.estimate import MomentsOptions, estimate_moments
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig

MODEL = Path(str(files("cryorecon") / "data" / "4ake_chain_a_heavy.pdb"))


def speed() -> None:
    torch.set_num_threads(1)
    for box, radius in ((64, 16), (64, 31), (128, 16), (128, 32), (256, 32)):
        order = int(0.8 * math.pi * radius) + 2
        grid = PolarGrid(torch.arange(1, radius + 1).double(), angles_needed(radius, order), order)
        transform, images = PolarTransform(box, grid), torch.randn(128, box, box)
        transform.samples(images)
        start = time.perf_counter()
        samples = transform.samples(images)
        middle = time.perf_counter()
        grid.harmonics(samples)
        end = time.perf_counter()
        us = [1e6 * (b - a) / 128 for a, b in ((start, middle), (middle, end))]
        print(f"{box} px, K {radius}, M {order}, {grid.n_angles} angles: "
              f"samples {us[0]:.0f} us, harmonics {us[1]:.0f} us an image")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simulate(MODEL, folder, SimulateConfig(n_particles=10_000, box=64, pixel_size_angst=1.2))
        for form in ("steerable", "full"):
            start, cpu = time.perf_counter(), time.process_time()
            options = MomentsOptions(form=form)
            estimate_moments(folder / "particles.star", folder / f"{form}.h5", options)
            size = (folder / f"{form}.h5").stat().st_size / 1e6
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            print(f"10,000 images of 64 px, {form}, K 16: {wall:.1f} s wall, {cpu:.1f} s CPU, "
                  f"file {size:.1f} MB")  # fmt: skip


def density(directions: torch.Tensor) -> torch.Tensor:
    """The views that `simulate` draws with seed 5, three clusters, kappa 4."""
    draw = np.random.SeedSequence(5).spawn(4)[0].generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(draw >> 1))
    centres = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    centres = torch.nn.functional.normalize(centres, dim=-1)
    peak = 8 / (1 - math.exp(-8))
    return (torch.exp(4 * (directions @ centres.T - 1)) * peak).mean(1)


def accuracy() -> None:
    flat = {
        "defocus_min_angst": 0.0, "defocus_max_angst": 0.0, "spherical_aberration_mm": 0.0,
        "amplitude_contrast": 1.0, "astigmatism_angst": 0.0,
    }  # fmt: skip
    base = SimulateConfig(n_particles=10_000, box=64, pixel_size_angst=2.4, snr=0.02,
                          view_clusters=3, view_concentration=4.0, seed=5)  # fmt: skip
    rule = lebedev(41)
    weights = rule.weights * density(rule.directions)
    truth = None
    for name, changes in (
        ("no CTF", flat),
        ("CTF, astigmatism to 300 A", {}),
        ("CTF, coloured noise", {"noise": "coloured"}),
        ("CTF, origins to 6 A", {"shift_angst": 6.0}),
        ("CTF, SNR 0.1", {"snr": 0.1}),
        ("CTF, box 32 px", {"box": 32, "snr": 0.08}),
    ):
        config = dataclasses.replace(base, **changes)
        with tempfile.TemporaryDirectory() as folder_name:
            folder = Path(folder_name)
            simulate(MODEL, folder, config)
            options = MomentsOptions(diameter_angst=61.0, max_radius=12)
            found = estimate_moments(folder / "particles.star", folder / "m.h5", options)
            volume = torch.from_numpy(read_map(folder / "map.mrc").data.copy())
        if truth is None:
            grid = found.geometry.map_grid(len(volume) * 2.4)
            truth = exact_moments(volume, rule.directions, weights, grid)[1].to(torch.complex128)
        inverse = 1 / found.second_error**2
        scale = float((inverse * (found.second.conj() * truth).real).sum())
        scale /= float((inverse * truth.abs() ** 2).sum())
        error = (found.second - scale * truth).abs()
        relative = float(error.norm() / (scale * truth).norm())
        stated = float(found.second_error.norm() / (scale * truth).norm())
        chi2 = [
            float(((error / found.second_error)[: int(2.5 * k) + 3, k - 1, k - 1] ** 2).mean())
            for k in range(1, 13)
        ]
        print(f"{name}: error {relative:.4f}, stated {stated:.4f}, chi^2 by radius",
              " ".join(f"{c:.1f}" for c in chi2))  # fmt: skip


def astigmatism() -> None:
    """Without noise: one slice of the molecule, turned by 2,000 angles under as many CTFs."""
    geometry = MomentsGeometry("steerable", 64, 2.4, 61.0, 76.25, 16, 42, False, 0.0, True)
    with tempfile.TemporaryDirectory() as name:
        simulate(MODEL, name, SimulateConfig(n_particles=1, box=64, pixel_size_angst=2.4))
        volume = torch.from_numpy(read_map(Path(name) / "map.mrc").data.copy()).double()
    view = torch.nn.functional.normalize(torch.tensor([[0.3, -0.5, 0.8]]), dim=-1)
    slices = PolarSlices(64, geometry.map_grid(64 * 2.4), frames(view), torch.float64)
    s, n, grid = slices.harmonics(volume)[0].T, 2000, geometry.image_grid()
    exact = s[:, :, None] * s[:, None, :].conj()
    generator = torch.Generator().manual_seed(0)
    orders, one = torch.arange(geometry.max_order + 1), torch.ones((), dtype=torch.float64)
    turns = torch.arange(n).double() * (2 * torch.pi / n)
    turned = s * torch.polar(one, turns[:, None] * orders)[..., None]
    waves = torch.polar(one, orders[:, None] * grid.angles)
    mates = (turned * (-1.0) ** orders[:, None]).conj()[:, 1:]
    images = torch.einsum("nmk,mt->nkt", turned, waves)
    images += torch.einsum("nmk,mt->nkt", mates, waves[1:].conj())
    mean = 10_000 + 10_000 * torch.rand(n, generator=generator, dtype=torch.float64)
    angle = 180 * torch.rand(n, generator=generator, dtype=torch.float64)
    same = torch.ones(n, dtype=torch.float64)
    for difference in (300.0, 1000.0, 2000.0, 4000.0):
        optics = CtfParameters(mean + difference / 2, mean - difference / 2, angle, same * 300,
                               same * 2.7, same * 0.1, *[same * 0] * 3)  # fmt: skip
        flat = dataclasses.replace(optics, defocus_u_angst=mean, defocus_v_angst=mean)
        errors = []
        for assumed, blocks in ((optics, True), (optics, False), (flat, True)):
            sums = SteerableSums(geometry, dtype=torch.float64)
            true, used = (
                ctf(sums.frequencies, o, 64, 2.4).view(images.shape) for o in (optics, assumed)
            )
            sums._add_signal(grid.harmonics(images * true * used))
            sums._add_weights(used, torch.zeros(n, 32, dtype=torch.float64))
            sums.n_images = n
            if not blocks:
                sums.arrays["weight"][1:] = 0
            found = sums.finalise().second
            errors.append(
                [
                    float((found - exact)[:, k - 1, k - 1].norm() / exact[:, k - 1, k - 1].norm())
                    for k in (6, 10, 16)
                ]
            )
        print(f"{difference:.0f} A, radii at 12.7, 7.6, 4.8 A:", *(
            f"{label} " + " ".join(f"{e:.4f}" for e in row) + ";"
            for label, row in zip(("solved", "divided", "mean defocus"), errors, strict=True)
        ))  # fmt: skip


if __name__ == "__main__":
    {"speed": speed, "accuracy": accuracy, "astigmatism": astigmatism}[sys.argv[1]]()
