"""Two ways down: Adam from far away, a quasi-Newton method along the valleys near the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[], Tensor]
Steps = Callable[[int], None]
State = dict[str, Any]
Keep = Callable[[Callable[[], State]], None]

# Steps whose differences model the curvature.
_REMEMBERED = 50
# Evaluations between two states that can be kept: some seconds.
_BLOCK = 50


@dataclass(frozen=True)
class Settling:
    """How a descent ends: by how much of :func:`quasi_newton`.

    Attributes
    ----------
    count : int
        Evaluations.
    saved : dict, optional
        Where to go on: a state that `keep` was given.
    keep : callable, optional
        Called on the way with a function that gives the state.
    """

    count: int = 0
    saved: State | None = None
    keep: Keep | None = None


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
    loss: Loss,
    parameters: Sequence[Tensor],
    count: int,
    progress: Steps | None = None,
    saved: State | None = None,
    keep: Keep | None = None,
) -> None:
    """L-BFGS with a line search; ends at the lowest loss that was met.

    Parameters
    ----------
    parameters : sequence of Tensor
    count : int
        Evaluations of the loss with its gradient, about.
    progress : callable, optional
        Called with the evaluations since the last call: `count` in all.
    saved : dict, optional
        A state that `keep` was given, to go on from with the parameters of that moment.
    keep : callable, optional
        Called now and then with a function that gives the state.

    Raises
    ------
    FloatingPointError
        If the loss or its gradient is not finite where it begins.
    """
    if count < 1:
        return
    walk = _Walk(loss, parameters, count, progress)
    if saved is not None:
        walk.restore(saved)
    while walk.left > 0 and walk.block():
        if keep is not None:
            keep(walk.state)
    walk.finish()


class _Walk:
    """L-BFGS in blocks of evaluations, its memory of the curvature carried from one to the next."""

    def __init__(
        self, loss: Loss, parameters: Sequence[Tensor], count: int, progress: Steps | None
    ) -> None:
        self._loss, self._parameters, self._progress = loss, list(parameters), progress
        self.left = count
        self._best = math.inf
        self._kept = [p.detach().clone() for p in self._parameters]
        self._optimizer = torch.optim.LBFGS(
            self._parameters,
            tolerance_grad=0,
            tolerance_change=0,
            history_size=_REMEMBERED,
            line_search_fn="strong_wolfe",
        )

    def block(self) -> bool:
        """Some evaluations; whether it can go on from where it is."""
        most, before = min(_BLOCK, self.left), self.left
        self._optimizer.param_groups[0].update(max_iter=most, max_eval=most)
        stood = [p.detach().clone() for p in self._parameters]
        self._optimizer.step(self._evaluate)
        moved = any(not torch.equal(p, old) for p, old in zip(self._parameters, stood, strict=True))
        # Where it broke off and has not moved, it would try the same again.
        return self._is_finite() and (moved or before - self.left >= most)

    def state(self) -> State:
        """All but the parameters themselves."""
        return {
            "left": self.left,
            "best": self._best,
            "kept": self._kept,
            "optimizer": self._optimizer.state_dict(),
        }

    def restore(self, saved: State) -> None:
        self.left, self._best = saved["left"], saved["best"]
        pairs = zip(saved["kept"], self._parameters, strict=True)
        self._kept = [value.to(parameter) for value, parameter in pairs]
        # It goes on in the tensors that it is given.
        self._optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))

    def finish(self) -> None:
        """Go to the lowest point: a line search may end where its last trial was."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._kept, strict=True):
                parameter.copy_(value)
        self._tell(self.left)

    def _evaluate(self) -> float:
        self._optimizer.zero_grad()
        value = self._loss()
        value.backward()
        self._tell(min(1, self.left))
        now = float(value.detach())
        if math.isinf(self._best) and not (math.isfinite(now) and self._is_finite()):
            raise FloatingPointError(f"misfit {now} or its gradient")
        if now < self._best:
            self._best, self._kept = now, [p.detach().clone() for p in self._parameters]
        return now

    def _tell(self, steps: int) -> None:
        self.left -= steps
        if self._progress is not None and steps > 0:
            self._progress(steps)

    def _is_finite(self) -> bool:
        here = [t for p in self._parameters for t in (p, p.grad) if t is not None]
        return all(bool(t.isfinite().all()) for t in here)
