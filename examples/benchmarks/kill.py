"""Kill ab initio jobs with SIGKILL at random moments, continue them, compare maps bit by bit.

    python examples/benchmarks/kill.py -o killed --kills 5 --seed 0

Every engine runs once undisturbed and once with the given number of kills; a table of where each
kill hit is printed and written to killed/kills.tsv. States are written at every boundary (not every
20 seconds), as the stacks are small. Exits with 1 if a map differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from cryorecon.cli.main import main
from cryorecon.io.mrc import read_map
from cryorecon.run import abinitio, checkpoint, continuing  # noqa: F401  before the forks
from cryorecon.run.simulate import simulate
from cryorecon.run.simulate_config import SimulateConfig

MODEL = Path(str(files("cryorecon") / "data" / "4ake_chain_a_heavy.pdb"))
FEW = ["--set", "half_rounds=4", "--set", "joint_rounds=2", "--set", "search_nside=2"]
SEARCH = [*FEW, "--set", "temperatures=[5,2,1]", "--set", "final_steps=2"]
JOBS = {
    "rmfn": ["abinitio", *SEARCH],
    "rmfn, independent halves, C2": [
        "abinitio-rmfn", "--halves", "independent", "--symmetry", "C2", "--volume", "grid",
        "--starts", "1", *SEARCH,
    ],
    "amortized, subset": [
        "abinitio-amortized", "--images-seen", "6000", "--subset", "200", "--device", "cpu", *FEW,
    ],
    "moments": [
        "abinitio", "--method", "moments", "--allow-ambiguous", "--starts", "2", "--set",
        "iterations=60", "--set", "settling=20", "--set", "radius=5",
    ],
}  # fmt: skip
_FAILED = 99


def child(words: list[str], log: Path) -> int:
    """Run a command of this program in a process of its own; its id.

    A fork: importing the libraries for every kill would take longer than all else.
    """
    number = os.fork()
    if number:
        return number
    status = _FAILED
    try:
        sink = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.argv = ["cryorecon", *words]
        # States at every boundary.
        checkpoint._EVERY_S = checkpoint._TIMES_ITS_COST = 0.0
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os._exit(status)


def wait(number: int, seconds: float) -> int | None:
    """The exit status of a child, or None if it runs on after some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def finished(words: list[str], log: Path) -> float:
    """Run to the end; seconds."""
    begun = time.monotonic()
    if wait(child(words, log), 1e6) != 0:
        raise SystemExit(f"{' '.join(words)} failed:\n{log.read_text()}")
    return time.monotonic() - begun


def killed(words: list[str], log: Path, after_s: float) -> bool:
    """Run, and kill after some time; False if it was done before that."""
    number = child(words, log)
    if wait(number, after_s) is not None:
        return False
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    return True


def last_line(job: Path) -> str:
    lines = (job / "run.log").read_text().splitlines() if (job / "run.log").exists() else []
    return lines[-1][11:70] if lines else "before the log"


def compared(name: str, whole: Path, job: Path, length: float, hits: int) -> str:
    """The row of a job that has ended."""
    one, other = (read_map(path / "initial_model.mrc").data for path in (whole, job))
    same = np.array_equal(one.view(np.int32), other.view(np.int32))
    return f"{name}\tend\t{length:.1f}\t{hits} kills\t{'EQUAL' if same else 'DIFFERENT'}"


def torture(name: str, stack: Path, folder: Path, kills: int, chance: random.Random) -> list[str]:
    """One job undisturbed, one that is killed, anew if it ends first; a row a kill and an end."""
    command, *options = JOBS[name]
    slug = name.replace(",", "").replace(" ", "_")
    whole, job, log = (folder / f"{slug}{end}" for end in ("_whole", "_killed", ".log"))
    length = finished([command, str(stack), "-o", str(whole), *options], log)
    rows, hits = [], 0
    afresh = [command, str(stack), "-o", str(job), *options]
    again = afresh
    while hits < kills:
        # Short enough to hit every stage on the way, long enough to get on.
        delay = chance.uniform(0.02, 2.2) * length / (kills + 1)
        if not killed(again, log, delay):
            rows.append(compared(name, whole, job, length, hits))
            print(rows[-1], flush=True)
            shutil.rmtree(job)
            again = afresh
            continue
        hits += 1
        if (job / "job.yaml").exists():
            again = ["abinitio", "--continue", str(job)]
        kept = "state" if (job / checkpoint.NAME).exists() else "nothing yet"
        rows.append(f"{name}\t{hits}\t{delay:.1f}\t{last_line(job)}\t{kept}")
        print(rows[-1], flush=True)
    finished(["abinitio", "--continue", str(job)], log)
    rows.append(compared(name, whole, job, length, hits))
    print(rows[-1], flush=True)
    return rows


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=6, help="of each job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(JOBS), action="append")
    given = parser.parse_args()
    # The fork of a process that has used more threads would wait for them for ever.
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    stack = given.output / "stack"
    if not stack.exists():
        config = SimulateConfig(
            n_particles=300, box=24, pixel_size_angst=3.2, snr=1.0, shift_angst=4.0, seed=1
        )
        simulate(MODEL, stack, config)
    chance = random.Random(given.seed)
    rows = ["job\tkill\tafter_s\tlast line of run.log\tkept"]
    for name in given.only or JOBS:
        rows += torture(name, stack / "particles.star", given.output, given.kills, chance)
        (given.output / "kills.tsv").write_text("\n".join(rows) + "\n")
    sys.exit(any("DIFFERENT" in row for row in rows))


if __name__ == "__main__":
    run()
