"""The two ways down: what each does on functions whose minimum is known."""

from __future__ import annotations

import pytest
import torch

from cryorecon.engines.moments.descent import adam, quasi_newton


def valley(x):
    """Rosenbrock's: a curved valley, its minimum 0 where all are 1."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_valley_that_adam_crawls_along_is_walked_to_its_end(dtype):
    ends = []
    for walk in (adam, quasi_newton):
        x = torch.full((6,), -1.0, dtype=dtype, requires_grad=True)
        given = [{"params": [x], "lr": 0.02}] if walk is adam else [x]
        steps = []
        walk(lambda x=x: valley(x), given, 300, steps.append)
        assert sum(steps) == 300
        ends.append(float(valley(x).detach()))
    assert ends[1] < 1e-6 < 1e-2 < ends[0]


def test_it_does_not_end_above_where_it_began():
    x = torch.tensor([3.0], requires_grad=True)
    seen = []

    def cliff():
        """Finite where it began, not a number at the first step down."""
        seen.append(float(x.detach()))
        return (x * 1.0).sum() if len(seen) == 1 else (x * torch.nan).sum()

    steps = []
    quasi_newton(cliff, [x], 10, steps.append)
    assert float(x.detach()) == 3.0
    assert sum(steps) == 10
    assert len(seen) > 1


def test_no_steps_move_nothing():
    x = torch.tensor([3.0], requires_grad=True)
    adam(x.sum, [{"params": [x], "lr": 0.1}], 0)
    quasi_newton(x.sum, [x], 0)
    assert float(x.detach()) == 3.0


def test_adam_tells_of_a_loss_that_is_not_finite():
    x = torch.tensor([1.0], requires_grad=True)
    with pytest.raises(FloatingPointError, match="nan"):
        adam(lambda: x.sum() * torch.nan, [{"params": [x], "lr": 0.1}], 3)
