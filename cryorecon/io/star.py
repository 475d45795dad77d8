"""STAR files as tables of text: nothing is converted until it is asked for.

Values stay the strings that the file holds, so columns that cryorecon does not know go out as
they came in, and a column that is never asked for is never parsed.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import starfile
from numpy.typing import NDArray

from cryorecon.errors import CryoreconError, require_file
from cryorecon.io.files import replacing
from cryorecon.io.text_table import PIECE_ROWS, TextTable

Tables = dict[str, pd.DataFrame]


def read_star(path: str | Path) -> Tables:
    """Read every block of a STAR file; simple blocks become tables of one row.

    Returns
    -------
    dict of DataFrame
        Block name without ``data_`` to a table of strings.

    Raises
    ------
    CryoreconError
        If the file is missing, is no STAR file, or a row has too few or too many values.
    """
    return {name: pd.concat(list(pieces), ignore_index=True) for name, pieces in star_blocks(path)}


def star_blocks(path: str | Path) -> Iterator[tuple[str, Iterator[pd.DataFrame]]]:
    """Read a STAR file block by block, long blocks some thousand rows at a time.

    Yields
    ------
    (str, iterator of DataFrame)
        Block name and its rows as tables of strings, to be read before the next block.

    Raises
    ------
    CryoreconError
        As :func:`read_star`, when the damaged place is reached.
    """
    for (name, _), pieces in groupby(_pieces(path), key=lambda found: found[:2]):
        yield name, (table for _, _, table in pieces)


def _pieces(path: str | Path) -> Iterator[tuple[str, int, pd.DataFrame]]:
    """(name, number of the block, some rows)."""
    path = require_file(path, "STAR file")
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for name, labels, first, rows in _blocks(lines):
                number += first == 0
                yield name, number, _as_table(path, name, labels, first, rows)
    except UnicodeDecodeError as error:
        raise CryoreconError(f"{path} is not a text file", "Give a RELION STAR file") from error
    if not number:
        raise CryoreconError(f"{path} holds no data_ block", "Give a RELION STAR file")


def _blocks(lines: Iterable[str]) -> Iterator[tuple[str, list[str] | None, int, list[str]]]:
    """(name, labels of a loop or None, number of the first row, lines) of each piece."""
    name: str | None = None
    labels: list[str] | None = None
    rows: list[str] = []
    first = 0
    for line in lines:
        text = line.strip()
        if text.startswith("data_"):
            if name is not None and (rows or not first):
                yield name, labels, first, rows
            name, labels, rows, first = text[5:], None, [], 0
        elif name is None or not text or text.startswith("#"):
            continue
        elif text.startswith("loop_") and labels is None:
            labels = []
        elif text.startswith("_") and labels is not None and not rows and not first:
            labels.append(text.split()[0][1:])
        else:
            rows.append(text)
            if labels is not None and len(rows) == PIECE_ROWS:
                yield name, labels, first, rows
                first, rows = first + PIECE_ROWS, []
    if name is not None and (rows or not first):
        yield name, labels, first, rows


def _as_table(
    path: Path, name: str, labels: list[str] | None, first: int, rows: list[str]
) -> pd.DataFrame:
    try:
        if labels is None:
            pairs = [shlex.split(row) for row in rows if row.startswith("_")]
            return pd.DataFrame({key[1:]: [value] for key, value in pairs}, dtype=object)
        if not rows:
            return pd.DataFrame(columns=labels, dtype=object)
        table = pd.read_csv(
            StringIO("\n".join(rows).replace("'", '"')),
            sep=r"\s+",
            header=None,
            dtype=str,
            comment="#",
            keep_default_na=False,
        )
    except Exception as error:
        # pandas and shlex report damage by exceptions of several kinds.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "damaged table"
        raise CryoreconError(
            f"{path}, block data_{name}, from row {first + 1} on, cannot be parsed as a STAR "
            f"file: {reason}",
            "Check that each row has one value per column",
        ) from error
    _check_width(path, name, table, labels, first)
    return table.set_axis(labels, axis="columns").astype(object)


def _check_width(path: Path, name: str, table: pd.DataFrame, labels: list[str], first: int) -> None:
    remedy = "Check that each row has one value per column"
    if table.shape[1] > len(labels):
        raise CryoreconError(
            f"{path}, block data_{name}: rows have more values than the table has columns", remedy
        )
    last = table.iloc[:, -1]
    short = np.flatnonzero(last.isna() | (last == "") | (table.shape[1] < len(labels)))
    if len(short):
        raise CryoreconError(
            f"{path}, block data_{name}, row {first + short[0] + 1}: fewer values than columns",
            remedy,
        )


def write_star(
    path: str | Path, tables: Mapping[str, pd.DataFrame | Iterable[pd.DataFrame]]
) -> None:
    """Write tables as loops; numbers with six decimals, strings as they are.

    A table may come in pieces of rows with the same columns.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for name, table in tables.items():
            pieces = [table] if isinstance(table, pd.DataFrame) else table
            for number, piece in enumerate(pieces):
                text = starfile.to_string({name: piece}, na_rep="nan").rstrip("\n") + "\n"
                if number:
                    text = text.split(f"_{piece.columns[-1]} #{piece.shape[1]}\n", 1)[1]
                elif file.tell():
                    text = "\n\n" + text.split("\n\n\n", 1)[1]
                file.write(text)
        file.write("\n\n")


def numbers(
    path: str | Path, table: pd.DataFrame | TextTable, column: str, *, finite: bool = True
) -> NDArray[np.float64]:
    """A column as float64.

    Raises
    ------
    CryoreconError
        Naming file, row (1-based) and column when a value is no finite number.
    """
    if isinstance(table, TextTable):
        values = table.numbers(column)
    else:
        values = pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64, copy=True)
    bad = np.flatnonzero(~np.isfinite(values)) if finite else np.array([], dtype=int)
    if len(bad):
        row = int(bad[0])
        raise CryoreconError(
            f"{path}, row {row + 1}, column {column}: {table[column].iloc[row]!r} is not a finite "
            f"number ({len(bad)} such rows)",
            "Correct or remove these rows",
        )
    return values
