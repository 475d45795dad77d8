"""The files of a job directory: what jobs leave there, and what a new one removes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cryorecon.errors import CryoreconError
from cryorecon.run.checkpoint import NAME
from cryorecon.run.stopping import ABORT_FILE

MARKERS = {
    "success": "RELION_JOB_EXIT_SUCCESS",
    "failure": "RELION_JOB_EXIT_FAILURE",
    "aborted": "RELION_JOB_EXIT_ABORTED",
}
# What the second of two teams of processes has to tell, while both work.
HALF_SET_2 = "half_set2.jsonl"
# What jobs write besides log and job.yaml, which are replaced at once.
_OUTPUTS = (
    NAME,
    "checkpoint[0-9]*.pt",
    HALF_SET_2,
    "reconstruction.mrc",
    "reconstruction_half?_unfil.mrc",
    "initial_model.mrc",
    "initial_model_mask.mrc",
    "initial_model_masked.mrc",
    "initial_model_C1.mrc",
    "initial_model_aligned.mrc",
    "initial_model_unfiltered.mrc",
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


def clear(folder: Path, *, outputs: bool) -> None:
    """Remove what an earlier job wrote: a job that fails must not seem to have made it."""
    for pattern in (*MARKERS.values(), ABORT_FILE, *(_OUTPUTS if outputs else ())):
        for path in folder.glob(pattern):
            path.unlink()


def refuse_own_input(folder: Path, inputs: Path, options: Any) -> None:
    """Nothing that a job reads may be among what it removes.

    Raises
    ------
    CryoreconError
    """
    for path in (inputs, *_paths(options)):
        inside = path.resolve().parent == folder.resolve()
        if inside and any(path.match(pattern) for pattern in _OUTPUTS):
            raise CryoreconError(
                f"{path} is the result of an earlier job in {folder}, which would be removed",
                "Write to another folder with -o",
            )


def _paths(value: Any) -> Iterator[Path]:
    """All paths among a job's options."""
    if isinstance(value, Path):
        yield value
    elif dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from _paths(getattr(value, part.name))
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _paths(part)
