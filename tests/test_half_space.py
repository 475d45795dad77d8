"""Maps by half of their transforms are those by whole ones."""

from __future__ import annotations

import pytest
import torch

from cryorecon.engines.accumulate import NormalEquations
from cryorecon.engines.least_squares import wiener_map
from cryorecon.physics import half_space
from cryorecon.physics.fourier import (
    crop_or_pad_centred,
    fft_centred,
    radius_grid,
)
from cryorecon.physics.half_space import (
    columns,
    convolve,
    fill_transforms,
    maps_of,
    without_fall_off,
)
from cryorecon.physics.projection import to_volume

KINDS = [(torch.float32, 2e-6), (torch.float64, 1e-13)]


@pytest.fixture(params=[2**12, 2**19], autouse=True)
def points(request, monkeypatch):
    """A few columns at a time, and all."""
    monkeypatch.setattr(half_space, "_POINTS_CPU", request.param)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def grid_of(size, generator, dtype=torch.float64):
    """Noise on a grid whose border at -size / 2 is empty, as slices leave it."""
    parts = torch.randn(2, size, size, size, generator=generator, dtype=torch.float64)
    for dim in range(1, 4):
        parts.select(dim, 0).zero_()
    return torch.complex(*parts.to(dtype))


def close(found, expected, bound):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() < bound * expected.abs().max()


def test_columns_are_those_of_both_friedel_mates(kind, generator):
    dtype, bound = kind
    grid = grid_of(12, generator, dtype)
    sums = NormalEquations(grid, grid.real.square(), 2)
    whole = sums.symmetrised()
    close(columns(grid, 0, 6), whole.signal[1:, 1:, 6:], bound)
    close(columns(sums.weight, 2, 5), whole.weight[1:, 1:, 8:11], bound)


@pytest.mark.parametrize(
    ("held", "size", "box"), [(12, 18, 9), (16, 16, 8), (10, 16, 8), (10, 9, 9)]
)
def test_maps_are_those_of_whole_transforms(held, size, box, kind, generator):
    dtype, bound = kind
    grid = grid_of(held, generator, dtype)
    found = maps_of(lambda *span: columns(grid, *span)[None], held, size, box, torch.device("cpu"))
    padded = crop_or_pad_centred(grid, size, 3)
    whole = torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(padded))).real
    close(found[0], crop_or_pad_centred(whole, box, 3), 4 * bound)


@pytest.mark.parametrize("padding", [1, 2, 3])
@pytest.mark.parametrize("box", [8, 9])
@pytest.mark.parametrize("band", [2.0, 3.5])
def test_wiener_maps_are_those_of_the_wiener_transform(box, band, padding, kind, generator):
    dtype, bound = kind
    sums = NormalEquations.empty(band, padding, dtype, "cpu")
    inside = radius_grid(len(sums.weight), 3) < padding * band + 1
    sums.signal = grid_of(len(sums.weight), generator, dtype) * inside
    sums.weight = sums.signal.abs().square()
    prior = torch.tensor([0.1, 0.3, 0.7, 0.2], dtype=dtype)[: int(band) + 1]
    close(wiener_map(sums, prior, box), to_volume(sums.solve(prior), box), 8 * bound)


@pytest.mark.parametrize("box", [6, 7])
def test_a_convolution_is_the_product_of_whole_transforms(box, kind, generator):
    dtype, bound = kind
    values = torch.randn(box, box, box, generator=generator, dtype=torch.float64).to(dtype)
    kernel = torch.randn(2 * box, 2 * box, box + 1, generator=generator).to(dtype)
    kernel = torch.fft.rfftn(torch.fft.irfftn(kernel, s=(2 * box,) * 3)).real.contiguous()
    padded = torch.zeros(2 * box, 2 * box, 2 * box, dtype=dtype)
    padded[:box, :box, :box] = values
    whole = torch.fft.irfftn(torch.fft.rfftn(padded) * kernel, s=padded.shape)
    close(convolve(values, kernel), whole[:box, :box, :box], 8 * bound)


@pytest.mark.parametrize(("held", "size"), [(10, 16), (16, 16), (10, 9)])
def test_the_fall_off_is_divided_out_of_the_kernel(held, size, kind, generator):
    dtype, bound = kind
    grid = grid_of(held, generator, dtype).real
    half = columns(grid, 0, held // 2)
    whole = crop_or_pad_centred(
        (grid + grid.flip((0, 1, 2)).roll((1, 1, 1), (0, 1, 2))) / 2, size, 3
    )
    fall = torch.sinc(torch.fft.fftfreq(size, dtype=torch.float64)) ** 2
    kernel = torch.fft.ifftn(torch.fft.ifftshift(whole.double())).real
    kernel = kernel / (fall[:, None, None] * fall[:, None] * fall)
    expected = torch.fft.rfftn(kernel).real.to(dtype)
    close(without_fall_off(half, size), expected, 8 * bound)


@pytest.mark.parametrize(
    ("box", "padding", "keep"),
    [(6, 2, 12), (6, 2, 8), (7, 2, 14), (7, 2, 10), (7, 1, 8), (7, 3, 22), (7, 3, 10), (6, 1, 6)],
)
def test_both_halves_of_transforms_are_filled(box, padding, keep, kind, generator):
    dtype, bound = kind
    volumes = torch.randn(3, box, box, box, generator=generator, dtype=torch.float64).to(dtype)
    factors = torch.tensor([1, 1j, 2 - 1j]).to(torch.complex(volumes[0], volumes[0]).dtype)
    out = torch.full((keep, keep, keep, 3), torch.nan, dtype=factors.dtype)
    size = padding * box
    fill_transforms(volumes, size, factors, out)
    assert out.isfinite().all()
    for border in range(3):
        assert not out.select(border, 0).any()
    for number, volume in enumerate(volumes):
        padded = crop_or_pad_centred(volume, size, 3)
        whole = crop_or_pad_centred(fft_centred(padded, 3), keep, 3) * factors[number]
        close(out[1:, 1:, 1:, number], whole[1:, 1:, 1:], 4 * bound)
