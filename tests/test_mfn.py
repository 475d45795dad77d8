from __future__ import annotations

import pytest
import torch

from cryorecon.engines.network_map import NetworkMap
from cryorecon.networks.mfn import (
    MfnConfig,
    ResidualMfn,
    grid_points,
    paper_bands,
    smallest_grid,
)
from cryorecon.physics.fourier import centred_frequencies, crop_or_pad_centred, fft_centred
from cryorecon.physics.masks import Support

CONFIG = MfnConfig(bands=(2, 5, 9), width=24)


def values(network, size, scale, ndim=3):
    points = grid_points(size, ndim, torch.float64, "cpu")
    with torch.no_grad():
        return network(points, scale + 1)[-1].reshape((size,) * ndim)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("scale", [0, 1, 2])
def test_outputs_are_band_limited(scale, ndim, generator):
    config = MfnConfig(CONFIG.bands, CONFIG.width, ndim=ndim)
    network = ResidualMfn(config, generator).double()
    band, size = config.bands[scale], 2 * config.bands[scale] + 12
    energy = fft_centred(values(network, size, scale, ndim), ndim).abs() ** 2
    inside = centred_frequencies(size).abs() <= band
    for axis in range(ndim):
        shape = [1] * ndim
        shape[axis] = size
        outside = energy * ~inside.reshape(shape)
        assert outside.sum() < 1e-10 * energy.sum()


def test_the_finest_scale_reaches_its_band(generator):
    network = ResidualMfn(CONFIG, generator).double()
    energy = fft_centred(values(network, 24, 2), 3).abs() ** 2
    beyond_middle = centred_frequencies(24).abs() > 5
    assert (energy * beyond_middle).sum() > 1e-3 * energy.sum()


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_values_do_not_depend_on_the_grid(scale, generator):
    """A small grid and an FFT give the values on a fine grid that direct evaluation gives."""
    network = ResidualMfn(CONFIG, generator).double()
    small, large = smallest_grid(CONFIG.bands[scale]), 30
    transform = fft_centred(values(network, small, scale), 3)
    padded = crop_or_pad_centred(transform, large, 3)
    shifted = torch.fft.ifftshift(padded)
    fine = torch.fft.fftshift(torch.fft.ifftn(shifted)).real * (large / small) ** 3
    assert torch.allclose(fine, values(network, large, scale), atol=1e-9)


def test_scales_add_up_by_skip_connections(generator):
    network = ResidualMfn(CONFIG, generator).double()
    with torch.no_grad():
        network.readout[2].zero_()
    assert torch.equal(values(network, 12, 2), values(network, 12, 1))


def test_every_parameter_moves_in_one_step(generator):
    network = ResidualMfn(CONFIG, generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in network.parameters()]
    points = grid_points(8, 3, torch.float32, "cpu")
    network(points)[-1].square().sum().backward()
    optimizer.step()
    for old, new in zip(before, network.parameters(), strict=True):
        assert (old != new).float().mean() > 0.99


def test_frequencies_are_whole_cycles_and_extend_the_band(generator):
    network = ResidualMfn(MfnConfig(), generator)
    assert network.frequencies.dtype == torch.int64
    first, second = network.frequencies[0], network.frequencies[1]
    assert (first**2).sum(-1).max() <= 9
    # lambda_2 moves each new layer's frequencies out along a lattice direction: eq. 7.
    assert (second.abs().amax(-1) >= 3).all()


def test_paper_bands_grow_by_one_plus_lambdas():
    assert paper_bands(32) == (3, 10, 32)
    assert smallest_grid(9) == 20
    assert smallest_grid(31) == 64


@pytest.mark.parametrize("bands", [(), (0, 3), (4, 4), (5, 3)])
def test_impossible_bands_are_refused(bands):
    with pytest.raises(ValueError, match="bands"):
        MfnConfig(bands)


def test_a_map_is_the_network_times_its_mask_evaluated_inside_alone(generator, monkeypatch):
    mask = torch.ones(18, 18, 18)
    mask[:, :, :7] = 0
    network = NetworkMap(CONFIG, Support(0.3, mask), generator)
    size, seen = network.grid_size(1), []
    points = grid_points(size, 3, torch.float32, "cpu")
    support = network.support.on(size)
    whole = network.network(points, 2)[-1].view(size, size, size)
    whole = whole * support * (network.grid_size(0) / size) ** 3

    def spy(points, *args):
        seen.append(len(points))
        return type(network.network).forward(network.network, points, *args)

    monkeypatch.setattr(network.network, "forward", spy)
    error = 1e-5 * float(whole.detach().abs().max())
    assert torch.allclose(network.volume(1), whole, atol=error)
    assert seen == [int((support > 0).sum())]
    monkeypatch.setattr("cryorecon.engines.network_map._POINTS_AT_ONCE", 100)
    pieces = network.volume(1, size)
    assert torch.allclose(pieces, whole, atol=error)
    assert max(seen[1:]) == 100
