"""STAR files as tables of text: nothing is converted until it is asked for.

Values stay the strings that the file holds, so columns that cryorecon does not know go out as
they came in, and a column that is never asked for is never parsed.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from itertools import chain, groupby, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import starfile
from numpy.typing import NDArray

from cryorecon.errors import CryoreconError, require_file
from cryorecon.io.files import replacing
from cryorecon.io.text_table import PIECE_ROWS, TextTable

Tables = dict[str, pd.DataFrame]

# A value: quoted from a blank to a blank, or anything without one. Other spaces are letters, as
# they are to pandas and to RELION.
_VALUE = re.compile(r"""'(.*?)'(?=[ \t]|$)|"(.*?)"(?=[ \t]|$)|([^ \t]+)""")
# What programs take for no value, or not for all of it, unless it is quoted; the second where a row
# begins.
_QUOTED = re.compile(r"""^$|[\s#]|^['"]""")
_QUOTED_FIRST = re.compile(r"data_|loop_|_")
# What no text holds, looked for where a file begins.
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f]")
_HEAD_BYTES = 4096
_LARGEST_INTEGER = 2**31
_LONGEST_SHOWN = 60
_ONE_VALUE_A_COLUMN = "Check that each row has one value per column"


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
        with path.open(encoding="utf-8-sig") as lines:
            for name, labels, first, rows in _blocks(lines):
                number += first == 0
                yield name, number, _as_table(path, name, labels, first, rows)
    except UnicodeDecodeError as error:
        raise _undecodable(path) from error
    if not number:
        raise CryoreconError(f"{path} holds no data_ block", "Give a RELION STAR file")


def _undecodable(path: Path) -> CryoreconError:
    """What to say of a file that is not UTF-8: other text, or no text at all."""
    with path.open("rb") as file:
        binary = _CONTROL.search(file.read(_HEAD_BYTES))
    # In Latin-1 every byte is a letter, so that lines can be counted.
    with path.open(encoding="latin-1") as lines:
        for number, line in enumerate(() if binary else lines, 1):
            try:
                line.encode("latin-1").decode()
            except UnicodeDecodeError as error:
                return CryoreconError(
                    f"{path}, line {number}: byte 0x{ord(line[error.start]):02x} shows that the "
                    "text is not UTF-8",
                    "Write it in UTF-8, for example by iconv -f latin1 -t utf-8, or with plain "
                    "letters; files that it names may have to be renamed",
                )
    return CryoreconError(f"{path} is not a text file", "Give a RELION STAR file")


def _begins_block(text: str, labels: list[str] | None, following: str) -> bool:
    """Whether a line names a block; files of jobs and micrographs may be named so, too."""
    if labels is not None and len(labels) == 1:
        return following.startswith(("loop_", "_")) or len(following.split()) > 1
    return not labels or len(text.split()) == 1


def _meaningful(lines: Iterable[str]) -> Iterator[str]:
    """Lines without their ends, blank ones and comments."""
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            yield text


