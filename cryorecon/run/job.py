"""A job directory: its log, what ran, and the markers that RELION looks for."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import shlex
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
from cryorecon.errors import CryoreconError, LostRankError
from cryorecon.io.files import JOB_LOCK, locked, remove_unfinished, replacing, sha256_of
from cryorecon.io.star import read_star, write_star
from cryorecon.ranks import ALONE, Ranks
from cryorecon.run.checkpoint import NAME, Checkpoint
from cryorecon.run.endings import marked, reason_of, told_by_the_first
from cryorecon.run.job_files import HALF_SET_2, clear, refuse_own_input
from cryorecon.run.progress import Update, stage_bar
from cryorecon.run.stopping import Stop, TooLateError, listening


class Job:
    """An open job: ``say`` writes a line to the terminal and to ``run.log``.

    Attributes
    ----------
    folder : Path
    console : Console
    stop : Stop
        Whether somebody has asked the job to end.
    checkpoint : Checkpoint
        What a continued job begins with.
    ranks : Ranks
        Processes that share the job; the first one writes and tells.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        log: TextIO,
        stop: Stop,
        checkpoint: Checkpoint,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.console = folder, console
        self.stop, self.checkpoint, self.ranks = stop, checkpoint, ranks
        self._log, self._start = log, time.monotonic()
        self._kept: list[dict[str, Any]] = []
        self._on_disk = False

    @property
    def writes(self) -> bool:
        """Whether this process writes the job's files."""
        return self.ranks.first

    def for_team(self, number: int, ranks: Ranks) -> Job:
        """The same job as one of two teams sees it that work at the same time."""
        team = copy.copy(self)
        team.checkpoint = self.checkpoint.for_team(number, ranks)
        team._kept = self._kept = []
        team._on_disk = number == 1 and ranks.first
        return team

    def hear(self, source: int) -> None:
        """Tell what the first process of the second team has kept for the log."""
        told = self.ranks.bytes_from(source, json.dumps(self._kept).encode())
        if self.writes:
            self._tell(json.loads(told))

    def hear_from_file(self) -> None:
        """Tell what the second team had kept when an earlier run of the job ended."""
        path = self.path(HALF_SET_2)
        if self.writes and path.exists():
            # The last line may not be whole.
            lines = path.read_text("utf-8").split("\n")[:-1]
            self._tell([json.loads(line) for line in lines])

    def _tell(self, told: list[dict[str, Any]]) -> None:
        for kept in told:
            if "line" in kept:
                self._print(kept["line"])
            else:
                self.record_round(**kept)
        self.path(HALF_SET_2).unlink(missing_ok=True)

    def _keep(self, **kept: Any) -> None:
        """For the first process to tell later."""
        self._kept.append(kept)
        if self._on_disk:
            with self.path(HALF_SET_2).open("a", encoding="utf-8") as file:
                file.write(json.dumps(kept) + "\n")

    def say(self, line: str) -> None:
        """One line, with the seconds since the start, to terminal and log."""
        stamped = f"{time.monotonic() - self._start:7.1f} s  {line}"
        if self.writes:
            self._print(stamped)
        else:
            self._keep(line=stamped)

    def _print(self, stamped: str) -> None:
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
        if not self.writes:
            self._keep(stage=stage, number=number, measured=dict(measured))
            return
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

    @contextmanager
    def bar(self, title: str, total: int, unit: str = "images") -> Iterator[Update]:
        """A progress bar; RELION's request to end is looked for whenever it moves."""
        with stage_bar(self.console, title, total, unit) as update:

            def tick(done: int, note: str = "") -> None:
                self.stop.poll()
                update(done, note)

            yield tick

    def tell_how_to_go_on(self) -> None:
        """What is kept, and the command that continues the job."""
        # Alone on its line, to be copied; the log may be on a full disk.
        for line in (self.checkpoint.describe(), continue_command(self.folder, self.ranks)):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self.say("stopped")


def continue_command(folder: Path, ranks: Ranks = ALONE) -> str:
    """What continues a job of any engine."""
    return program_command(["abinitio", "--continue", str(folder)], ranks)


def program_command(words: list[str], ranks: Ranks = ALONE) -> str:
    """A command of this program, for as many processes on a machine as there are now."""
    several = ["torchrun", "--nproc-per-node", str(ranks.neighbours), "-m"]
    return shlex.join([*(several if ranks.count > 1 else []), "cryorecon", *words])


