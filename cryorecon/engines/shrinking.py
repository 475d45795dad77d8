"""Batches as large as a device holds, which shrink when its memory ends instead of the job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# How libraries that torch calls, and page-locked memory, say that a GPU is full.
_FULL = ("ALLOC_FAILED", "CUDA error: out of memory")
# Share of a GPU's free memory that a batch may take: estimates are rough, and maps come and go.
_SHARE = 0.25


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that are free, those that torch holds in reserve among them; else none."""
    if device.type != "cuda":
        return 0.0
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + held)


def at_once(on_cpu: int, bytes_each: float, device: torch.device, most: int = 4096) -> int:
    """How many images, or numbers, to work on together.

    A GPU works on as many as a quarter of its free memory holds: small batches leave it idle.

    Parameters
    ----------
    on_cpu : int
        On any other device.
    bytes_each : float
        Memory that each takes.
    most : int
        On a GPU; more would gain nothing, or overflow its indices.
    """
    if device.type != "cuda":
        return on_cpu
    return max(1, min(most, int(_SHARE * free_memory(device) / bytes_each)))


def _is_full(error: RuntimeError) -> bool:
    """Whether a device's memory has ended, by whatever error says so."""
    full = isinstance(error, torch.OutOfMemoryError)
    return full or any(words in str(error) for words in _FULL)


class ShrinkingBatch:
    """Work on rows in parts, at first all at once, and in ever smaller ones where memory ends.

    Parameters
    ----------
    size : int
        Most rows of a part.
    tell : callable, optional
        Is given a line whenever parts shrink.
    """

    def __init__(self, size: int, tell: Callable[[str], None] | None = None) -> None:
        self.size, self.tell = size, tell

    def __call__(
        self,
        rows: Tensor,
        work: Callable[[Tensor], Result],
        restart: Callable[[], None] | None = None,
    ) -> list[Result]:
        """Results of all parts, in order.

        Parameters
        ----------
        rows : Tensor, shape (b,), int64
        work : callable
            Takes some of the rows.
        restart : callable, optional
            Undoes what parts have done before all are worked on again.

        Raises
        ------
        torch.OutOfMemoryError
            If a single row is too much.
        """
        while True:
            try:
                return [work(part) for part in rows.split(self.size)]
            except RuntimeError as error:
                if not _is_full(error) or min(self.size, len(rows)) <= 1:
                    raise
            # Not within the handler: its traceback would hold the tensors that filled the memory.
            self._shrink(len(rows))
            if restart is not None:
                restart()

    def over(self, count: int, work: Callable[[slice], Result]) -> Iterator[tuple[slice, Result]]:
        """Spans of `count` rows with the result of each, going on where memory ended.

        Parameters
        ----------
        work : callable
            Takes a span; must have changed nothing when it runs out of memory.

        Raises
        ------
        torch.OutOfMemoryError
            If a single row is too much.
        """
        start = 0
        while start < count:
            span = slice(start, min(start + self.size, count))
            try:
                result = work(span)
            except RuntimeError as error:
                if not _is_full(error) or span.stop - start <= 1:
                    raise
            else:
                yield span, result
                start = span.stop
                continue
            self._shrink(span.stop - start)

    def _shrink(self, n: int) -> None:
        self.size = max(1, min(self.size, n) // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.tell is not None:
            self.tell(f"out of memory on the device: on with {self.size} images at a time")
