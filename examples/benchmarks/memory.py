"""Peak memory of the engines' search stages and of averaging moments, by number of particles.

    python examples/benchmarks/memory.py OUT [--counts 10000 100000 1000000] [--engines rmfn ...]

Makes a stack of 2,000 images of 64 px once, then STAR files whose rows refer to these images again
and again, each row with a defocus, coordinates and micrograph of its own, so that the disk holds
any number. Images are read from disk. Each engine and count runs in a process of its own, through
the program's own stages: engine rmfn one start of its search at two temperatures, engine amortized
a training on 12,000 images, moments the average of all images or of the first --averaged.
Tells the peak of the resident memory, of it what is the process's own (the rest is mapped files),
and how long the table took.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

from cryorecon.io.star import read_star, write_star

ENGINES = ("rmfn", "amortized", "moments")
KILOBYTE = 1024
# Images that engine amortized is trained on: several times what it keeps at once.
SEEN = 12_000


def stack_in(folder: Path) -> Path:
    """A folder with the images, simulated if they are not there yet."""
    if not (folder / "particles.star").exists():
        model = str(files("cryorecon") / "data" / "4ake_chain_a_heavy.pdb")
        command = [sys.executable, "-m", "cryorecon", "simulate", model, "-o", str(folder)]
        subprocess.run([*command, "--box", "64", "-n", "2000"], check=True, capture_output=True)
    return folder


def distinct(stack: Path, count: int) -> Path:
    """A STAR file of `count` rows beside the stack: images repeat, their metadata do not."""
    path = stack / f"distinct_{count}.star"
    if path.exists():
        return path
    tables = read_star(stack / "particles.star")
    particles = tables["particles"]
    poses = [c for c in map(str, particles) if c.startswith(("rlnAngle", "rlnOrigin"))]
    particles = particles.drop(columns=poses)
    random = np.random.default_rng(0)

    def pieces() -> Iterator[pd.DataFrame]:
        for start in range(0, count, len(particles)):
            piece = particles[: count - start].copy()
            for column in ("rlnDefocusU", "rlnDefocusV"):
                nearby = particles[column].astype(float)[: len(piece)]
                piece[column] = nearby + random.uniform(-100, 100, len(piece))
            piece["rlnDefocusAngle"] = random.uniform(0, 180, len(piece))
            for axis in "XY":
                piece[f"rlnCoordinate{axis}"] = random.uniform(0, 4096, len(piece))
            row = np.arange(start, start + len(piece))
            piece["rlnMicrographName"] = [f"MotionCorr/job002/mic_{i // 200:06d}.mrc" for i in row]
            yield piece

    write_star(path, {**tables, "particles": pieces()})
    return path


class Watch:
    """Largest resident memory so far, all of it and without mapped files, in MB."""

    def __init__(self) -> None:
        self.own_mb = 0.0
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while True:
            self.own_mb = max(self.own_mb, self._read("RssAnon:") + self._read("RssShmem:"))
            time.sleep(0.05)

    @staticmethod
    def _read(name: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / KILOBYTE
        return 0.0

    def peak_mb(self) -> float:
        """Of the whole process."""
        return self._read("VmHWM:")

    def held_mb(self) -> float:
        """Of the whole process, now."""
        return self._read("VmRSS:")


def _search(star: Path, folder: Path, mark: Callable[[str], None], engine: str) -> None:
    """The job until every image could be given a pose, by the engine's own stages."""
    import torch
    from rich.console import Console

    from cryorecon.engines.amortized import AmortizedConfig
    from cryorecon.engines.rmfn import RmfnConfig
    from cryorecon.run.abinitio import _stages
    from cryorecon.run.abinitio_input import AbinitioOptions, prepared
    from cryorecon.run.half_sets import half_sets
    from cryorecon.run.job import Task, open_job
    from cryorecon.run.load import load_observations
    from cryorecon.run.repeats import repeats
    from cryorecon.run.rmfn_stages import RmfnStages
    from cryorecon.run.stages import HELD_OUT

    short = RmfnConfig(n_starts=1, temperatures=(10.0, 1.0))
    config = short if engine == "rmfn" else AmortizedConfig(images_seen=SEEN)
    options = AbinitioOptions(engine=config, keep="disk")
    mark("begin")
    particles, _, config = prepared(star, options)[:3]
    mark("table")
    task = Task("abinitio", star, len(particles), config, options, 0)
    with open_job(folder, Console(quiet=True), task) as job:
        generator = torch.Generator().manual_seed(0)
        images = load_observations(particles, config.diameter, keep="disk")
        half = half_sets(particles, generator, repeats(particles, config.diameter))
        mark("noise")
        stages = _stages(job, config, generator, options, particles)
        if isinstance(stages, RmfnStages):
            stages.first_map(images)
        else:
            order = torch.randperm(len(images), generator=generator)
            run = stages._new(images.apart(order[HELD_OUT:].sort().values))
            stages._train(run, order)
        del half


def _average(star: Path, folder: Path, mark: Callable[[str], None], n: int) -> None:
    """`moments estimate`, stopped after some images."""
    from cryorecon.io.particles import read_particles
    from cryorecon.run.moments.estimate import MomentsOptions, moments_of
    from cryorecon.run.stopping import Stop, StoppedError

    mark("begin")
    particles = read_particles(star)
    mark("table")
    stop = Stop()

    def look(done: int, _: int) -> None:
        stop.asked = stop.asked or done >= n

    folder.mkdir(parents=True, exist_ok=True)
    try:
        moments_of(particles, folder / "moments.h5", MomentsOptions(), progress=look, stop=stop)
    except StoppedError:
        mark("stopped")


def measured(star: Path, folder: Path, engine: str, averaged: int) -> dict[str, float]:
    """One process: what it needed."""
    watch, start, found = Watch(), time.monotonic(), {}

    def mark(name: str) -> None:
        found[f"{name}_s"] = time.monotonic() - start
        found[f"{name}_mb"] = watch.held_mb()

    if engine == "moments":
        _average(star, folder, mark, averaged)
    else:
        _search(star, folder, mark, engine)
    mark("end")
    return found | {"peak_mb": watch.peak_mb(), "own_mb": watch.own_mb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--averaged", type=int, default=20_000, help="images of moments")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        engine, star = args.engines[0], Path(args.one)
        print(json.dumps(measured(star, args.output, engine, args.averaged)))
        return
    stack = stack_in(args.output / "stack")
    print("| | particles | table, s | us a particle | peak MB | own MB | search or average, s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for engine in args.engines:
        for count in args.counts:
            star = distinct(stack, count)
            command = [sys.executable, __file__, str(args.output / f"{engine}_{count}")]
            command += ["--one", str(star), "--engines", engine, "--averaged", str(args.averaged)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            table = found["table_s"] - found["begin_s"]
            rest = found["end_s"] - found["table_s"]
            print(
                f"| {engine} | {count} | {table:.1f} | {1e6 * table / count:.0f} | "
                f"{found['peak_mb']:.0f} | {found['own_mb']:.0f} | {rest:.0f} |",
                flush=True,
            )
            (args.output / f"{engine}_{count}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
