"""Write the golden files of this folder with RELION 3.1.3 (Debian package `relion`).

    python tests/golden/make_golden.py

For boxes of 32 and 33 px: a map, its mirror image, noise-free images of 20 particles with origin
shifts, astigmatism, phase shifts and two optics groups (3.1 dialect) or one (3.0 dialect), and
the map that relion_reconstruct makes of 160 of them; the images again, phase flipped where the
first optics group says so. Also the rotations of some point groups.
"""

import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

from cryorecon.io.atoms import read_atoms
from cryorecon.io.mrc import open_stack, stack_writer, write_map
from cryorecon.io.star import write_star
from cryorecon.physics.fourier import lowpass
from cryorecon.physics.potential import potential_map

HERE = Path(__file__).parent
PIXEL = 2.6


def relion(program: str, *arguments: object, folder: Path) -> None:
    command = [program, *map(str, arguments)]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)


def particles(n: int, seed: int, n_groups: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    mean, half = rng.uniform(9e3, 16e3, n), rng.uniform(200, 1250, n)
    return pd.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@in.mrcs" for i in range(n)],
            "rlnMicrographName": "mic.mrc",
            "rlnOpticsGroup": rng.integers(1, n_groups + 1, n),
            "rlnDefocusU": mean + half,
            "rlnDefocusV": mean - half,
            "rlnDefocusAngle": rng.uniform(-90, 90, n),
            "rlnPhaseShift": rng.uniform(20, 120, n),
            "rlnAngleRot": rng.uniform(-180, 180, n),
            "rlnAngleTilt": np.rad2deg(np.arccos(rng.uniform(-1, 1, n))),
            "rlnAnglePsi": rng.uniform(-180, 180, n),
            "rlnOriginXAngst": rng.uniform(-3, 3, n) * PIXEL,
            "rlnOriginYAngst": rng.uniform(-3, 3, n) * PIXEL,
        }
    )


def optics(box: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "rlnOpticsGroupName": ["first", "second"],
            "rlnOpticsGroup": [1, 2],
            "rlnVoltage": [300.0, 200.0],
            "rlnSphericalAberration": [2.7, 1.4],
            "rlnAmplitudeContrast": [0.1, 0.25],
            "rlnImagePixelSize": PIXEL,
            "rlnImageSize": box,
            "rlnImageDimensionality": 2,
        }
    )


def old_dialect(table: pd.DataFrame) -> pd.DataFrame:
    """The same particles as a RELION 3.0 table: microscope in each row, origins in pixels."""
    old = table.drop(columns=["rlnOpticsGroup"])
    for axis in "XY":
        old[f"rlnOrigin{axis}"] = old.pop(f"rlnOrigin{axis}Angst") / PIXEL
    old["rlnVoltage"], old["rlnSphericalAberration"] = 300.0, 2.7
    old["rlnAmplitudeContrast"] = 0.1
    old["rlnDetectorPixelSize"], old["rlnMagnification"] = 5.0, 5.0e4 / PIXEL
    return old


def project(folder: Path, star: dict[str, pd.DataFrame], box: int, *more: str) -> np.ndarray:
    with stack_writer(folder / "in.mrcs", box, PIXEL) as stack:
        table = star["particles"] if "particles" in star else star[""]
        stack.append(np.zeros((len(table), box, box)))
    write_star(folder / "in.star", star)
    arguments = ["--i", "map.mrc", "--ang", "in.star", "--ctf", "--angpix", PIXEL, "--o", "out"]
    relion("relion_project", *arguments, *more, folder=folder)
    return np.array(open_stack(folder / "out.mrcs"), dtype=np.float32)


def keep(name: str, images: np.ndarray, table: pd.DataFrame) -> None:
    with stack_writer(HERE / f"{name}.mrcs", images.shape[-1], PIXEL) as stack:
        stack.append(images)
    table["rlnImageName"] = [f"{i + 1:06d}@{name}.mrcs" for i in range(len(images))]


def make(box: int, folder: Path) -> None:
    model = str(files("cryorecon") / "data" / "4ake_chain_a_heavy.pdb")
    volume = potential_map(read_atoms(model, b_factor_angst2=60.0), box, PIXEL)
    volume = lowpass(volume.double(), 0.38 * box, 3, 4.0).numpy()
    write_map(folder / "map.mrc", volume, PIXEL)
    (HERE / f"map_{box}.mrc").write_bytes((folder / "map.mrc").read_bytes())
    relion("relion_image_handler", "--i", "map.mrc", "--o", "m.mrc", "--invert_hand", folder=folder)
    (HERE / f"map_{box}_mirrored.mrc").write_bytes((folder / "m.mrc").read_bytes())

    new = particles(20, box, 2)
    keep(f"relion31_{box}", project(folder, {"optics": optics(box), "particles": new}, box), new)
    write_star(HERE / f"relion31_{box}.star", {"optics": optics(box), "particles": new})
    old = old_dialect(particles(20, box + 1, 1))
    keep(f"relion30_{box}", project(folder, {"": old}, box), old)
    write_star(HERE / f"relion30_{box}.star", {"": old})

    if box % 2:  # relion_reconstruct takes even boxes only
        return
    tables = {"optics": optics(box).assign(rlnCtfDataArePhaseFlipped=[1, 0]), "particles": new}
    recorded, flipped = (project(folder, tables, box, *m) for m in ((), ("--ctf_phase_flip",)))
    first = (new["rlnOpticsGroup"] == 1).to_numpy()[:, None, None]
    keep(f"flipped_{box}", np.where(first, flipped, recorded), new)
    write_star(HERE / f"flipped_{box}.star", tables)
    many = particles(160, box + 2, 2)
    tables = {"optics": optics(box), "particles": many}
    images = project(folder, tables, box)
    with stack_writer(folder / "in.mrcs", box, PIXEL) as stack:
        stack.append(images)
    arguments = ["--i", "in.star", "--ctf", "--o", "rec.mrc"]
    relion("relion_reconstruct", *arguments, folder=folder)
    (HERE / f"reconstruct_{box}.mrc").write_bytes((folder / "rec.mrc").read_bytes())
    keep(f"reconstruct_{box}", images, many)
    write_star(HERE / f"reconstruct_{box}.star", tables)


def make_symmetry() -> None:
    """What `relion_refine` prints of its point groups."""
    lines = []
    for name in ("C3", "D2", "D7", "T", "O", "I", "I1", "I2", "I3", "I4"):
        command = ["relion_refine", "--sym", name, "--print_symmetry_ops"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        kept = [line for line in printed.splitlines() if "Running" not in line]
        lines += [f"# {name}", *kept]
    (HERE / "symmetry.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    make_symmetry()
    for box in (32, 33):
        with tempfile.TemporaryDirectory() as name:
            make(box, Path(name))
