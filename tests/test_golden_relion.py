"""Our image model and reconstruction against images and maps that RELION 3.1.3 wrote."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import GOLDEN

from cryorecon.conventions import euler_to_matrix
from cryorecon.io.mrc import read_map
from cryorecon.io.particles import read_particles
from cryorecon.maps.fsc import fsc_curve
from cryorecon.physics.ctf import ctf
from cryorecon.physics.fourier import half_plane
from cryorecon.physics.imaging import render
from cryorecon.run.reconstruct import reconstruct

SETS = [(d, b) for d in ("relion30", "relion31") for b in (32, 33)]


def load(dialect, box):
    particles = read_particles(GOLDEN / f"{dialect}_{box}.star")
    volume = torch.from_numpy(read_map(GOLDEN / f"map_{box}.mrc").data)
    images = torch.from_numpy(particles.images(range(len(particles))))
    if box % 2:
        # relion_project displaces its output by one pixel along x and y when the box is odd
        # (its other programs refuse odd boxes); put it back.
        images = images.roll((-1, -1), (-2, -1))
    return particles, volume, images


def predicted(particles, volume, *, sign=1, optics=None, offset_sign=1, rotations=None):
    box, pixel = particles.box, particles.pixel_size_angst
    if rotations is None:
        rotations = euler_to_matrix(torch.from_numpy(particles.euler_deg()))
    gain = ctf(half_plane(box).frequencies, optics or particles.ctf_parameters(), box, pixel)
    offsets = torch.from_numpy(particles.origins_angst() / pixel) * offset_sign
    return render(volume, rotations.float(), offsets.float(), sign * gain.float())


def correlations(images, expected):
    a, b = images.flatten(1), expected.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1), (a * b).sum(1) / (b * b).sum(1)


@pytest.mark.parametrize(("dialect", "box"), SETS)
def test_prediction_matches_every_image(dialect, box):
    particles, volume, images = load(dialect, box)
    correlation, scale = correlations(images, predicted(particles, volume))
    assert correlation.min() > 0.995
    assert (scale - 1).abs().max() < 0.03


def test_phase_flipped_images_are_matched_where_their_group_says_so():
    particles, volume, images = load("flipped", 32)
    flipped = particles.ctf_parameters().phase_flipped
    assert set(flipped.tolist()) == {0.0, 1.0}
    correlation, scale = correlations(images, predicted(particles, volume))
    assert correlation.min() > 0.995
    assert (scale - 1).abs().max() < 0.03
    optics = dataclasses.replace(particles.ctf_parameters(), phase_flipped=flipped * 0)
    wrong = correlations(images, predicted(particles, volume, optics=optics))[0]
    assert wrong[flipped > 0].max() < 0.97


def wrong_direction(p, v):
    rotations = euler_to_matrix(torch.from_numpy(p.euler_deg())).mT
    return predicted(p, v, rotations=rotations)


def wrong_astigmatism(p, v):
    optics = p.ctf_parameters()
    return predicted(
        p, v, optics=dataclasses.replace(optics, defocus_angle_deg=-optics.defocus_angle_deg)
    )


def wrong_phase(p, v):
    optics = p.ctf_parameters()
    return predicted(
        p, v, optics=dataclasses.replace(optics, phase_shift_deg=-optics.phase_shift_deg)
    )


def swapped_axes(p, v):
    optics = p.ctf_parameters()
    return predicted(
        p,
        v,
        optics=dataclasses.replace(
            optics,
            defocus_u_angst=optics.defocus_v_angst,
            defocus_v_angst=optics.defocus_u_angst,
        ),
    )


def one_optics_group(p, v):
    optics = p.ctf_parameters()
    same = {
        f: getattr(optics, f)[p.optics_index() == 0][:1].expand(len(p))
        for f in ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast")
    }
    return predicted(p, v, optics=dataclasses.replace(optics, **same))


WRONG = {
    "rotation direction": wrong_direction,
    "offset sign": lambda p, v: predicted(p, v, offset_sign=-1),
    "no offsets": lambda p, v: predicted(p, v, offset_sign=0),
    "ctf sign": lambda p, v: predicted(p, v, sign=-1),
    "astigmatism angle": wrong_astigmatism,
    "principal axes swapped": swapped_axes,
    "phase shift sign": wrong_phase,
    "centre one voxel off": lambda p, v: predicted(p, v.roll((1, 1, 1), (0, 1, 2))),
    "handedness": lambda p, v: predicted(p, v.flip(0).roll(1, 0)),
    "one optics group for all": one_optics_group,
}


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_convention_fails(name):
    particles, volume, images = load("relion31", 32)
    correlation, _ = correlations(images, WRONG[name](particles, volume))
    assert correlation.min() < 0.99


def test_reconstruction_matches_relion_reconstruct():
    particles = read_particles(GOLDEN / "reconstruct_32.star")
    theirs = torch.from_numpy(read_map(GOLDEN / "reconstruct_32.mrc").data)
    curve = fsc_curve(reconstruct(particles).volume, theirs)
    assert curve[: int(0.8 * 16) + 1].min() > 0.99
