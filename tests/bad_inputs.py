"""What the tests of bad input share: a small project, damage to its files, and a watch over each
command: its end, its time, its memory, what it writes."""

from __future__ import annotations

import importlib
import os
import pkgutil
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import typer
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import cryorecon.run
from cryorecon.cli.main import app
from cryorecon.errors import CryoreconError
from cryorecon.io.mrc import stack_writer, write_map
from cryorecon.io.star import write_star

BOX, COUNT, PIXEL = 16, 6, 2.0
# Libraries take memory and time as they are loaded: before any command is watched.
for module in pkgutil.iter_modules(cryorecon.run.__path__):
    importlib.import_module(f"cryorecon.run.{module.name}")
_COMMAND = typer.main.get_command(app)
# Generous: other programs share the cores.
_DEADLINE_S = 120.0
_MOST_CPU_S = 10.0
_MOST_MEMORY = 2**29
# A longer search: CRYORECON_FUZZ=20 takes twenty times as many cases, others each time.
_FACTOR = int(os.environ.get("CRYORECON_FUZZ", "1"))


def cases(count: int) -> settings:
    """Settings of hypothesis for `count` cases, the same ones in each run."""
    return settings(
        max_examples=count * _FACTOR,
        derandomize=_FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )


class HangError(BaseException):
    """A command took too long."""


def _alarm(*_: object) -> None:
    raise HangError(f"no end after {_DEADLINE_S} s")


@contextmanager
def watched() -> Iterator[None]:
    """An end, soon; and no more than half a gigabyte beyond what is taken already."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, _DEADLINE_S)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MOST_MEMORY, -1))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - start < _MOST_CPU_S


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below a folder, but for its folder `out`."""
    found = {}
    for place, folders, files in os.walk(folder):
        if Path(place) == folder:
            folders[:] = [name for name in folders if name != "out"]
        for name in [*folders, *files]:
            told = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (told.st_size, told.st_mtime_ns)
    return found


def is_told(error: BaseException, folder: Path, arguments: tuple[object, ...] = ()) -> bool:
    """Whether an error is two sentences that name a file and what to do."""
    if not isinstance(error, CryoreconError) or not error.remedy or "\n" in str(error):
        return False
    names = [path.name for path in folder.rglob("*")] + [folder.name]
    names += [Path(str(a)).name for a in arguments if "." in str(a)]
    return len(str(error)) < 2000 and any(name in error.problem for name in names)


def run(folder: Path, *arguments: object) -> Result:
    """Run a command on files of a folder: it ends well, or by two sentences, or as wrong usage."""
    (folder / "out").mkdir(exist_ok=True)
    before = contents(folder)
    with watched():
        result = CliRunner().invoke(_COMMAND, [str(a) for a in arguments])
    assert contents(folder) == before, "something outside the output folder has changed"
    assert not (folder / "canary").exists(), "a file's code was run"
    error = result.exception
    if error is None or (isinstance(error, SystemExit) and error.code in (0, 2)):
        return result
    if not is_told(error, folder, arguments):
        raise AssertionError(f"{arguments}: {error!r}") from error
    return result


def tell(folder: Path, function: object, *arguments: object) -> object:
    """Call a reader: what it returns, or the error that names a file and what to do."""
    assert callable(function)
    before = contents(folder)
    try:
        with watched():
            return function(*arguments)
    except Exception as error:
        if not is_told(error, folder):
            raise
        return error
    finally:
        assert contents(folder) == before
        assert not (folder / "canary").exists()


def particle_table(stack: str = "s.mrcs") -> dict[str, pd.DataFrame]:
    """Optics and particles of RELION 3.1, with poses."""
    random = np.random.default_rng(2)
    optics = pd.DataFrame(
        {
            "rlnOpticsGroup": [1, 2],
            "rlnOpticsGroupName": ["a", "b"],
            "rlnVoltage": [300.0, 200.0],
            "rlnSphericalAberration": 2.7,
            "rlnAmplitudeContrast": 0.1,
            "rlnImagePixelSize": PIXEL,
            "rlnImageSize": BOX,
        }
    )
    table = {
        "rlnImageName": [f"{i + 1:06d}@{stack}" for i in range(COUNT)],
        "rlnMicrographName": "m.mrc",
        "rlnOpticsGroup": 1 + np.arange(COUNT) % 2,
        "rlnRandomSubset": 1 + np.arange(COUNT) // 3,
        "rlnDefocusU": random.uniform(9e3, 2e4, COUNT),
        "rlnDefocusV": random.uniform(9e3, 2e4, COUNT),
        "rlnDefocusAngle": random.uniform(-90, 90, COUNT),
        "rlnOriginXAngst": random.uniform(-4, 4, COUNT),
        "rlnOriginYAngst": random.uniform(-4, 4, COUNT),
    }
    for name in ("Rot", "Tilt", "Psi"):
        table[f"rlnAngle{name}"] = random.uniform(0, 170, COUNT)
    return {"optics": optics, "particles": pd.DataFrame(table)}


