"""The two limits of a simulated set: how good can a map, and how good can poses be?

    python examples/benchmarks/limits.py STACK [--diameter 61] [--threads 1]

STACK holds particles.star with the true poses, particles.mrcs and the true map.mrc, as `cryorecon
simulate` writes them. The map's limit is the FSC of the engine's own final map (noise spectra,
Wiener filter from the half maps' agreement, mask) made with the true poses. The poses' limit is
the error of the engine's own refinement against the true map, begun near the true poses.
"""

import argparse
import json
from pathlib import Path

import torch

from cryorecon.conventions import euler_to_matrix
from cryorecon.engines.reconstruction import Reconstruction
from cryorecon.engines.refine import refine_poses
from cryorecon.engines.rmfn import RmfnConfig
from cryorecon.engines.rounds import refine_round
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.maps.fsc import fsc_curve, resolution_at
from cryorecon.physics.fourier import max_band
from cryorecon.physics.masks import Support
from cryorecon.physics.pose_derivatives import derivatives
from cryorecon.physics.rotations import exp_map, geodesic_distance_deg
from cryorecon.run.half_sets import half_sets
from cryorecon.run.load import load_observations
from cryorecon.run.repeats import repeats


def read_truth(stack: Path):
    """Particles, images, map, rotations and offsets in pixels."""
    particles = read_particles(stack / "particles.star")
    truth = torch.from_numpy(read_map(stack / "map.mrc").data).float()
    rotations = euler_to_matrix(torch.from_numpy(particles.euler_deg())).float()
    offsets = torch.from_numpy(particles.origins_angst() / particles.pixel_size_angst).float()
    return particles, truth, rotations, offsets


def true_pose_state(particles, images, config, rotations, offsets) -> Reconstruction:
    """The engine's state after a round at the true poses."""
    generator = torch.Generator().manual_seed(0)
    half = half_sets(particles, generator, repeats(particles, config.diameter))
    box = particles.box
    support = Support(config.diameter / 2)
    blank = torch.zeros(box, box, box)
    state = Reconstruction(
        rotations.clone(), offsets.clone(), half, [blank, blank], max_band(box), support
    )
    refine_round(state, images, config, fsc_curve, joint=True, n_steps=0)
    return state


def pose_limit(images, truth, state, rotations, offsets):
    """Median error (deg) and offset error (px) of refinement against the true map."""
    # The images were normalised: bring the true map to their scale.
    found = (state.maps[0] + state.maps[1]) / 2
    scale = float((found * truth).sum() / (found * found).sum())
    model = derivatives(truth / scale, 2, float(max_band(len(truth))))
    generator = torch.Generator().manual_seed(1)
    errors, misses = [], []
    for rows in torch.arange(len(images)).split(250):
        n = len(rows)
        start = exp_map(0.05 * torch.randn(n, 3, generator=generator)) @ rotations[rows]
        moved = offsets[rows] + 0.5 * torch.randn(n, 2, generator=generator)
        poses = refine_poses(images.select(rows), model, start, moved, 8)
        errors.append(geodesic_distance_deg(poses.rotations, rotations[rows]))
        misses.append((poses.offsets_px - offsets[rows]).norm(dim=-1))
    return float(torch.cat(errors).median()), float(torch.cat(misses).median())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stack", type=Path)
    parser.add_argument("--diameter", type=float, help="angstrom; default 0.8 of the box")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    particles, truth, rotations, offsets = read_truth(args.stack)
    pixel, box = particles.pixel_size_angst, particles.box
    config = RmfnConfig(diameter=(args.diameter or 0.8 * box * pixel) / (box * pixel))
    images = load_observations(particles, config.diameter)
    state = true_pose_state(particles, images, config, rotations, offsets)
    curve = fsc_curve((state.maps[0] + state.maps[1]) / 2, truth)
    degrees, pixels = pose_limit(images, truth, state, rotations, offsets)
    limits = {
        "stack": str(args.stack),
        "n_particles": len(particles),
        "true_poses_fsc_0.5_angst": round(resolution_at(curve, 0.5, box, pixel), 3),
        "true_poses_fsc_0.143_angst": round(resolution_at(curve, 0.143, box, pixel), 3),
        "true_poses_half_maps_0.143_angst": round(resolution_at(state.fsc, 0.143, box, pixel), 3),
        "true_map_pose_error_deg": round(degrees, 3),
        "true_map_offset_error_angst": round(pixels * pixel, 3),
        "fsc": [round(float(c), 4) for c in curve],
    }
    (args.stack / "limits.json").write_text(json.dumps(limits, indent=2))
    print(json.dumps({k: v for k, v in limits.items() if k != "fsc"}, indent=2))


if __name__ == "__main__":
    main()