def _blocks(lines: Iterable[str]) -> Iterator[tuple[str, list[str] | None, int, list[str]]]:
    """(name, labels of a loop or None, number of the first row, lines) of each piece."""
    name: str | None = None
    labels: list[str] | None = None
    rows: list[str] = []
    first = 0
    for text, following in pairwise(chain(_meaningful(lines), [""])):
        if text.startswith("data_") and _begins_block(text, labels, following):
            if name is not None and (rows or not first):
                yield name, labels, first, rows
            name, labels, rows, first = text[5:], None, [], 0
        elif name is None:
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
            return _pairs(rows)
        _check_labels(path, name, labels)
        if not rows:
            return pd.DataFrame(columns=labels, dtype=object)
        text = "\n".join(rows)
        awkward = "'" in text or '"' in text or "#" in text
        if awkward:
            table = pd.DataFrame([_values(row) for row in rows], dtype=object)
        else:
            table = pd.read_csv(
                StringIO(text),
                sep=r"\s+",
                header=None,
                dtype=str,
                quoting=csv.QUOTE_NONE,
                keep_default_na=False,
            )
    except (ValueError, pd.errors.ParserError, OverflowError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "damaged table"
        raise CryoreconError(
            f"{path}, block data_{name}, from row {first + 1} on, cannot be parsed as a STAR "
            f"file: {reason}",
            _ONE_VALUE_A_COLUMN,
        ) from error
    last = table.iloc[:, -1]
    # pandas fills short rows with nothing, which no unquoted value can be.
    short = last.isna() if awkward else last == ""
    _check_width(path, name, labels, first, short.to_numpy(), table.shape[1])
    return table.set_axis(labels, axis="columns").astype(object)


def _check_labels(path: Path, name: str, labels: list[str]) -> None:
    twice = next((label for k, label in enumerate(labels) if label in labels[:k]), None)
    if twice is not None:
        raise CryoreconError(
            f"{path}, block data_{name}: the column {twice} occurs twice", "Remove one of them"
        )


def _pairs(rows: list[str]) -> pd.DataFrame:
    """A block of labels with one value each."""
    pairs = [_values(row) for row in rows]
    bad = next((row for row, pair in zip(rows, pairs, strict=True) if len(pair) != 2), None)
    if bad is not None or any(not key.startswith("_") for key, _ in pairs):
        raise ValueError(f"{bad or 'a row'!r} is no label with a value")
    return pd.DataFrame({key[1:]: [value] for key, value in pairs}, dtype=object)


def _values(row: str) -> list[str]:
    """Values of a row; quotes and ``#`` count only where a value begins."""
    found = []
    for match in _VALUE.finditer(row):
        if match.group().startswith("#"):
            break
        found.append(match.group(match.lastindex or 0))
    return found


def _check_width(
    path: Path, name: str, labels: list[str], first: int, short: NDArray[np.bool_], width: int
) -> None:
    if width > len(labels):
        raise CryoreconError(
            f"{path}, block data_{name}: rows have more values than the table has columns",
            f"{_ONE_VALUE_A_COLUMN}; values with spaces, such as paths, are in quotes",
        )
    rows = np.flatnonzero(short | (width < len(labels)))
    if len(rows):
        raise CryoreconError(
            f"{path}, block data_{name}, row {first + rows[0] + 1}: fewer values than columns",
            _ONE_VALUE_A_COLUMN,
        )


def can_be_a_file_name(text: str) -> bool:
    """Whether a table may name a file so: spaces are quoted, other programs differ on the rest."""
    return bool(text) and text.isprintable() and not re.search("[\"'#\ufffd]", text)


def write_star(
    path: str | Path, tables: Mapping[str, pd.DataFrame | Iterable[pd.DataFrame]]
) -> None:
    """Write tables as loops; numbers with six decimals, strings in quotes where they need them.

    A table may come in pieces of rows with the same columns. The starfile library reads all but
    strings that have quotes in them, which it takes for others.

    Raises
    ------
    CryoreconError
        If a string cannot be quoted: it has line breaks, or blanks after quotes of both kinds.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for name, table in tables.items():
            pieces = [table] if isinstance(table, pd.DataFrame) else table
            for number, piece in enumerate(pieces):
                if not number:
                    head = starfile.to_string({name: piece[:0]}).rstrip("\n") + "\n"
                    file.write("\n\n" + head.split("\n\n\n", 1)[1] if file.tell() else head)
                columns = [_texts(path, str(name), values) for name, values in piece.items()]
                if columns:
                    columns[0] = [_opening(text) for text in columns[0]]
                file.writelines("\t".join(row) + "\n" for row in zip(*columns, strict=True))
        file.write("\n\n")


def _texts(path: str | Path, name: str, values: pd.Series) -> list[str]:
    """Values of a column as they stand in rows."""
    found = values.tolist()
    try:
        return [_quoted(v) if isinstance(v, str) else _unquoted(v) for v in found]
    except ValueError as error:
        raise CryoreconError(
            f"{path}, column {name}: {_shown(error.args[0])} cannot stand in a STAR file, since it "
            "has line breaks, or blanks after quotes of both kinds",
            "Rename what it names, without quotes and line breaks",
        ) from error


def _unquoted(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6f}"
    return "nan" if value is None or value is pd.NA else str(value)


def _quoted(value: str) -> str:
    """A string, in quotes where it needs them: of the kind that it has not, or that do not end it.

    Raises
    ------
    ValueError
        With the string, if there is none.
    """
    if not _QUOTED.search(value):
        return value
    for mark in sorted("\"'", key=lambda mark: mark in value):
        # A quote ends a value where a blank follows, nowhere else.
        if not re.search(mark + r"\s|[\n\r]", value):
            return mark + value + mark
    raise ValueError(value)


def _opening(text: str) -> str:
    """The first of a row, which must not look like a line that begins a table."""
    return f'"{text}"' if _QUOTED_FIRST.match(text) else text


def numbers(
    path: str | Path,
    table: pd.DataFrame | TextTable,
    column: str,
    *,
    finite: bool = True,
    rows: NDArray[np.integer] | None = None,
) -> NDArray[np.float64]:
    """A column as float64.

    Parameters
    ----------
    rows : array of int, optional
        Row of each value in the file, 0-based, where the table is a part of it.

    Raises
    ------
    CryoreconError
        Naming file, row (1-based) and column when a value is no finite number.
    """
    if isinstance(table, TextTable):
        values = table.numbers(column)
    else:
        values = pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64, copy=True)
    if finite:
        _refuse(path, table, column, ~np.isfinite(values), rows, "not a finite number")
    return values


def _refuse(
    path: str | Path,
    table: pd.DataFrame | TextTable,
    column: str,
    bad: NDArray[np.bool_],
    rows: NDArray[np.integer] | None,
    what: str,
) -> None:
    """Stop at the first value that is not what it should be, naming its row."""
    count = int(bad.sum())
    if count == 0:
        return
    row = int(bad.argmax())
    told = row if rows is None else int(rows[row])
    raise CryoreconError(
        f"{path}, row {told + 1}, column {column}: {_shown(table[column].iloc[row])} is {what} "
        f"({such_rows(count, len(bad))})",
        correct_rows(count, len(bad)),
    )


def such_rows(count: int, of: int) -> str:
    """How many rows of a table are bad."""
    return f"all {of} rows" if count == of > 1 else f"{count} such row{'s' * (count != 1)}"


def correct_rows(count: int, of: int) -> str:
    """What to do about them: nothing would be left without all."""
    return "Correct the column" if count == of else "Correct or remove these rows"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def integers(
    path: str | Path,
    table: pd.DataFrame | TextTable,
    column: str,
    *,
    rows: NDArray[np.integer] | None = None,
) -> NDArray[np.int64]:
    """A column of whole numbers, as int64; otherwise like :func:`numbers`."""
    values = numbers(path, table, column, rows=rows)
    bad = (values != np.round(values)) | (np.abs(values) >= _LARGEST_INTEGER)
    _refuse(path, table, column, bad, rows, "no whole number of a usual size")
    return values.astype(np.int64)