@dataclasses.dataclass(frozen=True)
class Task:
    """What a job does, as ``job.yaml`` records it.

    Attributes
    ----------
    kind : str
        Which function of this layer runs it.
    inputs : Path
        The particle STAR file, or a moments file.
    n_rows : int
        Particles in use.
    config : dataclass, or dict of them
        The resolved settings.
    options : dataclass, or dict of them
        What the user chose: a continued job is run with these.
    seed : int
    also_read : dict of str to str
        Checksums of what else is read, which must be the same when the job goes on.
    """

    kind: str
    inputs: Path
    n_rows: int
    config: Any
    options: Any
    seed: int
    also_read: dict[str, str] = dataclasses.field(default_factory=dict)


def _describe(task: Task, ranks: Ranks) -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "program": f"cryorecon {__version__}",
        "command": shlex.join(sys.argv),
        "directory": str(Path.cwd()),
        "kind": task.kind,
        "input": str(task.inputs),
        "input_sha256": sha256_of(task.inputs),
        "input_rows": task.n_rows,
        "also_read": task.also_read,
        "seed": task.seed,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "gpu": gpus,
        "threads": torch.get_num_threads(),
        "processes": ranks.count,
        "config": _plain(task.config),
        "options": _plain(task.options),
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
    folder: Path, console: Console, task: Task, *, resume: bool = False, ranks: Ranks = ALONE
) -> Iterator[Job]:
    """Make the directory, record what runs in ``job.yaml``, and leave a marker at the end.

    Parameters
    ----------
    resume : bool
        Go on with what the directory holds; else whatever an earlier job wrote is removed.
    ranks : Ranks
        Processes that share the job; the first one does all this.

    Raises
    ------
    CryoreconError
        If another job works in the directory, or an earlier one's results there are this one's
        input; it is then left as it is.
    StoppedError
        If the user or RELION asked to stop; what is kept and how to go on has been told.
    """
    if not resume:
        refuse_own_input(folder, task.inputs, task.options)
    with _log(folder, ranks, resume=resume) as log:
        if ranks.first:
            _begin(folder, task, ranks, resume=resume)
        ranks.wait()
        with marked(folder, ranks), listening(folder, patient=ranks.count > 1) as stop:
            checkpoint = Checkpoint(folder / NAME, stop, resume=resume, ranks=ranks)
            quiet = console if ranks.first else Console(quiet=True)
            job = Job(folder, quiet, log, stop, checkpoint, ranks)
            if resume:
                job.hear_from_file()
            try:
                yield job
                # The first one still writes.
                ranks.wait()
            except (KeyboardInterrupt, CryoreconError, OSError) as met:
                reason = reason_of(folder, met, ranks)
                _tell_how_to_go_on(job, reason)
                raise reason from (met.__cause__ if reason is met else met)
        if ranks.first:
            checkpoint.remove()


def _begin(folder: Path, task: Task, ranks: Ranks, *, resume: bool) -> None:
    """Remove what an earlier job wrote, and write ``job.yaml``."""
    if resume:
        _refuse_changed(folder / "job.yaml", task.also_read)
    clear(folder, outputs=not resume)
    remove_unfinished(folder)
    if not resume:
        with replacing(folder / "job.yaml") as temporary:
            text = yaml.safe_dump(_describe(task, ranks), sort_keys=False)
            temporary.write_text(text, "utf-8")


def _refuse_changed(record: Path, also_read: dict[str, str]) -> None:
    before = yaml.safe_load(record.read_text("utf-8")).get("also_read") or {}
    for name, checksum in also_read.items():
        if before.get(name, checksum) != checksum:
            raise CryoreconError(
                f"The {name.replace('_', ' ')} changed since the job in {record.parent} was begun",
                "Bring the old files back, or start anew with --overwrite",
            )


def _log(folder: Path, ranks: Ranks, *, resume: bool) -> TextIO:
    if not ranks.first:
        return Path(os.devnull).open("a", encoding="utf-8")
    log = locked(folder, JOB_LOCK)
    if not resume:
        log.truncate(0)
    return log


def _tell_how_to_go_on(job: Job, reason: BaseException) -> None:
    """On request, or where the disk or another process is to blame.

    By the first process; by any that may be the only one left.
    """
    stopped, lost = isinstance(reason, KeyboardInterrupt), isinstance(reason, LostRankError)
    if not stopped:
        blameless = lost or isinstance(reason.__cause__ or reason, OSError)
        if not blameless or not job.checkpoint.path.exists():
            return
    if not job.writes:
        if not lost and not isinstance(reason, TooLateError):
            return
        if told_by_the_first(job.folder, job.ranks):
            return
        job.console = Console(stderr=True)
    with contextlib.suppress(OSError):
        job.tell_how_to_go_on()


_NODE, _NODE_TYPE = "rlnPipeLineNodeName", "rlnPipeLineNodeType"


def write_output_nodes(folder: Path, nodes: dict[str, int]) -> None:
    """``RELION_OUTPUT_NODES.star``: file to RELION's node type.

    3 particles, 6 map, 7 mask, 10 half map, 13 PDF.
    """
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
