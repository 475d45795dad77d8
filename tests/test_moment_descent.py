"""The two ways down: what each does on functions whose minimum is known."""

from __future__ import annotations

import copy

import pytest
import torch

from cryorecon.engines.moments import descent
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


def test_it_ends_at_the_lowest_point_it_met():
    """A loss that is not a number from some step on."""
    x = torch.full((6,), -1.0, requires_grad=True)
    seen = []

    def cliff():
        value = valley(x)
        seen.append(float(value.detach()))
        return value if len(seen) < 20 else value * torch.nan

    steps = []
    quasi_newton(cliff, [x], 40, steps.append)
    assert sum(steps) == 40
    assert len(seen) >= 20
    assert float(valley(x).detach()) == pytest.approx(min(seen[:19]))
    assert min(seen[:19]) < 0.5 * seen[0]


def test_a_loss_that_is_not_finite_where_it_begins_is_told():
    x = torch.tensor([3.0], requires_grad=True)
    with pytest.raises(FloatingPointError, match="nan"):
        quasi_newton(lambda: x.sum() * torch.nan, [x], 10)


def test_no_steps_move_nothing():
    x = torch.tensor([3.0], requires_grad=True)
    adam(x.sum, [{"params": [x], "lr": 0.1}], 0)
    quasi_newton(x.sum, [x], 0)
    assert float(x.detach()) == 3.0


def test_adam_tells_of_a_loss_that_is_not_finite():
    x = torch.tensor([1.0], requires_grad=True)
    with pytest.raises(FloatingPointError, match="nan"):
        adam(lambda: x.sum() * torch.nan, [{"params": [x], "lr": 0.1}], 3)


def test_a_walk_in_many_blocks_gets_as_far_as_one_in_few(monkeypatch):
    ends = []
    for block in (10, 1000):
        monkeypatch.setattr(descent, "_BLOCK", block)
        x = torch.full((20,), -1.0, dtype=torch.float64, requires_grad=True)
        quasi_newton(lambda x=x: valley(x), [x], 100)
        ends.append(float(valley(x).detach()))
    assert ends[0] < 10 * ends[1] + 1e-6


def test_where_digits_end_it_ends():
    """In single precision no line search gets any lower from some point on."""
    x = torch.full((20,), -1.0, requires_grad=True)
    seen = []

    def loss():
        seen.append(float(valley(x).detach()))
        return valley(x)

    steps = []
    quasi_newton(loss, [x], 3000, steps.append)
    assert sum(steps) == 3000
    assert min(seen) < 1e-6
    assert len(seen) < 1000


def test_a_gradient_that_is_not_finite_where_it_begins_is_told():
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(FloatingPointError, match="gradient"):
        quasi_newton(lambda: x.square().sum().sqrt() + 1, [x], 10)


def test_a_state_can_be_gone_on_from_twice(monkeypatch):
    monkeypatch.setattr(descent, "_BLOCK", 10)
    x, kept, ends = torch.full((6,), -1.0, dtype=torch.float64, requires_grad=True), [], []

    def keep(state):
        if not kept:
            kept.append((x.detach().clone(), copy.deepcopy(state())))

    quasi_newton(lambda: valley(x), [x], 60, keep=keep)
    for _ in range(2):
        begin, state = kept[0]
        y = begin.clone().requires_grad_()
        quasi_newton(lambda y=y: valley(y), [y], 60, saved=state)
        ends.append(y.detach())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], x.detach())


def test_where_no_gradient_is_left_it_ends():
    x = torch.ones(6, requires_grad=True)
    steps, kept = [], []
    quasi_newton(lambda: valley(x), [x], 500, steps.append, keep=kept.append)
    assert sum(steps) == 500
    assert len(steps) < 10
    assert not kept
