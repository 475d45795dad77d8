"""The order in which a training sees its images, and how they are read for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cryorecon.engines.observations import ImageSet, Source
from cryorecon.physics.fourier import HalfPlane

# Neighbours in the STAR file are read together; batches are drawn from a few such blocks at once.
_BLOCK = 512
_BLOCKS_AT_ONCE = 8
# These and those that the last rows of the blocks before lie in.
_BLOCKS_KEPT = 2 * _BLOCKS_AT_ONCE
# Of a block that are read at once: eight megabytes.
_PIXELS_AT_ONCE = 1 << 21


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
        # Rows that will be shuffled together next; none at the end of a pass.
        self.upcoming = self._ready

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        while len(self._ready) < self.batch:
            self._load()
        rows, self._ready = self._ready[: self.batch], self._ready[self.batch :]
        return rows

    def _load(self) -> None:
        if not self._blocks:
            count = -(-self.n // _BLOCK)
            self._blocks = torch.randperm(count, generator=self.generator).tolist()
        some, self._blocks = self._blocks[:_BLOCKS_AT_ONCE], self._blocks[_BLOCKS_AT_ONCE:]
        rows = self._rows_of(some)
        rows = rows[torch.randperm(len(rows), generator=self.generator)]
        self._ready = torch.cat([self._ready, rows])
        self.upcoming = self._rows_of(self._blocks[:_BLOCKS_AT_ONCE])

    def _rows_of(self, blocks: list[int]) -> Tensor:
        parts = [torch.arange(i * _BLOCK, min((i + 1) * _BLOCK, self.n)) for i in blocks]
        return torch.cat([self._ready[:0], *parts])

    def state(self) -> dict[str, Any]:
        """What is left of this pass over the images, without the generator."""
        blocks = torch.tensor(self._blocks, dtype=torch.int64)
        return {"ready": self._ready.clone(), "blocks": blocks}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._ready, self._blocks = state["ready"], state["blocks"].tolist()
        self.upcoming = self._rows_of(self._blocks[:_BLOCKS_AT_ONCE])


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
    source = _Blocks(images.source, images.rows[order], images.plane)
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

    def __init__(self, source: Source, rows: Tensor, plane: HalfPlane) -> None:
        self.source, self.rows, self.count = source, rows, len(plane)
        blocks = -(-len(rows) // _BLOCK)
        self.most = min(_BLOCKS_KEPT, blocks)
        held = self.most * _BLOCK
        kept = torch.empty(held, self.count, dtype=torch.complex64)
        self.kept = kept, torch.empty(held, self.count)
        # Place of each block, the one that was used longest ago first.
        self.places: dict[int, int] = {}
        self.expected: list[int] = []
        self.told = rows[:0]
        # Images of a block that are read at once.
        self.part = max(1, min(_BLOCK, _PIXELS_AT_ONCE // plane.box**2))

    def expect(self, rows: Tensor) -> None:
        """Begin to read the blocks of rows that will be asked for soon, together."""
        if torch.equal(rows, self.told):
            return
        self.told = rows
        self.expected = [b for b in (rows // _BLOCK).unique().tolist() if b not in self.places]
        if self.expected:
            self._expect(self._of(self.expected[0])[: self.part])

    def __call__(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        block = rows // _BLOCK
        coefficients = torch.empty(len(rows), count, dtype=torch.complex64)
        ctf = torch.empty(len(rows), count)
        # Large batches lie in more blocks than there are places.
        for needed in block.unique().split(self.most):
            self._keep(needed.tolist())
            places = torch.tensor([self.places[number] for number in needed.tolist()])
            mine = torch.isin(block, needed).nonzero()[:, 0]
            where = places[torch.searchsorted(needed, block[mine])] * _BLOCK + rows[mine] % _BLOCK
            coefficients[mine], ctf[mine] = (kept[where, :count] for kept in self.kept)
        return coefficients, ctf

    def _keep(self, needed: list[int]) -> None:
        """Have these blocks in their places; of those that are expected together, all."""
        new = [number for number in needed if number not in self.places]
        together = len({*needed, *self.expected})
        if together <= self.most and not set(new).isdisjoint(self.expected):
            new = self.expected + [number for number in new if number not in self.expected]
            self.expected = []
        for number in needed:  # Not to be put out for the new ones.
            if number in self.places:
                self.places[number] = self.places.pop(number)
        parts = [(n, i) for n in new for i in range(0, len(self._of(n)), self.part)]
        for i, (number, first) in enumerate(parts):
            for after, start in parts[i + 1 : i + 2]:
                self._expect(self._of(after)[start : start + self.part])
            rows = self._of(number)[first : first + self.part]
            place = self._place(number) * _BLOCK + first
            for kept, found in zip(self.kept, self.source(rows, self.count), strict=True):
                kept[place : place + len(rows)] = found

    def _of(self, number: int) -> Tensor:
        """The images of a block."""
        return self.rows[number * _BLOCK : (number + 1) * _BLOCK].long()

    def _expect(self, rows: Tensor) -> None:
        expect = getattr(self.source, "expect", None)
        if expect is not None:
            expect(rows)

    def _place(self, number: int) -> int:
        """Where a block lies: if need be, in the place of the one that was used longest ago."""
        if number not in self.places:
            place = len(self.places)
            if place == self.most:
                place = self.places.pop(next(iter(self.places)))
            self.places[number] = place
        return self.places[number]
