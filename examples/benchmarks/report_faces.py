"""What each warning of a report measures on good maps and on made-up failures.

    python examples/benchmarks/report_faces.py [JOB ...]

Prints one row a map: hollowness, whiteness, mass at the rim, mirror score. Then view spreads.
With job directories, the findings of each.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

import torch

from cryorecon.conventions import euler_to_matrix
from cryorecon.io.atoms import read_atoms
from cryorecon.maps.align import mirror_map
from cryorecon.maps.failures import hollowness, mass_at_rim, view_spread, whiteness
from cryorecon.physics.fourier import lowpass, radius_grid
from cryorecon.physics.masks import soft_ball
from cryorecon.physics.potential import potential_map
from cryorecon.physics.rotations import random_rotations
from cryorecon.physics.symmetry import symmetry_group
from cryorecon.run.report.doubts import findings, mirror_plane
from cryorecon.run.report.inputs import read_job

BOX = 48
GENERATOR = torch.Generator().manual_seed(0)


def blobs(group: str, n: int) -> torch.Tensor:
    """Random Gaussians and their copies under a point group."""
    rotations = symmetry_group(group)
    places = torch.rand(n, 3, generator=GENERATOR).double() * 0.5 * BOX - 0.25 * BOX
    places = (rotations[:, None] @ places[None, :, :, None]).reshape(-1, 3)
    axis = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    waves = [torch.exp(-((axis - places[:, i, None]) ** 2) / 5) for i in range(3)]
    return torch.einsum("px,py,pz->zyx", *waves)


def main() -> None:
    """Print the tables."""
    model = files("cryorecon") / "data" / "4ake_chain_a_heavy.pdb"
    atoms = read_atoms(Path(str(model)), b_factor_angst2=20.0)
    truth = potential_map(atoms, BOX, 76.8 / BOX).double()
    noise = torch.randn(BOX, BOX, BOX, generator=GENERATOR).double() * soft_ball(BOX, 19, 3, 3)
    radius = radius_grid(BOX, 3)
    maps = {
        "4AKE": (truth, 0.4),
        "4AKE, noise of its own variance": (truth + truth.std() * noise, 0.4),
        "4AKE to 15 A": (lowpass(truth, 76.8 / 15, 3), 0.4),
        **{f"25 Gaussians, {g}": (blobs(g, 25 // n + 1), 0.4) for g, n in _GROUPS},
        "shell, 0.25 to 0.375 of the box": (((radius > 12) & (radius < 18)).double(), 0.4),
        "4AKE, black": (-truth, 0.4),
        "noise": (noise, 0.4),
        "4AKE and its mirror image": (truth + mirror_map(truth), 0.4),
        **{
            f"4AKE cut to {2 * r * 76.8:.0f} A": (truth * soft_ball(BOX, r * BOX, 0.07 * BOX, 3), r)
            for r in (0.35, 0.3, 0.25, 0.2)
        },
    }
    for name, (volume, reach) in maps.items():
        print(
            f"{name:34s} {hollowness(volume):6.2f} {whiteness(volume):6.2f} "
            f"{mass_at_rim(volume, reach):6.2f} {mirror_plane(volume).score:6.2f}"
        )
    uniform = random_rotations(2000, GENERATOR)[:, 2]
    cap = uniform[uniform[:, 2].abs() > 0.9]
    tilt = torch.full((2000,), 90.0) + 5 * torch.randn(2000, generator=GENERATOR)
    rot = 360 * torch.rand(2000, generator=GENERATOR)
    side = euler_to_matrix(torch.stack([rot, tilt, rot], -1))[:, 2]
    for name, views in (
        ("uniform, 2000", uniform),
        ("uniform, 50", uniform[:50]),
        ("half of them within 26 degrees of z", torch.cat([uniform[:200], cap[:200]])),
        ("side views, tilt 90 +- 5", side),
        ("within 26 degrees of z", cap),
        ("one direction", uniform[:1].expand(100, 3)),
    ):
        print(f"{name:38s} {view_spread(views):6.2f}")
    for folder in sys.argv[1:]:
        found = findings(read_job(Path(folder)))
        print(
            folder, *(f"{f.name} {f.score:.2f}{' !' if f.fires else ''}" for f in found), sep="; "
        )


_GROUPS = (("C1", 1), ("C4", 4), ("D2", 4), ("O", 24))

if __name__ == "__main__":
    main()
