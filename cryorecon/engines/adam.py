"""Adam's steps by torch's function: torch's class loads its compiler, a second of every job."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


class Adam:
    """What :class:`torch.optim.Adam` does, for parameters of one group.

    Parameters
    ----------
    parameters : iterable of Tensor
        On one device. Those without a gradient stay where they are.
    rate : float
        Step length, in units of the parameters.
    betas : tuple of two floats
        What is kept, at each step, of the means of gradients and of their squares.
    """

    def __init__(
        self, parameters: Iterable[Tensor], rate: float, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        self.parameters, self.rate, self.betas = list(parameters), rate, betas
        self._fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        self._means = [torch.zeros_like(p) for p in self.parameters]
        self._squares = [torch.zeros_like(p) for p in self.parameters]
        # Counted where torch's compiled loop wants it.
        self._steps = [
            torch.zeros((), device=p.device if self._fused else "cpu") for p in self.parameters
        ]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters against their gradients."""
        moved = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        adam(
            [self.parameters[i] for i in moved],
            [gradient for p in self.parameters if (gradient := p.grad) is not None],
            [self._means[i] for i in moved],
            [self._squares[i] for i in moved],
            [],
            [self._steps[i] for i in moved],
            fused=self._fused,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def state(self) -> dict[str, Any]:
        """For a checkpoint, by reference."""
        return {"means": self._means, "squares": self._squares, "steps": self._steps}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        mine = self._means, self._squares, self._steps
        for own, name in zip(mine, ("means", "squares", "steps"), strict=True):
            for value, saved in zip(own, state[name], strict=True):
                value.copy_(saved)
