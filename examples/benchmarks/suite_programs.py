"""The programs of the suite: how each is installed, called, and what it leaves.

A program's steps are commands that `measure.timed` runs one after the other; each has a record and
a log in the run's folder. What they leave is a map and a STAR file of poses, or less.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from peer_relion import initial_model, last, refinement
from suite_cases import HERE, SHIFTS_PX, Case


@dataclass(frozen=True)
class Run:
    """One program on one stack from one seed."""

    case: Case
    stack: Path
    folder: Path
    seed: int
    threads: int
    tools: "Tools"

    @property
    def star(self) -> Path:
        return self.stack / "blind.star"

    @property
    def diameter_angst(self) -> float:
        return self.case.molecule.diameter_angst


@dataclass(frozen=True)
class Step:
    """A command; its record is NAME.json in `folder`, its files lie in folder/NAME."""

    name: str
    folder: Path
    command: list[str]

    @property
    def record(self) -> Path:
        return self.folder / f"{self.name}.json"


@dataclass(frozen=True)
class Found:
    """What a run left: map, poses (of all images or some), and a word on both."""

    map: Path | None = None
    star: Path | None = None
    note: str = ""


@dataclass
class Tools:
    """Where peers are installed: folders of virtual environments, made when first needed."""

    folder: Path
    given: dict[str, Path] = field(default_factory=dict)

    def environment(self, name: str, packages: list[str]) -> Path:
        """The environment's bin folder; torch without CUDA first where no GPU is."""
        place = self.given.get(name, self.folder / name)
        mark = place / "suite_installed"
        if name not in self.given and not mark.exists():
            shutil.rmtree(place, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            pip = [str(place / "bin" / "pip"), "install", "-q"]
            for package in packages:
                words = [*pip, package]
                if package == "torch" and not has_gpu():
                    words += ["--index-url", "https://download.pytorch.org/whl/cpu"]
                if subprocess.run(words, check=False).returncode and package == "torch":
                    subprocess.run([*pip, package], check=True)
            mark.touch()
        return place / "bin"


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


class Ours:
    """An engine of cryorecon with its defaults, told the diameter."""

    peer = False

    def __init__(self, method: str) -> None:
        self.name = method

    def missing(self) -> str | None:
        return None

    def version(self, _tools: Tools) -> str:
        words = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
        words = [sys.executable, "-m", "cryorecon", "--version"]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        return f"{told} {commit}".strip()

    def steps(self, run: Run) -> Iterator[Step]:
        words = [
            sys.executable,
            "-m",
            "cryorecon",
            "abinitio",
            str(run.star),
            "--method",
            self.name,
        ]
        words += ["-o", str(run.folder / "abinitio"), "--diameter", f"{run.diameter_angst:g}"]
        words += ["--seed", str(run.seed), "--threads", str(run.threads), "--overwrite"]
        yield Step("abinitio", run.folder, words)

    def found(self, run: Run) -> Found:
        job = run.folder / "abinitio"
        return Found(job / "initial_model.mrc", job / "run_data.star")


class Relion:
    """Initial model by gradient descent, and the refinement that may follow it."""

    peer = True

    def __init__(self, name: str, refined: bool) -> None:
        self.name, self.refined = name, refined

    def missing(self) -> str | None:
        for command in ("relion_refine", *(["relion_refine_mpi", "mpirun"] * self.refined)):
            if not shutil.which(command):
                return (
                    f"{command} is not on the PATH: install RELION 3.1 (Debian: apt-get install "
                    "relion)"
                )
        return None

    def version(self, _tools: Tools) -> str:
        words = ["relion_refine", "--version"]
        told = subprocess.run(words, capture_output=True, text=True, check=False).stdout
        return "RELION " + "".join(re.findall(r"version: (\S+)", told))

    def steps(self, run: Run) -> Iterator[Step]:
        # RELION's own offsets of +-6 px take a CPU minutes an iteration, 300 of them; 35 to 15 A
        # tell nothing apart on a molecule of 70 A. It is helped in both.
        helped: dict[str, Any] = {"offset_range_px": 4 if SHIFTS_PX[run.case.shifts] else 2}
        if run.diameter_angst < 150:
            helped["resolutions_angst"] = (25, 8)
        home = run.folder.parent.parent / "relion" / run.folder.name
        words = initial_model(
            run.star,
            home / "initial",
            run.diameter_angst,
            threads=run.threads,
            seed=run.seed,
            **helped,
        )
        yield Step("initial", home, words)
        if self.refined:
            model = last(home / "initial", "class001.mrc")
            if model is None:
                return
            words = refinement(
                run.star,
                model,
                run.folder / "refined",
                run.diameter_angst,
                low_pass_angst=min(60.0, round(run.diameter_angst / 4.5)),
                threads=run.threads,
                seed=run.seed,
            )
            yield Step("refined", run.folder, words)

    def found(self, run: Run) -> Found:
        out = run.folder / ("refined" if self.refined else "initial")
        joint = out / "run_class001.mrc"
        if joint.exists():
            return Found(joint, out / "run_data.star")
        star = last(out, "data.star")
        if not self.refined:
            return Found(last(out, "class001.mrc"), star)
        note = f"half map 1 of {star.name[4:9]}" if star else ""
        return Found(last(out, "half1_class001.mrc"), star, note)


class CryoDrgn:
    """Homogeneous ab initio reconstruction; its pose search is made for GPUs."""

    name, peer, packages = "cryodrgn", True, ("torch", "cryodrgn==4.3.1")

    def missing(self) -> str | None:
        return None

    def place(self, tools: Tools) -> Path:
        return tools.environment(self.name, list(self.packages)) / "cryodrgn"

    def version(self, tools: Tools) -> str:
        return installed_version(self.place(tools).parent, "cryodrgn")

    def steps(self, run: Run) -> Iterator[Step]:
        command, out = str(self.place(run.tools)), run.folder
        ctf = out / "ctf.pkl"
        parse = [command, "parse_ctf_star", str(run.star), "-o", str(ctf), "--ps", "0"]
        yield Step("ctf", out, parse)
        words = [command, "abinit", str(run.star), "--datadir", str(run.stack), "--ctf", str(ctf)]
        words += ["--zdim", "0", "-o", str(out / "abinit"), "--log-interval", "16"]
        words += ["--t-extent", "4", "--checkpoint", "1", "--no-analysis", "--num-workers", "0"]
        words += ["--max-threads", str(run.threads), "--seed", str(run.seed)]
        # Mixed precision is for GPUs.
        words += [] if has_gpu() else ["--no-amp"]
        yield Step("abinit", out, words)

    def found(self, run: Run) -> Found:
        out = run.folder / "abinit"
        epoch = max((int(p.stem.split(".")[1]) for p in out.glob("reconstruct.*.mrc")), default=-1)
        note = cryodrgn_rate((run.folder / "abinit.log").read_text())
        if epoch < 1:  # Epoch 0 is a pretraining at random poses.
            return Found(note=note)
        star = run.folder / "poses.star"
        words = [sys.executable, "-m", "cryorecon", "import", str(run.star)]
        words += ["--poses", str(out / f"pose.{epoch}.pkl"), "-o", str(star)]
        star.unlink(missing_ok=True)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return Found(out / f"reconstruct.{epoch}.mrc", star, f"epoch {epoch}; {note}")


def cryodrgn_rate(log: str) -> str:
    """How far the pose search came, and how fast it went, from the log's own times."""
    line = r"\((\d+-\w+-\d+ [\d:]+)\).*# \[Train Epoch: (\d+)/(\d+)\] \[(\d+)/(\d+) particles\]"
    told = [m for m in re.findall(line, log) if int(m[1]) > 0]
    if len(told) < 2:
        return "no pose searched"
    first, final = told[0], told[-1]
    began, now = (datetime.strptime(t[0], "%d-%b-%Y %H:%M:%S") for t in (first, final))
    done = [int(t[1]) * int(t[4]) + int(t[3]) for t in (first, final)]
    rate = (now - began).total_seconds() / max(1, done[1] - done[0])
    hours = rate * int(final[4]) / 3600
    reached = f"epoch {final[1]} of {final[2]}, image {final[3]}"
    return f"{reached}: {rate:.2g} s an image, {hours:.2g} h an epoch"


class Aspire:
    """Class averages oriented by common lines, in ASPIRE's own environment."""

    name, peer, packages = "aspire", True, ("aspire==0.14.3",)

    def missing(self) -> str | None:
        return None

    def python(self, tools: Tools) -> Path:
        return tools.environment(self.name, list(self.packages)) / "python"

    def version(self, tools: Tools) -> str:
        return installed_version(self.python(tools).parent, "aspire")

    def steps(self, run: Run) -> Iterator[Step]:
        words = [str(self.python(run.tools)), "-I", str(HERE / "suite_aspire.py"), str(run.star)]
        words += [str(run.folder / "lines"), "--seed", str(run.seed)]
        yield Step("lines", run.folder, words)

    def found(self, run: Run) -> Found:
        out = run.folder / "lines"
        files = [path if path.exists() else None for path in (out / "map.mrc", out / "poses.star")]
        volume, star = files
        return Found(volume, star, "poses of the class averages")


def installed_version(place: Path, package: str) -> str:
    """Name and version, as pip in that environment says."""
    words = [str(place / "python"), "-m", "pip", "list", "--format", "freeze"]
    told = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return next((w for w in told.split() if w.startswith(f"{package}==")), package)


def environment_of(threads: int, peer: bool) -> dict[str, str]:
    """Variables of a program: as many threads as said, and for a peer no Python path of ours."""
    clean = {k: v for k, v in os.environ.items() if not (peer and k == "PYTHONPATH")}
    return {**clean, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


PROGRAMS = {
    program.name: program
    for program in (
        Ours("rmfn"),
        Ours("amortized"),
        Relion("relion", refined=False),
        Relion("relion-refined", refined=True),
        CryoDrgn(),
        Aspire(),
    )
}
