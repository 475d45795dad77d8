"""Pose encoders: rotations out, no scale in, all parameters in play."""

from __future__ import annotations

import pytest
import torch

from cryorecon.engines.pose_reader import PoseReader, turned
from cryorecon.networks.encoders import EncoderConfig, GaussianBank, PoseEncoder, gram_schmidt
from cryorecon.physics.fourier import half_plane, to_coefficients

SIZES = {"dense": 20, "small": 20, "paper": 64}


@pytest.fixture(params=SIZES)
def encoder(request, generator):
    shape = EncoderConfig(request.param, SIZES[request.param], heads=3, shift_scale_angst=8.0)
    return PoseEncoder(shape, generator)


def images_for(encoder, n, generator):
    size = encoder.config.input_size
    return torch.randn(n, size, size, generator=generator)


def test_gram_schmidt_makes_rotations(generator):
    found = gram_schmidt(torch.randn(100, 6, generator=generator, dtype=torch.float64))
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found @ found.transpose(-1, -2), eye.expand(100, 3, 3))
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(100, dtype=torch.float64))
    torch.testing.assert_close(gram_schmidt(found[:, :2].flatten(1)), found)


def test_guesses_have_a_head_each(encoder, generator):
    rotations, shifts = encoder(images_for(encoder, 4, generator))
    assert rotations.shape == (4, 3, 3, 3)
    assert shifts.shape == (4, 3, 2)
    assert (rotations[:, 0] - rotations[:, 1]).abs().max() > 0.1


def test_scale_and_level_of_images_do_not_matter(encoder, generator):
    images = images_for(encoder, 3, generator)
    one, other = encoder(images), encoder(1000 * images + 5)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_every_parameter_moves_after_one_step(encoder, generator):
    """In the published code the shift head never does."""
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    rotations, shifts = encoder(images_for(encoder, 8, generator))
    target = torch.randn(rotations.shape, generator=generator)
    (rotations * target).sum().add(shifts.square().sum()).backward()
    optimizer.step()
    still = [name for name, p in encoder.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_paper_encoder_has_the_paper_s_features():
    """2,048 channels of 2 x 2 pixels from 128 px: the paper's 8,192 features (it prints 8182)."""
    encoder = PoseEncoder(EncoderConfig("paper", 128, 1), torch.Generator().manual_seed(0))
    assert encoder.rotation_hidden[0].in_features == 8192
    assert [layer.out_features for layer in encoder.rotation_hidden[::3]] == [512, 256]


def test_filters_are_low_passes_from_none_to_flat():
    kernels = GaussianBank().kernels[:, 0]
    torch.testing.assert_close(kernels.sum((-2, -1)), torch.ones(5))
    assert kernels[0, 5, 5] > 0.999
    peaks = kernels[:, 5, 5]
    assert (peaks[1:] < peaks[:-1]).all()
    assert peaks[-1] < 0.02


@pytest.mark.parametrize("kind", ["small", "paper"])
def test_images_too_small_are_refused(kind):
    with pytest.raises(ValueError, match="needs"):
        EncoderConfig(kind, SIZES[kind] // 4, 1)


@pytest.mark.parametrize("box", [16, 17])
def test_turning_conjugates_the_transform(box, generator):
    """Turned about N // 2, as the image model has it; about (N - 1) / 2 phases would appear."""
    images = torch.randn(3, box, box, generator=generator, dtype=torch.float64)
    plane = half_plane(box)
    turned_values = to_coefficients(turned(images), plane)
    torch.testing.assert_close(turned_values, to_coefficients(images, plane).conj())


class Oracle(torch.nn.Module):
    """Knows the pose of the first images and that of the turned ones."""

    def __init__(self, rotations, shifts):
        super().__init__()
        self.config = EncoderConfig("dense", 16, 1)
        self.rotations, self.shifts = rotations, shifts

    def forward(self, images):
        del images
        return self.rotations[:, None], self.shifts[:, None]


def test_poses_of_turned_images_are_turned_back(molecule_32, generator):
    """What the second path says of a turned image holds for the image itself."""
    from cryorecon.physics.imaging import render
    from cryorecon.physics.rotations import random_rotations

    volume = molecule_32.double()
    rotations = random_rotations(4, generator)
    offsets = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    images = render(volume, rotations, offsets)
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(
        render(volume, half_turn @ rotations, -offsets), turned(images), rtol=1e-6, atol=1e-6
    )
    oracle = Oracle(
        torch.cat([rotations, half_turn @ rotations]), 2.4 * torch.cat([offsets, -offsets])
    )
    reader = PoseReader(oracle, 0.8, 2.4, symmetric=True, reweighted=True)
    found = reader.of_images(torch.zeros(4, 16, 16))
    for path in (0, 1):
        torch.testing.assert_close(found.rotations[:, path], rotations)
        torch.testing.assert_close(found.offsets_px[:, path], offsets)
