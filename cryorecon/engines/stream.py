"""The order in which a training sees its images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Neighbours in the STAR file are read together; batches are drawn from a few such blocks at once.
_BLOCK = 256
_BLOCKS_AT_ONCE = 16


class Stream:
    """Rows of endless mini-batches: blocks of neighbours in random order, shuffled together.

    Disks read neighbours fast; what is held at a time does not grow with the number of images.

    Parameters
    ----------
    n : int
        Images.
    batch : int
        Rows of a batch, all images where there are fewer.
    """

    def __init__(self, n: int, batch: int, generator: torch.Generator) -> None:
        self.n, self.batch, self.generator = n, min(batch, n), generator
        self._ready = torch.empty(0, dtype=torch.int64)
        self._blocks: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        while len(self._ready) < self.batch:
            self._load()
        rows, self._ready = self._ready[: self.batch], self._ready[self.batch :]
        return rows

    def _load(self) -> None:
        starts = range(0, self.n, _BLOCK)
        if not self._blocks:
            self._blocks = torch.randperm(len(starts), generator=self.generator).tolist()
        some, self._blocks = self._blocks[:_BLOCKS_AT_ONCE], self._blocks[_BLOCKS_AT_ONCE:]
        firsts = [starts[i] for i in some]
        rows = torch.cat([torch.arange(i, min(i + _BLOCK, self.n)) for i in firsts])
        rows = rows[torch.randperm(len(rows), generator=self.generator)]
        self._ready = torch.cat([self._ready, rows])

    def state(self) -> dict[str, Any]:
        """What is left of this pass over the images, without the generator."""
        blocks = torch.tensor(self._blocks, dtype=torch.int64)
        return {"ready": self._ready.clone(), "blocks": blocks}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._ready, self._blocks = state["ready"], state["blocks"].tolist()
