"""What each part of engine rmfn costs on this machine, beside the least it could.

    python examples/benchmarks/parts.py STACK [--diameter 61]

Times every part by itself on real images and compares it with its floor: floating-point operations
over the rate of a large matrix product, or bytes over the rate of a large copy, measured in the
same run. CPU time counts, so that other programs on the machine matter less. Prints a table; the
last columns say how often a default run does the part and what that comes to.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from limits import read_truth

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.fine_search import FineSearch
from cryorecon.engines.least_squares import least_squares_map
from cryorecon.engines.observations import centred
from cryorecon.engines.refine import PoseObjective
from cryorecon.engines.rmfn import RmfnConfig, Search
from cryorecon.engines.search import accumulate_grid, grid_expectation
from cryorecon.physics.fourier import max_band
from cryorecon.physics.pose_derivatives import derivatives
from cryorecon.physics.projection import extract_slices, padded_transform
from cryorecon.run.load import load_observations
from cryorecon.run.stages import HELD_OUT

BATCH = 250
# Of an image in a round, as counted over a whole run.
EVALUATIONS = 3
# Of the search that goes on, where it is easy.
FINE_EPOCHS = 3


def seconds(work, repeats: int = 5) -> float:
    """Least CPU time, of all threads, of some runs after one that does not count."""
    work()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def machine() -> tuple[float, float]:
    """Operations a second of a 2048^3 matrix product, bytes a second of a 256 MB copy."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source, target = torch.randn(64_000_000), torch.empty(64_000_000)
    product = seconds(lambda: a @ b)
    copy = seconds(lambda: target.copy_(source))
    return 2 * 2048**3 / product, 2 * 4 * 64e6 / copy


def grid_parts(search, where, batches):
    """(name, seconds, operations, bytes, times) of a mini-batch against all poses of a grid."""
    batch = search.observations.select(torch.arange(search.config.search_batch))
    plane, grid, offsets = batch.plane, search.grid, search.offsets
    with torch.no_grad():
        transform = padded_transform(search.network.volume(0), band=search.band)
    templates = extract_slices(transform, grid, plane)
    signal, weight = grid_expectation(batch, templates, offsets)[1:]
    n, r, s, m = len(batch), len(grid), len(offsets), len(plane)
    sums = accumulate_grid(signal, weight, grid, plane)
    parts = [
        (
            f"slices of the grid, {where}",
            seconds(lambda: extract_slices(transform, grid, plane)),
            0,
            r * m * 8 * 8,
            batches,
        ),
        (
            f"posterior and its sums, {where}",
            seconds(lambda: grid_expectation(batch, templates, offsets)),
            2 * 2 * n * s * r * 3 * m + 20 * n * s * r,
            0,
            batches,
        ),
        (
            f"insertion of the sums, {where}",
            seconds(lambda: accumulate_grid(signal, weight, grid, plane)),
            0,
            r * m * 8 * 3 * 8,
            batches,
        ),
    ]
    return parts, sums


def search_parts(images, config):
    """The parts of a mini-batch of the starts, and of one of the search that goes on."""
    generator = torch.Generator().manual_seed(0)
    box, size = images.plane.box, config.search_batch
    band, fine_band = config.search_band(box), config.fine_band(box)
    search = Search(config, images.select(torch.arange(1000), band), generator)
    batches = len(config.temperatures) * 1000 // size * config.n_starts
    parts, sums = grid_parts(search, f"shell {band}", batches)
    side, width = search.network.grid_size(0), config.width
    structure = (
        f"structure step, {side}^3 points",
        seconds(lambda: search._follow(sums, 4)) / 4,
        3 * 2 * side**3 * (2 * width**2 + 4 * width),
        0,
        batches * config.fit.n_steps,
    )
    seen = images.select(torch.arange(1000), fine_band)
    with torch.no_grad():
        volume = search.network.volume(0)
    known = {"held_out": seen, "start": volume, "unexplained": search.excess}
    fine = FineSearch(config, seen, generator, **known)
    batches = FINE_EPOCHS * min(config.fine_images, len(images) - HELD_OUT) // size
    return [*parts, structure, *grid_parts(fine, f"shell {fine_band}", batches)[0]]


def refine_parts(images, truth, rotations, offsets, rounds: int = 8):
    """The same of a round of refinement at full band."""
    box, n = images.plane.box, len(images)
    batch = images.select(torch.arange(BATCH))
    m = len(batch.plane)
    model = derivatives(truth, 2, float(max_band(box)))
    a, o = rotations[:BATCH], offsets[:BATCH]
    objective = PoseObjective(batch, model)
    sums = NormalEquations.empty(max_band(box), 2, torch.float32, "cpu")
    matched, weight = batch.matched()
    signal = centred(matched, o, batch.plane)
    sums.add(signal, weight, a, batch.plane)
    prior = sums.shell_mean_weight()[: max_band(box) + 1]
    support = torch.ones(box, box, box)
    size = (2 * box) ** 3
    batches = math.ceil(n / BATCH) * rounds
    return [
        (
            f"pose step, {BATCH} images",
            seconds(lambda: objective(a, o)),
            BATCH * 2 * m * 2 * 25,
            BATCH * m * 8 * 8 * 4,
            batches * EVALUATIONS,
        ),
        (
            f"insertion, {BATCH} images",
            seconds(lambda: sums.add(signal, weight, a, batch.plane)),
            0,
            BATCH * m * 8 * 3 * 8,
            batches,
        ),
        (
            "map from its equations",
            seconds(lambda: least_squares_map(sums, prior, support)),
            16 * 2.5 * size * math.log2(size),
            0,
            RmfnConfig().joint_rounds,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("--diameter", type=float, help="angstrom; default 0.8 of the box")
    args = parser.parse_args()
    particles, truth, rotations, offsets = read_truth(args.stack)
    side_angst = particles.box * particles.pixel_size_angst
    config = RmfnConfig(diameter=(args.diameter or 0.8 * side_angst) / side_angst)
    flops, stream = machine()
    print(
        f"{flops / 1e9:.0f} Gflop/s, {stream / 1e9:.1f} GB/s, {torch.get_num_threads()} threads\n"
    )
    start = time.process_time()
    images = load_observations(particles, config.diameter)
    reading = time.process_time() - start
    pixels = len(images) * particles.box**2
    parts = [("reading all images", reading, 5 * pixels * math.log2(pixels), 12 * pixels, 1)]
    parts += search_parts(images, config)
    parts += refine_parts(images, truth, rotations, offsets)
    print("| part | ms | floor ms | ratio | times a run | s a run |\n|---|---|---|---|---|---|")
    for name, spent, operations, size, times in parts:
        floor = operations / flops + size / stream
        print(
            f"| {name} | {1e3 * spent:.1f} | {1e3 * floor:.1f} | {spent / floor:.1f} | {times} | "
            f"{spent * times:.1f} |"
        )


if __name__ == "__main__":
    main()
