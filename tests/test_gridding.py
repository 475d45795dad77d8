"""Interpolation by rows of neighbours is interpolation by neighbours."""

from __future__ import annotations

import pytest
import torch

from cryorecon.physics.gridding import Kernel, RowMap, neighbours


@pytest.mark.parametrize("shape", [(11, 13), (9, 10, 12)])
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rows_read_what_neighbours_read_and_have_its_adjoint(
    shape, width, dtype, tolerance, generator
):
    origin, kernel = torch.tensor([n // 2 for n in shape]), Kernel(width)
    room = torch.tensor([n // 2 - width / 2 - 0.5 for n in shape], dtype=torch.float64)
    points = (2 * torch.rand(50, len(shape), generator=generator, dtype=torch.float64) - 1) * room
    whole = neighbours(points, origin, shape, kernel).with_adjoint().to(dtype, "cpu")
    rows = RowMap.of(points, origin, shape, kernel).with_adjoint().to(dtype, "cpu")
    one = torch.randn(*shape, 2, generator=generator, dtype=dtype, requires_grad=True)
    other = one.detach().clone().requires_grad_()
    wanted, found = whole(one.reshape(-1, 2)), rows(other)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    given = torch.randn(50, 2, generator=generator, dtype=dtype)
    (wanted * given).sum().backward()
    (found * given).sum().backward()
    torch.testing.assert_close(other.grad, one.grad, rtol=tolerance, atol=tolerance)


def test_a_point_outside_the_grid_is_told():
    with pytest.raises(ValueError, match="outside"):
        RowMap.of(torch.tensor([[0.0, 4.5]]).double(), torch.tensor([4, 4]), (9, 9), Kernel(4))
