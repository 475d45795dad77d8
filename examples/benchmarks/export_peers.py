"""What other programs make of exported files, beside our own map of the same images and poses.

    python examples/benchmarks/export_peers.py MODEL OUT --cryodrgn PATH [--pixel-size 4]

500 images of 32 px with shifts and astigmatism are simulated and exported. cryoDRGN backprojects
them with poses.pkl and ctf.pkl, and reads the .cs file; RELION reconstructs from both dialects of
STAR where ``relion_reconstruct`` is installed. Told are the FSCs of their maps with that of
``cryorecon reconstruct``, least over the shells up to 0.8 Nyquist, inside the sphere of 0.8 box
sides. As a control cryoDRGN also gets shifts of the wrong sign and transposed rotations.
"""

import argparse
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from cryorecon.io.mrc import read_map
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.masks import soft_ball

BOX, IMAGES = 32, 500


def call(words: list[object], folder: Path, log: str) -> None:
    """Run a program in a folder, its output in a file; with an environment of its own."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with (folder / log).open("w") as file:
        subprocess.run(
            [str(w) for w in words], cwd=folder, env=clean, stdout=file, stderr=file, check=True
        )


def ours(*words: object) -> None:
    """One of our commands."""
    subprocess.run([sys.executable, "-m", "cryorecon", *map(str, words)], check=True)


def least_fsc(first: Path, second: Path) -> str:
    """Least FSC up to 0.8 Nyquist, inside the sphere."""
    a, b = (torch.from_numpy(read_map(path).data) for path in (first, second))
    curve = fsc_curve(a, b, soft_ball(BOX, 0.4 * BOX, 2.0, 3, torch.float32))
    return f"{float(curve[1 : int(0.4 * BOX) + 1].min()):.3f}"


def backproject(command: Path, folder: Path, poses: str, name: str) -> Path:
    """Map that cryoDRGN backprojects."""
    words = [command, "backproject_voxel", "particles.mrcs", "--ctf", "drgn/ctf.pkl"]
    call([*words, "--poses", poses, "-o", name], folder, f"{name}.log")
    return folder / name / "backproject.mrc"


def wrong_poses(folder: Path) -> dict[str, str]:
    """Pose files with one sign wrong each."""
    rotations, shifts = pickle.loads((folder / "drgn/poses.pkl").read_bytes())
    changed = {
        "shifts negated": (rotations, -shifts),
        "rotations transposed": (rotations.transpose(0, 2, 1).copy(), shifts),
    }
    names = {}
    for label, value in changed.items():
        names[label] = f"{label.split()[0]}.pkl"
        (folder / names[label]).write_bytes(pickle.dumps(value))
    return names


def read_back(command: Path, folder: Path) -> None:
    """Say how far cryoDRGN's reading of the .cs file is from the pickles."""
    call([command, "parse_pose_csparc", "p.cs", "-D", BOX, "-o", "cs_poses.pkl"], folder, "cs.log")
    call([command, "parse_ctf_csparc", "p.cs", "-o", "cs_ctf.pkl"], folder, "cs.log")
    read, mine = (
        pickle.loads((folder / name).read_bytes()) for name in ("cs_poses.pkl", "drgn/poses.pkl")
    )
    for label, a, b in zip(("rotations", "shifts (boxes)"), read, mine, strict=True):
        print(f"cryoDRGN on .cs, {label}: largest difference {np.abs(np.asarray(a) - b).max():.1e}")
    read, mine = (
        pickle.loads((folder / name).read_bytes()) for name in ("cs_ctf.pkl", "drgn/ctf.pkl")
    )
    print(f"cryoDRGN on .cs, CTF columns: largest difference {np.abs(read - mine).max():.1e}")


def main() -> None:
    """Simulate, export, run the peers, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cryodrgn", type=Path, required=True)
    parser.add_argument("--pixel-size", type=float, default=4.0)
    parser.add_argument("--snr", type=float, default=1.0)
    args = parser.parse_args()
    folder = args.out.resolve()
    model, command = args.model.absolute(), args.cryodrgn.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # Stacks are named from here: RELION looks for them here.
    ours("simulate", model, "-o", ".", "--n", IMAGES, "--box", BOX, "--seed", 3,
         "--pixel-size", args.pixel_size, "--snr", args.snr, "--offset-range", 4,
         "--astigmatism", 300, "--overwrite")  # fmt: skip
    star = Path("particles.star")
    ours("reconstruct", star, "-o", "own.mrc", "--overwrite")
    for to, name in (("cryodrgn", "drgn"), ("cryosparc", "p.cs"), ("relion", "r31.star")):
        ours("export", star, "-o", name, "--to", to)
    ours("export", star, "-o", "r30.star", "--to", "relion", "--relion30")
    own = folder / "own.mrc"
    print(f"FSC with the true map: ours {least_fsc(own, folder / 'map.mrc')}")
    good = backproject(command, folder, "drgn/poses.pkl", "backproject")
    print(f"cryoDRGN, poses.pkl and ctf.pkl: {least_fsc(own, good)}")
    print(f"  FSC with the true map: {least_fsc(good, folder / 'map.mrc')}")
    for label, poses in wrong_poses(folder).items():
        found = backproject(command, folder, poses, label.split()[0])
        print(f"cryoDRGN, {label}: {least_fsc(own, found)}")
    read_back(command, folder)
    if shutil.which("relion_reconstruct"):
        for name in ("r31", "r30"):
            words = ["relion_reconstruct", "--i", f"{name}.star", "--o", f"{name}.mrc", "--ctf"]
            call([*words, "--angpix", args.pixel_size], folder, f"{name}.log")
            print(f"RELION, {name}.star: {least_fsc(own, folder / f'{name}.mrc')}")


if __name__ == "__main__":
    main()
