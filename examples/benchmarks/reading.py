"""How fast each engine reads images, beside a plain sequential read of the same bytes.

    python examples/benchmarks/reading.py OUT [--images 20000] [--shuffle]

Makes a stack of 64 px images (the 2,000 of examples/benchmarks/memory.py again and again) and goes
through it as the engines do: the mini-batches of engine amortized's training, the 1,200 random
images of engine rmfn's search, its assignment and rounds, the blocks of moments. "Reading" is
what brings pixels to memory, checked for NaN; "coefficients" adds normalising, the Fourier
transform and the CTF, while the next images are read. Cold: the kernel is told to forget the file
before; wall time counts, and a plain read goes before each, since a disk's speed changes within
minutes. Warm: the file is in the page cache; CPU time counts, so that other programs on the machine
matter less. "Waiting" is the wall time that cold coefficients take beyond warm ones.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from memory import stack_in

from cryorecon.engines.amortized import AmortizedConfig
from cryorecon.engines.observations import ImageSet
from cryorecon.engines.stream import Stream, read_ahead
from cryorecon.io.mrc import open_stack, stack_writer
from cryorecon.io.particles import Particles, read_particles
from cryorecon.io.read_ahead import ReadAhead
from cryorecon.io.star import read_star, write_star
from cryorecon.run.load import load_observations, with_next

BATCH = AmortizedConfig().batch
CHUNK = 1 << 20


def long_stack(folder: Path, count: int, shuffle: bool) -> tuple[Path, Path]:
    """STAR file and stack of `count` images that repeat, each with a place of its own on disk."""
    stack, star = folder / f"long_{count}.mrcs", folder / f"long_{count}_{int(shuffle)}.star"
    source = stack_in(folder / "stack")
    if not stack.exists():
        images = np.asarray(open_stack(source / "particles.mrcs"))
        with stack_writer(stack, images.shape[1], 1.5) as writer:
            for start in range(0, count, len(images)):
                writer.append(images[: count - start])
    tables = read_star(source / "particles.star")
    few = tables["particles"]
    table = few.iloc[np.arange(count) % len(few)].reset_index(drop=True)
    table["rlnImageName"] = [f"{i + 1:06d}@{stack.resolve()}" for i in range(count)]
    if shuffle:
        table = table.sample(frac=1, random_state=0)
    write_star(star, {**tables, "particles": table})
    return star, stack


def plain(stack: Path) -> int:
    """Read a file from its beginning to its end into one buffer; its bytes."""
    buffer, done = memoryview(bytearray(CHUNK)), 0
    with stack.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            done += count
    return done


class OnlyRead:
    """A source of images of which nothing is made once they are read."""

    def __init__(self, particles: Particles) -> None:
        self.images = ReadAhead(particles)

    def expect(self, rows: torch.Tensor) -> None:
        self.images.expect(rows.numpy())

    def ready(self, rows: torch.Tensor) -> bool:
        return self.images.ready(rows.numpy())

    def __call__(self, rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.images.images(rows.numpy())
        nothing = torch.zeros(len(rows), count)
        return nothing, nothing


def training(images: ImageSet, ahead: bool) -> Iterator[int]:
    """One pass of engine amortized; by single images, or block by block."""
    generator = torch.Generator().manual_seed(0)
    source = read_ahead(images) if ahead else images
    stream = Stream(len(images), BATCH, images.pixels, generator)
    for rows in islice(stream, len(images) // BATCH):
        source.select(rows)
        if ahead:
            source.expect(stream.upcoming)
        yield len(rows)


def in_order(images: ImageSet) -> Iterator[int]:
    """An assignment, or a round of refinement."""
    parts = images.in_file_order(torch.arange(len(images))).split(500)
    for rows, following in with_next(parts):
        images.expect(following)
        images.select(rows)
        yield len(rows)


def search(images: ImageSet) -> Iterator[int]:
    """The random images of a search."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:1200]
    images.select(order)
    yield len(order)


def moments(particles: Particles) -> Iterator[int]:
    """One pass."""
    ahead = ReadAhead(particles)
    parts = map(torch.from_numpy, particles.in_file_order(128))
    for rows, following in with_next(parts):
        ahead.expect(following.numpy())
        ahead.images(rows.numpy())
        yield len(rows)


def counted(images: Callable[[], Iterator[int]], size: int) -> int:
    """Bytes of all images that one pass yields."""
    return size * sum(images())


def forget(stack: Path) -> None:
    """Have the kernel drop a file from its cache."""
    with stack.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(work: Callable[[], int], stack: Path) -> float:
    """Bytes a second of wall time, none of them in the page cache."""
    forget(stack)
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def warm(work: Callable[[], int], repeats: int) -> float:
    """Bytes a second of CPU time from the page cache, the best of some runs."""
    work()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        found.append(work() / (time.process_time() - start))
    return max(found)


def waiting(work: Callable[[], int], stack: Path, repeats: int) -> float:
    """Share of the wall time from disk that is not taken from the page cache; medians."""
    slow, fast = [], []
    for _ in range(repeats):
        slow.append(1 / cold(work, stack))
        start = time.perf_counter()
        size = work()
        fast.append((time.perf_counter() - start) / size)
    return 1 - statistics.median(fast) / statistics.median(slow)


def beside_plain(work: Callable[[], int], stack: Path, repeats: int) -> tuple[float, float]:
    """Bytes a second, cold, and their ratio to a plain read's just before: medians of some runs."""
    rates, ratios = [], []
    for _ in range(repeats):
        floor = cold(lambda: plain(stack), stack)
        rates.append(cold(work, stack))
        ratios.append(rates[-1] / floor)
    return statistics.median(rates), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shuffle", action="store_true", help="rows of the table in random order")
    args = parser.parse_args()
    torch.set_num_threads(1)
    star, stack = long_stack(args.output, args.images, args.shuffle)
    particles = read_particles(star)
    images = load_observations(particles, 0.8, keep="disk")
    near = images.within(13.0)
    raw = dataclasses.replace(images.within(0.0), source=OnlyRead(particles))
    size = 4 * particles.box**2
    ways: list[tuple[str, Callable[[], Iterator[int]], Callable[[], Iterator[int]] | None]] = [
        ("training, single images", lambda: training(raw, False), lambda: training(near, False)),
        ("training, blocks read ahead", lambda: training(raw, True), lambda: training(near, True)),
        ("search, 1,200 images", lambda: search(raw), lambda: search(near)),
        ("assignment", lambda: in_order(raw), lambda: in_order(near)),
        ("round", lambda: in_order(raw), lambda: in_order(images)),
        ("moments", lambda: moments(particles), None),
    ]
    floor = warm(lambda: plain(stack), args.repeats)
    head = (
        "GB/s (of the plain read)",
        "reading, cold",
        "reading, warm",
        "coefficients, warm",
        "waiting",
    )
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    print(f"| plain sequential read | | {floor / 1e9:.2f} (1) | | |", flush=True)
    for name, reading, transformed in ways:
        once = partial(counted, reading, size)
        rate, ratio = beside_plain(once, stack, args.repeats)
        fast = warm(once, args.repeats)
        cells = [f"{rate / 1e9:.2f} ({ratio:.2f})", f"{fast / 1e9:.2f} ({fast / floor:.2f})"]
        if transformed is not None:
            once = partial(counted, transformed, size)
            made = warm(once, 1)
            cells.append(f"{made / 1e9:.2f}, {1e6 * size / made:.0f} us an image")
            cells.append(f"{100 * waiting(once, stack, 3):.0f} %")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
