"""Two ways down: Adam from far away, a quasi-Newton method along the valleys near the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[], Tensor]
Steps = Callable[[int], None]

# Steps whose differences model the curvature.
_REMEMBERED = 50


def adam(
    loss: Loss, groups: list[dict[str, Any]], count: int, progress: Steps | None = None
) -> None:
    """Steps of Adam, the rate falling to a hundredth.

    Parameters
    ----------
    groups : list of dict
        Parameters and their rates.
    progress : callable, optional
        Called with 1 after each step.

    Raises
    ------
    FloatingPointError
        If the loss is not finite.
    """
    if count < 1:
        return
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    fall = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: 0.01 + 0.5 * (1 + math.cos(math.pi * i / count))
    )
    for _ in range(count):
        value = loss()
        if not bool(value.isfinite()):
            raise FloatingPointError(f"misfit {float(value.detach())}")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        fall.step()
        if progress is not None:
            progress(1)


def quasi_newton(
    loss: Loss, parameters: Sequence[Tensor], count: int, progress: Steps | None = None
) -> None:
    """L-BFGS with a line search; ends at the lowest loss that was met.

    Parameters
    ----------
    parameters : sequence of Tensor
    count : int
        Evaluations of the loss with its gradient, about.
    progress : callable, optional
        Called with the evaluations since the last call: `count` in all.

    Raises
    ------
    FloatingPointError
        If the loss is not finite where it begins.
    """
    if count < 1:
        return
    left = count
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=count,
        max_eval=count,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=_REMEMBERED,
        line_search_fn="strong_wolfe",
    )
    best, kept = math.inf, [p.detach().clone() for p in parameters]

    def told(steps: int) -> None:
        nonlocal left
        left -= steps
        if progress is not None and steps > 0:
            progress(steps)

    def closure() -> float:
        nonlocal best, kept
        optimizer.zero_grad()
        value = loss()
        value.backward()
        told(min(1, left))
        now = float(value.detach())
        if now < best:
            best, kept = now, [p.detach().clone() for p in parameters]
        return now

    began = optimizer.step(closure)
    if not math.isfinite(began):
        raise FloatingPointError(f"misfit {began}")
    # A line search may end where its last trial was, which need not be its best.
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    told(left)
