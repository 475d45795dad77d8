"""What a finished job found, read from its directory: figures for scripts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from cryorecon.io.mrc import read_header
from cryorecon.io.star import read_star
from cryorecon.maps.fsc import crossing_shell

_THRESHOLDS = (0.5, 0.143)
# Results that other programs read, by what they are.
_RESULTS = {
    "map": "initial_model.mrc",
    "map_masked": "initial_model_masked.mrc",
    "mask": "initial_model_mask.mrc",
    "map_c1": "initial_model_C1.mrc",
    "map_unfiltered": "initial_model_unfiltered.mrc",
    "map_aligned": "initial_model_aligned.mrc",
    "half1": "run_half1_class001_unfil.mrc",
    "half2": "run_half2_class001_unfil.mrc",
    "particles": "run_data.star",
    "moments": "moments.h5",
    "fsc": "fsc.star",
    "log": "run.log",
}


def job_summary(folder: str | Path) -> dict[str, Any]:
    """Figures and files of a job directory as plain data.

    Returns
    -------
    dict
        ``job``, ``program``, ``input``, ``particles``, ``seed``, ``box``, ``pixel_size_angst``;
        ``fsc``: of what, and ``resolution_angst`` by threshold (null where the curve is below it
        from the first shell on); ``starts`` of engine moments; ``consensus``: ``jobs`` and
        ``pairs`` of agreement.star; ``files``.
    """
    folder = Path(folder)
    told = yaml.safe_load((folder / "job.yaml").read_text("utf-8"))
    files = {what: folder / name for what, name in _RESULTS.items() if (folder / name).exists()}
    found: dict[str, Any] = {
        "job": str(folder),
        "program": told["program"],
        "input": told["input"],
        "particles": told["input_rows"],
        "seed": told["seed"],
    }
    if "map" in files:
        header = read_header(files["map"])
        found |= {"box": header.shape[0], "pixel_size_angst": header.pixel_size_angst}
    if "fsc" in files:
        found["fsc"] = _fsc(files["fsc"])
    if (folder / "starts.star").exists():
        found["starts"] = _starts(read_star(folder / "starts.star")["starts"])
    if (folder / "agreement.star").exists():
        tables = read_star(folder / "agreement.star")
        found["consensus"] = {name: _records(table) for name, table in tables.items()}
    found["files"] = {what: str(path) for what, path in files.items()}
    return found


def _fsc(path: Path) -> dict[str, Any]:
    table = read_star(path)["fsc"]
    column = next(name for name in table.columns if "FourierShellCorrelation" in name)
    curve = torch.from_numpy(table[column].astype(float).to_numpy(copy=True))
    side_angst = float(table["rlnAngstromResolution"].iloc[1])
    shells = {f"{t:g}": crossing_shell(curve, t) for t in _THRESHOLDS}
    return {
        "of": path.read_text("utf-8").partition("\n")[0].partition("FSC of ")[2],
        "resolution_angst": {t: side_angst / s if s else None for t, s in shells.items()},
        "values": [round(float(value), 6) for value in curve],
    }


def _starts(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for row in table.to_dict("records"):
        agreed = float(row["cryoreconAgreementRadius"])
        misfit = float(row["cryoreconMisfit"])
        rows.append(
            {
                "start": int(row["cryoreconStart"]),
                "misfit": misfit if math.isfinite(misfit) else None,
                "agreement_radius": agreed if agreed >= 0 else None,
            }
        )
    return rows


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with numbers as numbers, under their names without the program's."""
    rows = []
    for row in table.to_dict("records"):
        names = (str(name).removeprefix("cryorecon") for name in row)
        rows.append(dict(zip(names, map(_number, row.values()), strict=True)))
    return rows


def _number(text: Any) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
