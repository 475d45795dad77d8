"""The order in which a training sees its images, and how they are read for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cryorecon.engines.observations import ImageSet, rows_of

# Batches are drawn from at least so many images at once, of one block of neighbours or of some.
_TOGETHER = 4096
# A jump to the next block costs a disk as long as reading eight megabytes: a sixteenth of these.
_BLOCK_BYTES = 128e6
_SMALLEST_BLOCK, _LARGEST_BLOCK = 512, 8192
# Those that are shuffled together, and those that the last rows of the group before lie in.
_GROUPS_KEPT = 2
# Of a block that are read at once: eight megabytes, so that no step of a training waits long.
_PIXELS_AT_ONCE = 1 << 21
# Parts of a block that are being read, or wait to be loaded, besides the one that is asked for.
_TOLD = 1


def block_size(pixels: int) -> int:
    """Images of a block, neighbours in the STAR file that are read together.

    A power of two, so that blocks make up what is shuffled together.

    Parameters
    ----------
    pixels : int
        Of an image on disk.
    """
    size = _LARGEST_BLOCK
    while size > _SMALLEST_BLOCK and 4.0 * size * pixels > 1.1 * _BLOCK_BYTES:
        size //= 2
    return size


class Stream:
    """Rows of endless mini-batches: blocks of neighbours in random order, shuffled together.

    Disks read neighbours fast; what is held at a time does not grow with the number of images.

    Parameters
    ----------
    n : int
        Images.
    batch : int
        Rows of a batch, all images where there are fewer.
    pixels : int
        Of an image on disk.
    """

    def __init__(self, n: int, batch: int, pixels: int, generator: torch.Generator) -> None:
        self.n, self.batch, self.generator = n, min(batch, n), generator
        self.block = block_size(pixels)
        self._at_once = max(1, _TOGETHER // self.block)
        self._ready = torch.empty(0, dtype=torch.int64)
        self._blocks: list[int] = []
        # First rows of the blocks that will be shuffled together next; none at the end of a pass.
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
            count = -(-self.n // self.block)
            self._blocks = torch.randperm(count, generator=self.generator).tolist()
        some, self._blocks = self._blocks[: self._at_once], self._blocks[self._at_once :]
        rows = self._rows_of(some)
        rows = rows[torch.randperm(len(rows), generator=self.generator)]
        self._ready = torch.cat([self._ready, rows])
        self._look_ahead()

    def _look_ahead(self) -> None:
        upcoming = self._blocks[: self._at_once]
        self.upcoming = torch.tensor(upcoming, dtype=torch.int64) * self.block

    def _rows_of(self, blocks: list[int]) -> Tensor:
        size = self.block
        parts = [torch.arange(i * size, min((i + 1) * size, self.n)) for i in blocks]
        return torch.cat([self._ready[:0], *parts])

    def state(self) -> dict[str, Any]:
        """What is left of this pass over the images, without the generator."""
        blocks = torch.tensor(self._blocks, dtype=torch.int64)
        return {"ready": self._ready.clone(), "blocks": blocks, "block": self.block}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._ready, self._blocks = state["ready"], state["blocks"].tolist()
        if state.get("block") != self.block:  # Of a program with others: a new pass.
            self._blocks = []
        self._look_ahead()


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
    source = _Blocks(images, images.rows[order])
    return replace(
        images,
        source=source,
        group=images.group[order],
        gain=images.gain[order],
        dimming=None if images.dimming is None else images.dimming[order],
        rows=torch.arange(len(images), dtype=torch.int32),
        place=None,
    )


class _Blocks:
    """A source that keeps the blocks that were loaded last, as many as there are places."""

    def __init__(self, images: ImageSet, rows: Tensor) -> None:
        self.source, self.rows, self.count = images.source, rows, len(images.plane)
        self.block, device = block_size(images.pixels), images.device
        blocks = -(-len(rows) // self.block)
        self.most = min(_GROUPS_KEPT * max(1, _TOGETHER // self.block), blocks)
        held = self.most * self.block
        kept = torch.empty(held, self.count, dtype=torch.complex64, device=device)
        self.kept = kept, torch.empty(held, self.count, device=device)
        # Place of each block, the one that was loaded first before others; of whole ones, a table.
        self.places: dict[int, int] = {}
        self.place_of = torch.full((blocks,), -1)
        # Parts of blocks, which are still to be loaded: number and first image in the block.
        self.coming: list[tuple[int, int]] = []
        self.told = rows[:0]
        # Blocks that are not to be put out for others.
        self.wanted: set[int] = set()
        # Images of a block that are read at once.
        self.part = max(1, min(self.block, _PIXELS_AT_ONCE // images.pixels))

    def expect(self, rows: Tensor) -> None:
        """Load the next part of blocks that will be asked for soon, one row of each, if it is read.

        To be called at every step, for the same rows until others follow: parts are read while
        steps are worked on.
        """
        if torch.equal(rows, self.told):
            if all(self._ready(part) for part in self.coming[:1]):
                self._load_next()
            return
        self.told = rows
        wanted = (rows // self.block).unique().tolist()
        self.wanted = set(wanted)
        self.coming = self._parts([block for block in wanted if self.place_of[block] < 0])
        self._tell(self.coming[:_TOLD])

    def __call__(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        block = rows // self.block
        place = self.place_of[block]
        if bool((place >= 0).all()):
            return self._kept(rows, place, count)
        parts, order = [], []
        # Large batches lie in more blocks than there are places.
        for needed in block.unique().split(self.most):
            self._keep(needed.tolist())
            mine = torch.isin(block, needed).nonzero()[:, 0]
            parts.append(self._kept(rows[mine], self.place_of[block[mine]], count))
            order.append(mine)
        coefficients, ctf = (torch.cat(values) for values in zip(*parts, strict=True))
        back = torch.argsort(torch.cat(order))
        return rows_of(coefficients, back), rows_of(ctf, back)

    def _kept(self, rows: Tensor, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """What is kept of rows whose blocks have these places."""
        where = place * self.block + rows % self.block
        coefficients, ctf = (rows_of(kept[:, :count], where) for kept in self.kept)
        return coefficients, ctf

    def _keep(self, needed: list[int]) -> None:
        """Have these blocks in their places; of those that are expected together, all."""
        expected = {number for number, _ in self.coming}
        together = expected.union(needed)
        if expected.isdisjoint(needed) or len(together) > self.most:
            together = set(needed)
        self.wanted = together
        new = [n for n in needed if self.place_of[n] < 0 and n not in expected & together]
        later = [part for part in self.coming if part[0] not in together]
        self.coming = [part for part in self.coming if part[0] in together] + self._parts(new)
        while self.coming:
            self._load_next()
        self.coming, self.wanted = later, {number for number, _ in later}

    def _parts(self, blocks: list[int]) -> list[tuple[int, int]]:
        return [(n, i) for n in blocks for i in range(0, self._length(n), self.part)]

    def _load_next(self) -> None:
        """Load the next part of what is coming, while those after it are read."""
        if not self.coming:
            return
        (number, first), *self.coming = self.coming
        if first > 0 and number not in self.places:  # Put out for others: from its beginning.
            (number, first), *again = self._parts([number])
            self.coming = again + [part for part in self.coming if part[0] != number]
        self._tell([(number, first), *self.coming[:_TOLD]])
        rows = self._of((number, first))
        place = self._place(number)
        here = slice(place * self.block + first, place * self.block + first + len(rows))
        for kept, found in zip(self.kept, self.source(rows, self.count), strict=True):
            kept[here] = found
        if first + len(rows) == self._length(number):
            self.place_of[number] = place

    def _tell(self, parts: list[tuple[int, int]]) -> None:
        """Begin to read parts of blocks."""
        expect = getattr(self.source, "expect", None)
        if expect is not None:
            for part in parts:
                expect(self._of(part))

    def _ready(self, part: tuple[int, int]) -> bool:
        """Whether a part that was told need not be waited for."""
        ready = getattr(self.source, "ready", None)
        return ready is None or ready(self._of(part))

    def _of(self, part: tuple[int, int]) -> Tensor:
        """The images of a part of a block."""
        number, first = part
        start = number * self.block + first
        end = min(start + self.part, (number + 1) * self.block)
        return self.rows[start:end].long()

    def _length(self, number: int) -> int:
        return min(self.block, len(self.rows) - number * self.block)

    def _place(self, number: int) -> int:
        """Where a block lies: if need be, in the place of the one that was loaded first."""
        if number not in self.places:
            place = len(self.places)
            if place == self.most:
                oldest = next(n for n in self.places if n not in self.wanted)
                place = self.places.pop(oldest)
                self.place_of[oldest] = -1
            self.places[number] = place
        return self.places[number]
