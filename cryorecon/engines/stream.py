"""The order in which a training sees its images, and how they are read for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cryorecon.engines.observations import ImageSet, Source

# Neighbours in the STAR file are read together; batches are drawn from a few such blocks at once.
_BLOCK = 512
_BLOCKS_AT_ONCE = 8
# These and those that the last rows of the blocks before lie in.
_BLOCKS_KEPT = 2 * _BLOCKS_AT_ONCE


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


def read_ahead(images: ImageSet) -> ImageSet:
    """The same images in file order, whole blocks of which are read and kept for a while.

    For a :class:`Stream`, whose mini-batches pick single images out of a few blocks: each image is
    read once a pass, in file order. Whatever was read before, a block's numbers are the same.

    Parameters
    ----------
    images : ImageSet
        Up to the frequencies that are wanted.
    """
    order = images.in_file_order(torch.arange(len(images)))
    source = _Blocks(images.source, images.rows[order], len(images.plane))
    return replace(
        images,
        source=source,
        group=images.group[order],
        gain=images.gain[order],
        rows=torch.arange(len(images), dtype=torch.int32),
        place=None,
    )


class _Blocks:
    """A source that keeps the blocks that were used last, as many as there are places."""

    def __init__(self, source: Source, rows: Tensor, count: int) -> None:
        self.source, self.rows, self.count = source, rows, count
        blocks = -(-len(rows) // _BLOCK)
        held = min(_BLOCKS_KEPT, blocks) * _BLOCK
        self.kept = torch.empty(held, count, dtype=torch.complex64), torch.empty(held, count)
        # Place of each block, the one that was used longest ago first.
        self.places: dict[int, int] = {}

    def __call__(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        block = rows // _BLOCK
        needed = block.unique()
        places = torch.tensor([self._place(number) for number in needed.tolist()])
        where = places[torch.searchsorted(needed, block)] * _BLOCK + rows % _BLOCK
        coefficients, ctf = self.kept
        return coefficients[where, :count], ctf[where, :count]

    def _place(self, number: int) -> int:
        if number in self.places:
            place = self.places.pop(number)
        else:
            place = len(self.places)
            if place * _BLOCK == len(self.kept[0]):
                place = self.places.pop(next(iter(self.places)))
            rows = self.rows[number * _BLOCK : (number + 1) * _BLOCK].long()
            for kept, new in zip(self.kept, self.source(rows, self.count), strict=True):
                kept[place * _BLOCK : place * _BLOCK + len(rows)] = new
        self.places[number] = place
        return place
