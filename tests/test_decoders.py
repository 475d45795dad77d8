"""Decoders: real maps, finite at every band, slices that belong to the map."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from cryorecon.engines.decoders import DecoderKind, new_decoder
from cryorecon.networks.siren import FourierNet, HermitianField
from cryorecon.physics.fourier import half_plane
from cryorecon.physics.masks import Support
from cryorecon.physics.projection import extract_slices, project
from cryorecon.physics.rotations import random_rotations

KINDS = get_args(DecoderKind)
FOURIER = ("fouriernet", "siren", "positional")


def fresh(kind, box=24, reach=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return new_decoder(kind, box, reach, Support(0.35), 32, generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", [24, 25])
def test_transform_is_that_of_a_real_map(kind, box):
    with torch.no_grad():
        values = fresh(kind, box).transform(6.0).values
    inner = values[1:, 1:, 1:]
    torch.testing.assert_close(inner, inner.flip(0, 1, 2).conj(), rtol=1e-4, atol=1e-5)
    volume = fresh(kind, box).volume(6.0)
    assert volume.shape == (box, box, box)
    assert volume.isfinite().all()
    assert volume.abs().max() > 0


@pytest.mark.parametrize("kind", ["grid", "rmfn"])
def test_slices_are_projections_of_the_map(kind, generator):
    decoder = fresh(kind).double()
    plane = half_plane(24, 6.0)
    rotations = random_rotations(5, generator)
    with torch.no_grad():
        slices = decoder.slices(decoder.transform(6.0), rotations, plane)
        whole = decoder.volume(8.0)
        expected = project(whole, rotations, plane)
    low = plane.radius < 5
    apart = (slices - expected)[:, low].norm() / expected[:, low].norm()
    assert apart < 0.02


@pytest.mark.parametrize("kind", FOURIER)
def test_network_slices_agree_with_the_grid_of_their_values(kind, generator):
    """At grid points interpolation is exact: slices along the axes."""
    decoder = fresh(kind)
    plane = half_plane(24, 6.0)
    flat = torch.eye(3)[None]
    with torch.no_grad():
        transform = decoder.transform(6.0)
        direct = decoder.slices(transform, flat, plane)
        read = extract_slices(transform, flat, plane)
    torch.testing.assert_close(direct, read, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_map_and_rotations(kind, generator):
    decoder = fresh(kind)
    plane = half_plane(24, 5.0)
    rotations = random_rotations(3, generator, torch.float32).requires_grad_()
    slices = decoder.slices(decoder.transform(5.0), rotations, plane)
    weights = torch.randn(slices.shape, generator=generator)
    (slices.real * weights).sum().backward()
    assert rotations.grad is not None
    assert rotations.grad.abs().sum() > 0
    for name, parameter in decoder.named_parameters():
        if kind == "rmfn" and parameter.grad is not None and parameter.dim() == 3:
            assert parameter.grad[0].abs().sum() > 0, name
        elif parameter.grad is None or parameter.grad.abs().sum() == 0:
            pytest.fail(name)


def test_network_fields_are_hermitian(generator):
    field = HermitianField(FourierNet(32, generator), 8.0)
    points = torch.randn(50, 3, generator=generator)
    points[:10, 0] = 0
    points[:5, 1] = 0
    torch.testing.assert_close(field(-points), field(points).conj())
    assert field(torch.zeros(1, 3)).imag == 0


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_fouriernet_energy_is_finite_in_every_shell(size, generator):
    """Whatever the weights: the exponent is bounded, so that squares sum within float32."""
    network = FourierNet(32, generator)
    for parameter in network.parameters():
        parameter.data.mul_(size)
    axis = torch.arange(-8, 9) / 8
    points = torch.cartesian_prod(axis, axis, axis)
    energy = network(points).square().sum(-1)
    shells = (points.norm(dim=-1) * 8).round().long().clamp(max=8)
    sums = torch.zeros(9).index_add_(0, shells, energy)
    assert sums.isfinite().all()
    assert (sums > 0).all()


def test_fouriernet_has_the_papers_parameters():
    """330,240 weights (supplement C.3); biases come on top."""
    network = FourierNet(256, torch.Generator().manual_seed(0))
    weights = sum(p.numel() for name, p in network.named_parameters() if name.endswith("weight"))
    assert weights == 330_240


def test_unknown_decoders_are_refused():
    with pytest.raises(ValueError, match="unknown"):
        fresh("voxels")
