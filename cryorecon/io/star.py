"""STAR files as tables of text: nothing is converted until it is asked for.

Values stay the strings that the file holds, so columns that cryorecon does not know go out as
they came in, and a column that is never asked for is never parsed.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import starfile
from numpy.typing import NDArray

from cryorecon.errors import CryoreconError, require_file
from cryorecon.io.files import replacing

Tables = dict[str, pd.DataFrame]

_LABEL = re.compile(r"^_(\S+)", re.MULTILINE)


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
    path = require_file(path, "STAR file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CryoreconError(f"{path} is not a text file", "Give a RELION STAR file") from error
    if not re.search(r"^data_", text, re.MULTILINE):
        raise CryoreconError(f"{path} holds no data_ block", "Give a RELION STAR file")
    labels = list(dict.fromkeys(_LABEL.findall(text)))
    try:
        blocks = starfile.read(path, always_dict=True, parse_as_string=labels)
    except Exception as error:
        # The library reports damage by whatever exception the parser beneath it raises.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "damaged table"
        raise CryoreconError(
            f"{path} cannot be parsed as a STAR file: {reason}",
            "Check that each row has one value per column",
        ) from error
    return {name: _as_table(path, name, block) for name, block in blocks.items()}


def _as_table(path: Path, name: str, block: object) -> pd.DataFrame:
    if isinstance(block, dict):
        return pd.DataFrame({key: [str(value)] for key, value in block.items()}, dtype=object)
    if not isinstance(block, pd.DataFrame):
        return pd.DataFrame()
    if not isinstance(block.index, pd.RangeIndex):
        raise CryoreconError(
            f"{path}, block data_{name}: rows have more values than the table has columns",
            "Check that each row has one value per column",
        )
    if block.shape[1] and block.shape[0]:
        last = block.iloc[:, -1]
        short = block.index[last.isna() | (last == "")]
        if len(short):
            raise CryoreconError(
                f"{path}, block data_{name}, row {short[0] + 1}: fewer values than columns",
                "Check that each row has one value per column",
            )
    return pd.DataFrame({name: _shared(column) for name, column in block.items()})


def _shared(column: pd.Series) -> pd.Series:
    """A column of strings, of which equal ones are one object where few differ.

    Micrographs, optics groups and constants then take 8 bytes a row instead of some 70.
    """
    text = column.astype(object).where(column.notna(), "nan")
    codes, distinct = pd.factorize(text)
    if 4 * len(distinct) > len(text):
        return text
    return pd.Series(np.asarray(distinct, dtype=object)[codes], index=text.index, dtype=object)


def write_star(path: str | Path, tables: Tables) -> None:
    """Write tables as loops; numbers with six decimals, strings as they are."""
    with replacing(path) as temporary:
        named = temporary.with_suffix(".star")
        try:
            starfile.write(dict(tables), named, na_rep="nan")
            named.replace(temporary)
        finally:
            named.unlink(missing_ok=True)


def numbers(
    path: str | Path, table: pd.DataFrame, column: str, *, finite: bool = True
) -> NDArray[np.float64]:
    """A column as float64.

    Raises
    ------
    CryoreconError
        Naming file, row (1-based) and column when a value is no finite number.
    """
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=np.float64, copy=True)
    bad = np.flatnonzero(~np.isfinite(values)) if finite else np.array([], dtype=int)
    if len(bad):
        row = int(bad[0])
        raise CryoreconError(
            f"{path}, row {row + 1}, column {column}: {table[column].iloc[row]!r} is not a finite "
            f"number ({len(bad)} such rows)",
            "Correct or remove these rows",
        )
    return values
