"""A map from particles whose poses are in the STAR file: what ``relion_reconstruct`` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cryorecon.conventions import euler_to_matrix
from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.least_squares import wiener_map
from cryorecon.engines.observations import Observations, centred, taken_to
from cryorecon.io.particles import Particles
from cryorecon.physics.ctf import ctf
from cryorecon.physics.fourier import half_plane, max_band, to_coefficients
from cryorecon.physics.masks import soft_ball
from cryorecon.run.load import levelled

_BLOCK = 256


@dataclass(frozen=True)
class Reconstruction:
    """Maps of all particles and of the half sets, on the CPU.

    Attributes
    ----------
    volume : Tensor, shape (N, N, N)
    halves : tuple of two Tensor, or None
    """

    volume: Tensor
    halves: tuple[Tensor, Tensor] | None


def reconstruct(
    particles: Particles,
    *,
    half: Tensor | None = None,
    wiener: float = 1e-3,
    padding: int = 2,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
    """Backproject all images with the poses, origins and CTFs of the STAR file.

    Streams over the images in file order; memory does not grow with their number. The noise is
    taken as white and equal in all images, and each image's level outside the largest disc is taken
    out: large beside the rest, it would spread over the lowest shells.

    Parameters
    ----------
    half : Tensor of 0 and 1, shape (n,), optional
        Half set of each image; without it no half maps are made.
    wiener : float
        Added to each coefficient's weight, as a fraction of its shell's mean weight.
    padding : int
        Oversampling factor of the transform.
    device : torch.device or str
        Where images are transformed and summed.
    progress : callable, optional
        Called with (images done, images in all).
    """
    box = particles.box
    plane, device = half_plane(box).to(device), torch.device(device)
    rotations = euler_to_matrix(torch.from_numpy(particles.euler_deg())).float()
    offsets = torch.from_numpy(particles.origins_angst() / particles.pixel_size_angst).float()
    optics = particles.ctf_parameters()
    noise = torch.ones(1, plane.n_shells, device=device)
    outside = (1 - soft_ball(box, box / 2, 2.0, 2)).to(device)
    sums = [NormalEquations.empty(max_band(box), padding, torch.float32, device) for _ in range(2)]
    labels = torch.zeros(len(particles), dtype=torch.int64) if half is None else half
    done = 0
    for block in particles.in_file_order(_BLOCK):
        rows = torch.from_numpy(block)
        images = levelled(taken_to(torch.from_numpy(particles.images(block)), device), outside)
        optics_there = optics[rows].to(device)
        gain = ctf(plane.frequencies, optics_there, box, particles.pixel_size_angst).float()
        group = torch.zeros(len(rows), dtype=torch.int64, device=device)
        batch = Observations(plane, to_coefficients(images, plane), gain, noise, group)
        matched, weight = batch.matched()
        signal = centred(matched, offsets[rows].to(device), plane)
        for number in (0, 1):
            mine = torch.nonzero(labels[rows] == number)[:, 0]
            if len(mine):
                there, poses = mine.to(device), rotations[rows[mine]].to(device)
                sums[number].add(signal[there], weight[there], poses, plane)
        done += len(rows)
        if progress is not None:
            progress(done, len(particles))

    def solved(equations: NormalEquations) -> Tensor:
        prior = equations.shell_mean_weight()[: max_band(box) + 1] * wiener
        return wiener_map(equations, prior, box).cpu()

    halves = None if half is None else (solved(sums[0]), solved(sums[1]))
    return Reconstruction(solved(sums[0].plus(sums[1])), halves)
