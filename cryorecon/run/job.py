"""A job directory: its log, what ran, and the markers that RELION looks for."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import torch
import yaml
from rich.console import Console

from cryorecon import __version__
from cryorecon.io.files import make_folder, replacing, sha256_of
from cryorecon.io.star import read_star, write_star

_MARKERS = {
    "success": "RELION_JOB_EXIT_SUCCESS",
    "failure": "RELION_JOB_EXIT_FAILURE",
    "aborted": "RELION_JOB_EXIT_ABORTED",
}
# What jobs write besides log and job.yaml, which are replaced at once.
_OUTPUTS = (
    "initial_model.mrc",
    "initial_model_C1.mrc",
    "initial_model_aligned.mrc",
    "run_half?_class001_unfil.mrc",
    "run_data.star",
    "encoder_data.star",
    "scale?.mrc",
    "fsc.star",
    "fsc.xml",
    "fsc.png",
    "map.png",
    "views.png",
    "pose_errors.png",
    "starts.star",
    "information.star",
    "shells.star",
    "from_start_map.mrc",
    "view_density.star",
    "agreement.star",
    "slices.png",
    "difference.png",
    "rounds.star",
    "report.html",
    "logfile.pdf",
    "RELION_OUTPUT_NODES.star",
)


class Job:
    """An open job: ``say`` writes a line to the terminal and to ``run.log``."""

    def __init__(self, folder: Path, console: Console, log: TextIO) -> None:
        self.folder, self.console = folder, console
        self._log, self._start = log, time.monotonic()

    def say(self, line: str) -> None:
        """One line, with the seconds since the start, to terminal and log."""
        stamped = f"{time.monotonic() - self._start:7.1f} s  {line}"
        self.console.print(stamped, markup=False, highlight=False)
        self._log.write(stamped + "\n")
        self._log.flush()

    def path(self, name: str) -> Path:
        """A file in the job directory."""
        return self.folder / name

    def record_round(self, stage: str, number: int, measured: Mapping[str, float]) -> None:
        """Add a row to ``rounds.star``, or replace the one of the same stage and number.

        Parameters
        ----------
        stage : str
            One word.
        number : int
            Of the round within its stage.
        measured : mapping of column name to number
        """
        path = self.path("rounds.star")
        row = {"cryoreconStage": stage, "cryoreconRound": str(number)}
        row |= {name: f"{value:.6f}" for name, value in measured.items()}
        rows: list[Any] = []
        if path.exists():
            rows = read_star(path)["rounds"].to_dict("records")
        places = [(old["cryoreconStage"], old["cryoreconRound"]) for old in rows]
        if (stage, str(number)) in places:
            rows[places.index((stage, str(number)))] = row
        else:
            rows.append(row)
        write_star(path, {"rounds": pd.DataFrame(rows)})


def _describe(inputs: Path, n_rows: int, config: Any, seed: int) -> dict[str, Any]:
    return {
        "program": f"cryorecon {__version__}",
        "command": " ".join(sys.argv),
        "input": str(inputs),
        "input_sha256": sha256_of(inputs),
        "input_rows": n_rows,
        "seed": seed,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "config": yaml.safe_load(yaml.safe_dump(_plain(config))),
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


@contextmanager
def open_job(
    folder: Path, console: Console, inputs: Path, n_rows: int, config: Any, seed: int
) -> Iterator[Job]:
    """Make the directory, record what runs in ``job.yaml``, and leave a marker at the end.

    Parameters
    ----------
    inputs : Path
        The particle STAR file.
    config : dataclass, or dict of them
        The resolved settings.
    """
    make_folder(folder)
    _clear(folder)
    with replacing(folder / "job.yaml") as temporary:
        temporary.write_text(
            yaml.safe_dump(_describe(inputs, n_rows, config, seed), sort_keys=False), "utf-8"
        )
    outcome = "failure"
    try:
        with (folder / "run.log").open("w", encoding="utf-8") as log:
            yield Job(folder, console, log)
        outcome = "success"
    except KeyboardInterrupt:
        outcome = "aborted"
        raise
    finally:
        (folder / _MARKERS[outcome]).touch()


def _clear(folder: Path) -> None:
    """Remove what an earlier job wrote: a job that fails must not seem to have made it."""
    for pattern in (*_MARKERS.values(), *_OUTPUTS):
        for path in folder.glob(pattern):
            path.unlink()


_NODE, _NODE_TYPE = "rlnPipeLineNodeName", "rlnPipeLineNodeType"


def write_output_nodes(folder: Path, nodes: dict[str, int]) -> None:
    """``RELION_OUTPUT_NODES.star``: file to RELION's node type (3 particles, 6 map, 13 PDF)."""
    names = [str(folder / name) for name in nodes]
    table = pd.DataFrame({_NODE: names, _NODE_TYPE: list(nodes.values())})
    write_star(folder / "RELION_OUTPUT_NODES.star", {"output_nodes": table})


def add_output_node(folder: Path, name: str, node_type: int) -> None:
    """Add a file to ``RELION_OUTPUT_NODES.star``, under the folder's name there, if it is new."""
    path = folder / "RELION_OUTPUT_NODES.star"
    if not path.exists():
        write_output_nodes(folder, {name: node_type})
        return
    table = read_star(path)["output_nodes"]
    whole = str(Path(table[_NODE].iloc[0]).parent / name) if len(table) else str(folder / name)
    if whole not in set(table[_NODE]):
        row = pd.DataFrame({_NODE: [whole], _NODE_TYPE: [str(node_type)]})
        write_star(path, {"output_nodes": pd.concat([table, row], ignore_index=True)})
