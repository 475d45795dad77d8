"""The processes that share a job: who works on which images, and how their sums come together.

``torchrun`` starts the processes and tells each its number. Every process runs the same program on
images of its own; what they find is added up or exchanged, so that all of them hold the same maps
and poses at all times and take the same decisions. The first one alone writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cryorecon.errors import LostRankError

# How long processes wait for one that works alone, as the first does when it solves a large map.
# One that has died is noticed at once: its connections close.
_PATIENCE = timedelta(hours=4)
# How long they sleep meanwhile, at a time.
_LEAST_S, _MOST_S = 2e-5, 0.05


@dataclass(frozen=True)
class Ranks:
    """One process's place among those that share a job; by default it is alone.

    Attributes
    ----------
    index, count : int
        Number of this process, from 0, and of all.
    offset : int
        Number of the team's first process among all of the job's.
    team : process group of torch, or None for all processes
    neighbours : int
        Processes of the job on this machine, which share its memory.
    """

    index: int = 0
    count: int = 1
    offset: int = 0
    team: Any = None
    neighbours: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and tells."""
        return self.index == 0

    def device(self, name: str) -> str:
        """Where this process computes, when all were told one name: each on a GPU of its own."""
        return name if self.count == 1 else own_gpu(name)

    def bounds(self, n: int) -> list[int]:
        """Where the shares of n rows begin, and n: neighbours stay together."""
        return [n * rank // self.count for rank in range(self.count + 1)]

    def sizes(self, n: int) -> list[int]:
        """How many of n rows each process has."""
        bounds = self.bounds(n)
        return [after - before for before, after in pairwise(bounds)]

    def share(self, rows: Tensor) -> Tensor:
        """The part of some rows that belongs to this process."""
        bounds = self.bounds(len(rows))
        return rows[bounds[self.index] : bounds[self.index + 1]]

    def add_up(self, *tensors: Tensor) -> None:
        """Replace tensors, in place, by their sums over all processes."""

        def work(values: Tensor) -> Any:
            return _torch().all_reduce(values, group=self.team, async_op=True)

        self._together(work, tensors)

    def any(self, mine: bool) -> bool:
        """Whether it is so in one process at least."""
        if self.count == 1:
            return mine
        flag = torch.tensor([float(mine)])
        self.add_up(flag)
        return bool(flag > 0)

    def total(self, mine: int) -> int:
        """Sum of a whole number over all processes."""
        told = torch.tensor([mine], dtype=torch.int64)
        self.add_up(told)
        return int(told)

    def same(self, *tensors: Tensor, source: int = 0) -> None:
        """Replace tensors, in place, by those of one process."""

        def work(values: Tensor) -> Any:
            group, start = self.team, self.offset + source
            return _torch().broadcast(values, start, group=group, async_op=True)

        self._together(work, tensors)

    def _together(self, work: Callable[[Tensor], Any], tensors: Sequence[Tensor]) -> None:
        if self.count == 1:
            return
        for tensor in tensors:
            # Messages are real and contiguous; the same memory where possible.
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            plain = real.contiguous()
            _finish(work, plain)
            if plain.data_ptr() != real.data_ptr():
                real.copy_(plain)

    def numbers(self, *values: float, source: int = 0) -> tuple[float, ...]:
        """The numbers that one process has found."""
        if self.count == 1:
            return values
        told = torch.tensor(values, dtype=torch.float64)
        self.same(told, source=source)
        return tuple(told.tolist())

    def bytes_from(self, source: int, mine: bytes) -> bytes:
        """What one process has to tell."""
        if self.count == 1:
            return mine
        (length,) = self.numbers(len(mine), source=source)
        if length == 0:
            return b""
        told = torch.zeros(int(length), dtype=torch.uint8)
        if self.index == source:
            told = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        self.same(told, source=source)
        return bytes(told.numpy().tobytes())

    def made(self, makers: Sequence[Callable[[], Tensor]], like: Tensor) -> list[Tensor]:
        """Tensors that processes compute in turn, each for all.

        Parameters
        ----------
        makers : sequence of callable
            Processes work on theirs at the same time.
        like : Tensor
            Of their shape, dtype and device.
        """
        if self.count == 1:
            return [make() for make in makers]
        found = [torch.empty_like(like) for _ in makers]
        for number, make in enumerate(makers):
            if number % self.count == self.index:
                found[number].copy_(make())
        for number, tensor in enumerate(found):
            self.same(tensor, source=number % self.count)
        return found

    def everyones(self, mine: Tensor, counts: list[int]) -> Tensor:
        """Rows that all processes have made, those of the first before those of the second.

        Parameters
        ----------
        mine : Tensor, shape (counts[index], ...)
        counts : list of int
            Rows of each process.
        """
        if self.count == 1:
            return mine
        most = max(counts)
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
        pieces = [torch.empty_like(padded) for _ in counts]

        def work(values: Tensor) -> Any:
            return _torch().all_gather(pieces, values, group=self.team, async_op=True)

        _finish(work, padded)
        return torch.cat([piece[:n] for piece, n in zip(pieces, counts, strict=True)])

    def split(self) -> tuple[int, Ranks]:
        """Two teams, each with half of the processes: this one's number, and its place there."""
        middle = self.count // 2
        members = [range(middle), range(middle, self.count)]
        groups = [
            _torch().new_group([self.offset + i for i in some], timeout=_PATIENCE)
            for some in members
        ]
        number = int(self.index >= middle)
        mine = members[number]
        place, start = self.index - mine[0], self.offset + mine[0]
        team = Ranks(place, len(mine), start, groups[number], self.neighbours)
        return number, team

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)


ALONE = Ranks()


def wanted() -> int:
    """How many processes share this job, as ``torchrun`` says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def own_gpu(name: str) -> str:
    """The GPU of this process's number on its machine, if ``torchrun`` has started several."""
    if wanted() == 1 or not name.startswith("cuda"):
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % max(torch.cuda.device_count(), 1)}"


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other processes that ``torchrun`` has started; alone without it.

    Raises
    ------
    LostRankError
        If they cannot be met, or one of them ends before its time.
    """
    if wanted() == 1:
        yield ALONE
        return
    group = _torch()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _noticing_the_end():
        group.init_process_group(backend, timeout=_PATIENCE)
    try:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield Ranks(group.get_rank(), group.get_world_size(), neighbours=neighbours)
    finally:
        group.destroy_process_group()


def _finish(work: Callable[[Tensor], Any], values: Tensor) -> None:
    """Wait for what processes do together, ready to be asked to stop.

    A wait of torch's own hears no signal: a process would wait for one that has been stopped.
    """
    with _noticing_the_end():
        handle = work(values)
        start = time.monotonic()
        while not values.is_cuda and not handle.is_completed():
            waited = time.monotonic() - start
            time.sleep(min(max(_LEAST_S, waited / 20), _MOST_S))
        handle.wait()


def _torch() -> Any:
    # Its own imports take half a second: only where there are several processes.
    import torch.distributed

    return torch.distributed


@contextmanager
def _noticing_the_end() -> Iterator[None]:
    """What a process does together with others fails if one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition(". ")[0].strip() or type(error).__name__
        raise LostRankError(
            f"Another process of this job has ended or cannot be reached ({reason})",
            "Its own message tells why; then go on from the last state",
        ) from error
