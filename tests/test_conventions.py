"""One test for each sentence of the docstring of cryorecon.conventions."""

from __future__ import annotations

import math

import mrcfile
import numpy as np
import pytest
import torch
from conftest import GOLDEN
from scipy.spatial.transform import Rotation

from cryorecon import conventions as law
from cryorecon.io.mrc import read_map, write_map
from cryorecon.io.particles import read_particles
from cryorecon.maps.align import mirror_map
from cryorecon.physics.ctf import CtfParameters, ctf
from cryorecon.physics.fourier import half_plane, lowpass
from cryorecon.physics.imaging import render
from cryorecon.physics.resampling import downsample_images
from cryorecon.physics.rotations import random_rotations


def test_arrays_are_zyx_and_matrices_act_on_xyz():
    """A blob on the x axis of the map, seen unrotated, lies on the x axis of the image."""
    volume = torch.zeros(17, 17, 17)
    volume[8, 8, 8 + 4] = 1
    image = render(volume, torch.eye(3)[None], padding=4)[0]
    assert torch.unravel_index(image.argmax(), image.shape) == (8, 12)
    turned = law.euler_to_matrix(torch.tensor([[0.0, 0.0, -90.0]]))  # A = Rz(90): x to y
    image = render(volume, turned, padding=4)[0]
    assert torch.unravel_index(image.argmax(), image.shape) == (12, 8)


