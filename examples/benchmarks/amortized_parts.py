"""What each part of a training step of engine amortized costs, beside the least it could.

    python examples/benchmarks/amortized_parts.py STACK [--set encoder=small ...]

Times every part by itself on one real mini-batch and compares it with its floor: floating-point
operations over the rate of a large matrix product, or bytes over the rate of a large copy, measured
in the same run. Also tells how fast a trained encoder reads poses.
"""

import argparse
import time
from pathlib import Path

import torch
from parts import machine, seconds
from torch.utils.flop_counter import FlopCounterMode

from cryorecon.engines.amortized import Amortized, AmortizedConfig
from cryorecon.io.particles import read_particles
from cryorecon.run.load import load_observations
from cryorecon.run.settings import with_settings


def operations(work) -> int:
    """Floating-point operations of the matrix products and convolutions in some work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def step_parts(run: Amortized, rows: torch.Tensor):
    """(name, work, bytes that must move) of what a step does."""
    whole = run.images.select(rows)
    batch = whole.within(run.band)
    transform = run.decoder.transform(run.band)
    images = run.reader.images(whole)
    guesses = run.reader.of_images(images)
    rotations, offsets = guesses.chosen(run._winners(batch, guesses, transform))
    b, c = guesses.offsets_px.shape[:2]
    # Eight corners of a complex value each; with gradients they are read and written again.
    corners = len(batch.plane) * 8 * 8

    def encode() -> None:
        found = run.reader.of_images(images)
        (found.rotations.square().sum() + found.rotations.sum() + found.offsets_px.sum()).backward()

    def project() -> None:
        drawn = run.reverse.draw(b, whole.plane, run.generator)
        run.reverse.projections(whole, transform, drawn, run.band)

    def compare() -> None:
        fresh = run.decoder.transform(run.band)
        r, o = (x.detach().requires_grad_() for x in (rotations, offsets))
        run._gain(batch, r, o, fresh).mean().backward()

    return [
        ("reading images, as the encoder sees them", lambda: run.reader.images(whole), b * 12e3),
        ("encoder, forward and back", encode, 0),
        (
            f"likeliest of {c} guesses",
            lambda: run._winners(batch, guesses, transform),
            b * c * corners,
        ),
        ("map, slices and likelihood, forward and back", compare, 3 * b * corners),
        ("projections of the map with noise", project, b * corners),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("--set", action="append", default=[], help="engine settings, key=value")
    args = parser.parse_args()
    config = with_settings(AmortizedConfig(), None, args.set)
    particles = read_particles(args.stack / "particles.star")
    images = load_observations(particles, config.diameter)
    pixel = particles.pixel_size_angst
    run = Amortized(config, images, pixel, torch.Generator().manual_seed(0))
    run.seen = config.images_seen
    flops, stream = machine()
    print(
        f"{flops / 1e9:.0f} Gflop/s, {stream / 1e9:.1f} GB/s, {torch.get_num_threads()} threads\n"
    )
    rows = torch.arange(config.batch)
    print(f"| part, {config.batch} images | ms | floor ms | ratio |\n|---|---|---|---|")
    for name, work, size in step_parts(run, rows):
        spent = seconds(work)
        floor = operations(work) / flops + size / stream
        print(f"| {name} | {1e3 * spent:.1f} | {1e3 * floor:.2f} | {spent / floor:.1f} |")
    spent = seconds(run.step)
    print(f"| a whole step | {1e3 * spent:.1f} | | |")
    start = time.perf_counter()
    for part in torch.arange(len(images)).split(500):
        run.read_poses(images, part)
    each = (time.perf_counter() - start) / len(images)
    print(f"\nposes are read at {1e3 * each:.3f} ms an image")


if __name__ == "__main__":
    main()
