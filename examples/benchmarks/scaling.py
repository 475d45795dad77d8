"""What an image and a map cost in a round of refinement, by box: figures of docs/scaling.md.

    python examples/benchmarks/scaling.py [--boxes 32 64 128] [--counts 500 2000]

Random images of each box, no files; CPU time of one thread. Every count goes through pose steps,
insertion and the noise of a round in batches of 250, then one map is solved; assignment is to
the grid of the default search. The last line fits each part's time to a power of the box.
"""

import argparse
import math
import time

import torch

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.least_squares import least_squares_map
from cryorecon.engines.observations import Observations, centred
from cryorecon.engines.reconstruction import RefineConfig, offsets_for
from cryorecon.engines.refine import PoseObjective, Poses, predictions, residual_power
from cryorecon.engines.search import best_grid_pose
from cryorecon.physics.fourier import half_plane, max_band, to_coefficients
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.pose_derivatives import derivatives
from cryorecon.physics.projection import extract_slices, padded_transform
from cryorecon.physics.rotations import random_rotations, so3_grid
from cryorecon.run.load import normalised

BATCH = 250
# Of an image in a round, as counted over a whole run.
EVALUATIONS = 3


def some_images(box: int, n: int, generator: torch.Generator) -> Observations:
    """Noise, which costs what images cost."""
    plane = half_plane(box)
    m = len(plane)
    values = torch.randn(n, m, 2, generator=generator)
    ctf = torch.rand(n, m, generator=generator) * 2 - 1
    noise = torch.full((1, plane.n_shells), 2.0)
    return Observations(plane, torch.view_as_complex(values), ctf, noise, torch.zeros(n).long())


def measured(box: int, count: int) -> dict[str, float]:
    """CPU seconds of each part."""
    generator = torch.Generator().manual_seed(0)
    batch = some_images(box, BATCH, generator)
    plane, band = batch.plane, float(max_band(box))
    volume = torch.randn(box, box, box, generator=generator) * soft_ball(box, 0.4 * box, 2.0, 3)
    rotations = random_rotations(BATCH, generator, torch.float32)
    offsets = torch.zeros(BATCH, 2)
    model = derivatives(volume, 2, band)
    sums = NormalEquations.empty(band, 2, torch.float32, "cpu")
    config = RefineConfig()
    low = batch.within(config.assign_band(box))
    grid = so3_grid(config.search_nside + 1, torch.float32)[0]
    shifts = offsets_for(config, box, float(low.plane.radius[-1]))
    templates = extract_slices(padded_transform(volume), grid, low.plane)
    pixels = torch.randn(64, box, box, generator=generator)
    disc = 1 - soft_ball(box, 0.4 * box, 2.0, 2)
    found = {}

    def timed(name: str, work) -> None:
        start = time.process_time()
        work()
        found[name] = time.process_time() - start

    def steps() -> None:
        for _ in range(count // BATCH):
            objective = PoseObjective(batch, model)
            for _ in range(EVALUATIONS):
                value, *_ = objective(rotations, offsets)
            poses = Poses(rotations, offsets, value)
            residual_power(batch, predictions(batch, model, poses))

    def insert() -> None:
        matched, weight = batch.matched()
        for _ in range(count // BATCH):
            sums.add(centred(matched, offsets, plane), weight, rotations, plane)

    timed("pose steps", steps)
    timed("insertion", insert)
    prior = sums.shell_mean_weight()[: int(band) + 1]
    timed("map", lambda: least_squares_map(sums, prior, torch.ones(box, box, box)))
    timed("assignment", lambda: best_grid_pose(low, templates, shifts))
    found["assignment"] *= count / BATCH
    timed("transform", lambda: to_coefficients(normalised(pixels, disc), plane))
    found["transform"] *= count / len(pixels)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boxes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 2000])
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ["pose steps", "insertion", "assignment", "transform", "map"]
    print(f"| box | images | {' | '.join(f'{n}, ms' for n in names)} |")
    print("|" + "---|" * (len(names) + 2))
    # What is loaded or compiled once takes its time here.
    measured(args.boxes[0], BATCH)
    last: dict[int, dict[str, float]] = {}
    for box in args.boxes:
        for count in args.counts:
            found = measured(box, count)
            each = {n: found[n] / (1 if n == "map" else count) for n in names}
            last[box] = each
            print(f"| {box} | {count} | {' | '.join(f'{1e3 * each[n]:.3g}' for n in names)} |")
    low, high = min(last), max(last)
    if low == high:
        return
    grown = {n: math.log(last[high][n] / last[low][n]) / math.log(high / low) for n in names}
    print("\npower of the box: " + ", ".join(f"{n} {p:.2f}" for n, p in grown.items()))


if __name__ == "__main__":
    main()