ATOMS = """\
ATOM      1  N   ALA A   1      11.104   6.134  -6.504  1.00 20.00           N
ATOM      2  CA AALA A   1      11.639   6.071  -5.147  0.60 20.00           C
ATOM      3  CA BALA A   1      11.700   6.200  -5.100  0.40 20.00           C
ATOM      4  C   ALA A   1      10.577   6.498  -4.140  1.00 20.00           C
ATOM      5  O   ALA A   1       9.411   6.100  -4.200  1.00 20.00           O
ATOM      6  SD  MET A   2       7.000   4.000  -2.000  1.00 20.00           S
HETATM    7  O   HOH A   3       3.000   4.000  -2.000  1.00 20.00           O
END
"""


def project(folder: Path) -> Path:
    """One undamaged file of each kind; the folder."""
    random = np.random.default_rng(1)
    images = random.standard_normal((COUNT, BOX, BOX)).astype(np.float32)
    with stack_writer(folder / "s.mrcs", BOX, PIXEL) as stack:
        stack.append(images)
    tables = particle_table()
    write_star(folder / "good.star", tables)
    write_star(folder / "p.star", tables)
    old = tables["particles"].drop(columns=["rlnOpticsGroup"])
    old["rlnVoltage"], old["rlnSphericalAberration"], old["rlnAmplitudeContrast"] = 300, 2.7, 0.1
    old["rlnDetectorPixelSize"], old["rlnMagnification"] = PIXEL, 10_000
    write_star(folder / "old.star", {"": old})
    ball = np.linalg.norm(np.indices((BOX,) * 3) - BOX / 2, axis=0) < 5
    write_map(folder / "good.mrc", ball + 0.1 * random.random(ball.shape), PIXEL)
    (folder / "m.pdb").write_text(ATOMS)
    return folder


def damaged(data: st.DataObject, raw: bytes) -> bytes:
    """Bytes with a few of them changed, cut, repeated, taken out or put in."""
    out = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3), "damages")):
        at = data.draw(st.integers(0, max(len(out) - 1, 0)), "at")
        kind = data.draw(st.sampled_from(["bit", "bytes", "cut", "repeat", "drop", "zero"]), "kind")
        length = data.draw(st.sampled_from([1, 2, 4, 8, 100]), "length")
        if kind == "bit" and out:
            out[at] ^= 1 << data.draw(st.integers(0, 7), "bit")
        elif kind == "bytes":
            out[at : at + length] = data.draw(st.binary(min_size=1, max_size=8), "new")
        elif kind == "cut":
            del out[at:]
        elif kind == "repeat":
            out[at:at] = out[at : at + length]
        elif kind == "drop":
            del out[at : at + length]
        else:
            out[at : at + length] = bytes(min(length, len(out) - at))
    return bytes(out)


def moments_file(folder: Path, arguments: tuple[object, ...] = ()) -> Path:
    """A small finished moments file of good.star."""
    path = folder / "good.h5"
    given = ["-o", path, "--max-radius", 3, "--diameter", 22, *arguments]
    result = CliRunner().invoke(
        _COMMAND, [str(a) for a in ("moments", "estimate", folder / "good.star", *given)]
    )
    assert result.exit_code == 0, result.output
    assert h5py.is_hdf5(path)
    return path


def whole_project(folder: Path) -> Path:
    """The small project with its moments and the neighbours' files of the same particles."""
    project(folder)
    moments_file(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for kind, name in (("cryosparc", "out/good.cs"), ("cryodrgn", "out")):
            assert run(folder, "export", "good.star", "-o", name, "--to", kind).exit_code == 0
    finally:
        os.chdir(before)
    for name in ("good.cs", "poses.pkl", "ctf.pkl"):
        shutil.move(folder / "out" / name, folder / name)
    shutil.rmtree(folder / "out")
    return folder
