"""Batches that shrink when a device runs out of memory, instead of ending the job."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


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
            except torch.OutOfMemoryError:
                if min(self.size, len(rows)) <= 1:
                    raise
            # Not within the handler: its traceback would hold the tensors that filled the memory.
            self._shrink(len(rows))
            if restart is not None:
                restart()

    def _shrink(self, n: int) -> None:
        self.size = max(1, min(self.size, n) // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.tell is not None:
            self.tell(f"out of memory on the device: on with {self.size} images at a time")
