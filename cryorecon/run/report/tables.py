"""Tables of a job as the report shows them."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

# Of columns whose names do not tell it.
_UNITS = {
    "cryoreconResolutionUsed": "A",
    "cryoreconHalfMapResolution": "A",
    "cryoreconPoseChange": "degrees",
}


def table_of(table: pd.DataFrame | None) -> dict[str, Any] | None:
    """Headings and rows as text; None of a table without rows."""
    if table is None or len(table) == 0:
        return None
    rows = [[_short(cell) for cell in row] for row in table.itertuples(index=False)]
    return {"columns": [_heading(str(name)) for name in table.columns], "rows": rows}


def _heading(column: str) -> str:
    """A column's name as words, with its unit: cryoreconPoseChange is pose change (degrees)."""
    bare = column.removeprefix("cryorecon").removeprefix("rln")
    unit = _UNITS.get(column, "A" if bare.endswith("Angst") else "")
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", bare.removesuffix("Angst")).lower()
    return f"{words} ({unit})" if unit else words


def _short(cell: object) -> str:
    try:
        return f"{float(str(cell)):.4g}"
    except ValueError:
        return str(cell)