@pytest.mark.parametrize("box", [16, 17])
def test_the_centre_is_sample_n_over_2(box):
    volume = torch.zeros(box, box, box)
    volume[box // 2, box // 2, box // 2] = 1
    angles = torch.tensor([[10.0, 40.0, 70.0], [200.0, 130.0, 5.0]])
    for image in render(volume, law.euler_to_matrix(angles), padding=4):
        assert torch.unravel_index(image.argmax(), image.shape) == (box // 2, box // 2)


@pytest.mark.parametrize(("size", "box"), [(40, 32), (41, 32), (40, 31)])
def test_fourier_cropping_keeps_values_width_and_centre(size, box):
    def wave(n):
        """One value a position, whatever the grid: 5 at the centre of the box."""
        x = (torch.arange(n, dtype=torch.float64) - n // 2) / n
        line = torch.cos(2 * torch.pi * 3 * x) + torch.sin(2 * torch.pi * 2 * x)
        return 4 + line[:, None] * line

    found = downsample_images(wave(size)[None], box)[0]
    assert float(found[box // 2, box // 2]) == pytest.approx(5)
    torch.testing.assert_close(found, wave(box))


def test_a_is_rz_minus_psi_ry_minus_tilt_rz_minus_rot():
    rng = np.random.default_rng(0)
    angles = rng.uniform([-180, 0, -180], [180, 180, 180], (200, 3))
    expected = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix().transpose(0, 2, 1)
    found = law.euler_to_matrix(torch.from_numpy(angles))
    assert np.allclose(found, expected, atol=1e-12)
    assert torch.allclose(law.matrix_to_euler(found), torch.from_numpy(angles), atol=1e-9)


@pytest.mark.parametrize("tilt", [0.0, 180.0])
def test_euler_angles_at_the_poles_give_the_same_matrix(tilt):
    for rot, psi in ((30.0, 50.0), (-170.0, 20.0)):
        matrix = law.euler_to_matrix(torch.tensor([[rot, tilt, psi]], dtype=torch.float64))
        again = law.euler_to_matrix(law.matrix_to_euler(matrix))
        assert torch.allclose(again, matrix, atol=1e-12)


@pytest.mark.parametrize("tilt", [0.0, 1e-6, 1e-4, 0.01, 179.9999, 180.0])
def test_euler_angles_near_the_poles_survive_rounding(tilt):
    """Of top views as a program in single precision writes them, rot and psi have one right sum."""
    generator = torch.Generator().manual_seed(0)
    angles = 360 * torch.rand(200, 3, generator=generator, dtype=torch.float64) - 180
    angles[:, 1] = tilt
    turn = random_rotations(200, generator).float()
    rounded = ((law.euler_to_matrix(angles).float() @ turn) @ turn.mT).double()
    again = law.euler_to_matrix(law.matrix_to_euler(rounded))
    assert (again - rounded).abs().max() < 1e-6


def test_an_image_is_a_sum_over_z(molecule_32):
    volume = lowpass(molecule_32, 12, 3)
    image = render(volume, torch.eye(3)[None], padding=4)[0]
    expected = volume.sum(0)
    assert (image - expected).norm() < 0.02 * expected.norm()


def test_content_moves_by_minus_the_origin(molecule_32):
    still = render(molecule_32, torch.eye(3)[None])[0]
    moved = render(molecule_32, torch.eye(3)[None], torch.tensor([[3.0, -2.0]]))[0]
    assert torch.allclose(moved, still.roll((2, -3), (0, 1)), atol=1e-3 * float(still.max()))


def test_the_ctf_at_zero_frequency_is_plus_the_amplitude_contrast():
    one = torch.ones(1, dtype=torch.float64)
    optics = CtfParameters(
        one * 15000, one * 14000, one * 20, one * 300, one * 2.7, one * 0.07, *[one * 0] * 3
    )
    value = ctf(torch.zeros(1, 2), optics, 64, 1.0)
    assert float(value) == pytest.approx(0.07)


def test_the_ctf_of_phase_flipped_images_is_its_magnitude():
    one, plane = torch.ones(2, dtype=torch.float64), half_plane(32)
    flipped = torch.tensor([0.0, 1.0], dtype=torch.float64)
    optics = CtfParameters(
        one * 15000,
        one * 14000,
        one * 20,
        one * 300,
        one * 2.7,
        one * 0.07,
        *[one * 0] * 2,
        flipped,
    )
    recorded, found = ctf(plane.frequencies, optics, 32, 2.0)
    assert recorded.min() < -0.9
    assert torch.equal(found, recorded.abs())


def test_maps_have_voxel_size_origin_0_and_nstart_0(tmp_path):
    write_map(tmp_path / "m.mrc", np.random.default_rng(0).random((9, 9, 9)), 1.7)
    with mrcfile.open(tmp_path / "m.mrc") as ours, mrcfile.open(GOLDEN / "map_32.mrc") as relion:
        for file, pixel in ((ours, 1.7), (relion, 2.6)):
            assert float(file.voxel_size.x) == pytest.approx(pixel)
            header = file.header
            assert (int(header.nxstart), int(header.nystart), int(header.nzstart)) == (0, 0, 0)
            assert tuple(header.origin.tolist()) == (0, 0, 0)
    assert mrcfile.validate(tmp_path / "m.mrc")


def test_shells_and_resolutions():
    assert law.shell_to_angst(16, 64, 1.2) == pytest.approx(4.8)
    assert law.angst_to_shell(4.8, 64, 1.2) == pytest.approx(16)
    assert law.shell_to_angst(0, 64, 1.2) == math.inf
    particles = read_particles(GOLDEN / "relion30_32.star")
    pixels = particles.table["rlnOriginX"].astype(float)
    assert np.allclose(particles.origins_angst()[:, 0], pixels * 2.6)


def test_the_other_hand_is_mirrored_along_x_about_the_centre():
    """As relion_image_handler --invert_hand does it in even boxes."""
    volume = torch.from_numpy(read_map(GOLDEN / "map_32.mrc").data)
    theirs = torch.from_numpy(read_map(GOLDEN / "map_32_mirrored.mrc").data)
    assert torch.equal(mirror_map(volume), theirs)
    for box in (8, 9):
        delta = torch.zeros(box, box, box)
        delta[box // 2, box // 2, box // 2] = 1
        assert torch.equal(mirror_map(delta), delta)


def test_wavelength_at_300_kv():
    assert float(law.electron_wavelength_angst(torch.tensor(300.0))) == pytest.approx(
        0.019687, abs=1e-6
    )


def test_ctf_has_no_nan_gradient_without_astigmatism():
    plane = half_plane(16)
    defocus = torch.full((1,), 12000.0, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    optics = CtfParameters(
        defocus, defocus, one * 0, one * 300, one * 2.7, one * 0.1, *[one * 0] * 3
    )
    ctf(plane.frequencies, optics, 16, 2.0).sum().backward()
    assert torch.isfinite(defocus.grad).all()
