"""A table of text, however long, compressed in memory.

A particle table of a million rows is some 150 MB of text and a gigabyte of Python strings, of
which a run needs a few columns of numbers and, at its end, everything once. Here it takes some
30 MB, on disk where it is longer than that: in an unnamed file of the folder for temporary ones.
"""

from __future__ import annotations

import tempfile
import weakref
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from io import BytesIO
from itertools import pairwise
from typing import IO

import numpy as np
import pandas as pd
from numpy.typing import NDArray

PIECE_ROWS = 5_000
# What is held in memory before a file takes all.
_IN_MEMORY = 8_000_000


class _Store:
    """Compressed columns one after the other, in memory or, beyond some size, in a file."""

    def __init__(self) -> None:
        self._file: IO[bytes] = BytesIO()
        self._end = 0

    def put(self, packed: bytes) -> tuple[int, int]:
        """Keep a column; where it begins and ends."""
        start, self._end = self._end, self._end + len(packed)
        if self._end > _IN_MEMORY and isinstance(self._file, BytesIO):
            held, self._file = self._file, tempfile.TemporaryFile()  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            self._file.write(held.getvalue())
        self._file.seek(start)
        self._file.write(packed)
        return start, self._end

    def get(self, place: tuple[int, int]) -> bytes:
        """A column from its place."""
        self._file.seek(place[0])
        return self._file.read(place[1] - place[0])


class TextTable:
    """Columns of strings in pieces of rows, each column of a piece compressed by itself.

    Parameters
    ----------
    store : _Store
        The compressed values of consecutive rows, joined by line feeds.
    pieces : sequence of mapping
        Column name to the place of its values in the store.
    lengths : sequence of int
        Rows of each piece.
    rows : array of int, optional
        Which of these rows the table has, in this order; all by default.
    """

    def __init__(
        self,
        store: _Store,
        pieces: list[dict[str, tuple[int, int]]],
        lengths: list[int],
        rows: NDArray[np.integer] | None = None,
    ) -> None:
        self._store, self._pieces, self._rows = store, pieces, rows
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    @classmethod
    def gather(cls, frames: Iterable[pd.DataFrame]) -> TextTable:
        """Compress tables of strings one by one and put them below each other."""
        store, pieces, lengths = _Store(), [], []
        for frame in frames:
            pieces.append({str(name): store.put(_packed(v)) for name, v in frame.items()})
            lengths.append(len(frame))
        return cls(store, pieces, lengths)

    @property
    def columns(self) -> list[str]:
        """Names, in the file's order."""
        return list(self._pieces[0]) if self._pieces else []

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._rows is None else len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __getitem__(self, name: str) -> pd.Series:
        """A whole column as strings."""
        values = [self._strings(name, rows) for rows in self._blocks()]
        return pd.Series(np.concatenate(values) if values else [], name=name, dtype=object)

    def subset(self, rows: NDArray[np.integer]) -> TextTable:
        """Some rows, in the given order; nothing is copied."""
        lengths = np.diff(self._starts).tolist()
        return TextTable(self._store, self._pieces, lengths, self._of(np.asarray(rows)))

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column as float64; NaN where a value is no number."""
        found = np.empty(int(self._starts[-1]))
        for number, (start, end) in enumerate(pairwise(self._starts)):
            if end > start:
                values = pd.Series(self._values(number, name), dtype=object)
                found[start:end] = pd.to_numeric(values, "coerce").to_numpy(np.float64)
        return found if self._rows is None else found[self._rows]

    def frames(
        self,
        new: Mapping[str, NDArray[np.generic]] | None = None,
        without: Collection[str] = (),
    ) -> Iterator[pd.DataFrame]:
        """The rows in order, some thousands at a time.

        Parameters
        ----------
        new : mapping of arrays, shape (n,), optional
            Columns to replace, or to add at the end.
        without : collection of str
            Columns to leave out.
        """
        done, columns = 0, [c for c in self.columns if c not in without]
        for rows in self._blocks():
            frame = pd.DataFrame({c: self._strings(c, rows) for c in columns}, dtype=object)
            for name, values in (new or {}).items():
                frame[name] = values[done : done + len(rows)]
            done += len(rows)
            yield frame

    def text(self, name: str) -> Iterator[pd.Series]:
        """A column as strings, some thousands at a time."""
        for rows in self._blocks():
            yield pd.Series(self._strings(name, rows), dtype=object)

    def _of(self, rows: NDArray[np.integer]) -> NDArray[np.integer]:
        return rows if self._rows is None else self._rows[rows]

    def _blocks(self) -> Iterator[NDArray[np.integer]]:
        for start in range(0, len(self), PIECE_ROWS):
            yield self._of(np.arange(start, min(start + PIECE_ROWS, len(self))))

    def _strings(self, name: str, rows: NDArray[np.integer]) -> NDArray[np.object_]:
        found = np.empty(len(rows), dtype=object)
        piece_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(piece_of):
            here = piece_of == number
            found[here] = self._values(number, name)[rows[here] - self._starts[number]]
        return found

    def _values(self, number: int, name: str) -> NDArray[np.object_]:
        return _unpacked(self._store.get(self._pieces[number][name]))


def _packed(values: pd.Series) -> bytes:
    return zlib.compress("\n".join(map(str, values.to_numpy(object))).encode(), 1)


def _unpacked(packed: bytes) -> NDArray[np.object_]:
    return np.array(zlib.decompress(packed).decode().split("\n"), dtype=object)
