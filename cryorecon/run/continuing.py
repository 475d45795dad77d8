"""Going on with a job that was killed, stopped or failed, from what its directory says."""

from __future__ import annotations

import dataclasses
import shlex
import types
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from rich.console import Console

from cryorecon import __version__
from cryorecon.errors import CryoreconError
from cryorecon.io.files import METHODS_PLAN, sha256_of
from cryorecon.ranks import ALONE, Ranks, wanted
from cryorecon.run.abinitio import abinitio
from cryorecon.run.abinitio_input import AbinitioOptions
from cryorecon.run.endings import finished
from cryorecon.run.moments.estimate import MomentsOptions
from cryorecon.run.moments.reconstruct import (
    MomentReconstructOptions,
    abinitio_moments,
    reconstruct_moments,
)
from cryorecon.run.paper_protocol import PaperOptions, abinitio_perturbed

Options = TypeVar("Options")
_OF_MOMENTS = ("moments", "moments-fit")


def read_record(folder: Path) -> dict[str, Any]:
    """What ``job.yaml`` says.

    Raises
    ------
    CryoreconError
        If the folder is not that of a job that can go on.
    """
    path = folder / "job.yaml"
    if (folder / METHODS_PLAN).is_file():
        raise CryoreconError(
            f"{folder} holds the jobs of --method all",
            "Repeat the command that they were begun with: it goes on where it ended",
        )
    if not path.is_file():
        raise CryoreconError(f"{folder} holds no job.yaml", "Give the directory of a job")
    try:
        record = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise CryoreconError(f"{path} cannot be read", "Start anew with --overwrite") from error
    needed = ("kind", "input", "input_sha256", "options", "directory")
    if not isinstance(record, dict) or not set(needed) <= set(record):
        raise CryoreconError(
            f"{path} does not say how the job was begun, as of an older version",
            "Start anew with --overwrite",
        )
    return record


def begun_with(folder: Path) -> list[str]:
    """The command line that a job was begun with, program first."""
    return shlex.split(str(read_record(folder).get("command", "")))


def threads_of(folder: Path) -> int | None:
    """CPU threads that each process of a job was begun with, if there are as many processes."""
    record = read_record(folder)
    threads = record.get("threads")
    as_before = record.get("processes", 1) == wanted()
    return threads if as_before and isinstance(threads, int) and threads > 0 else None


def is_of_moments(folder: Path) -> bool:
    """Whether a job is one of engine moments."""
    return read_record(folder).get("kind") in _OF_MOMENTS


def continue_job(
    folder: Path, console: Console, ranks: Ranks = ALONE, *, allow_ambiguous: bool = False
) -> None:
    """Go on with a job of any engine to the result of an uninterrupted one.

    Parameters
    ----------
    ranks : Ranks
        Processes that share the job from now on, however many there were before.
    allow_ambiguous : bool
        Of engine moments: write a map that the moments do not determine, too, although the job
        was begun without.

    Raises
    ------
    CryoreconError
        If the folder holds no job, or its input has changed.
    """
    record = read_record(folder)
    if finished(folder):
        _tell(console, f"{folder} is finished: nothing to do")
        return
    base = _base_of(record)
    inputs = _found(record["input"], base)
    if sha256_of(inputs) != record["input_sha256"]:
        raise CryoreconError(
            f"{inputs} has changed since the job in {folder} was begun",
            "Bring the old file back, or start anew with --overwrite",
        )
    _tell_differences(record, console, ranks)
    if allow_ambiguous:
        _allow_ambiguous(record)
    _run(record, inputs, folder, base, console, ranks)


def _allow_ambiguous(record: dict[str, Any]) -> None:
    """No start of the fit depends on it."""
    options = record["options"]
    (options["fit"] if record["kind"] == "moments" else options)["allow_ambiguous"] = True


def _run(
    record: dict[str, Any], inputs: Path, folder: Path, base: Path, console: Console, ranks: Ranks
) -> None:
    kind, given = record["kind"], record["options"]
    try:
        if kind == "abinitio":
            here = _at_home(from_plain(AbinitioOptions, given, base), base)
            width = record["config"]["diameter"]
            abinitio(inputs, folder, here, console, resume=True, ranks=ranks, begun_with=width)
        elif kind == "perturbed" and ranks.count == 1:
            paper = from_plain(PaperOptions, given, base)
            abinitio_perturbed(inputs, folder, _at_home(paper, base), console, resume=True)
        elif kind == "moments":
            wanted = from_plain(MomentsOptions, given["moments"], base)
            fit = from_plain(MomentReconstructOptions, given["fit"], base)
            wanted = _at_home(wanted, base)
            abinitio_moments(inputs, folder, wanted, fit, console, resume=True, ranks=ranks)
        elif kind == "moments-fit":
            fit = from_plain(MomentReconstructOptions, given, base)
            reconstruct_moments(inputs, folder, fit, console, resume=True, ranks=ranks)
        elif kind == "perturbed":
            raise CryoreconError(
                f"The published protocol, in {folder}, runs in one process", "Leave torchrun out"
            )
        else:
            raise KeyError(kind)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CryoreconError(
            f"{folder / 'job.yaml'} has settings that this version does not know ({error})",
            "Start anew with --overwrite",
        ) from error


def _found(path: str, base: Path) -> Path:
    """A path of the job as seen from here."""
    given = Path(path)
    here = given if given.is_absolute() or base == Path.cwd() else base / given
    if not here.is_file():
        raise CryoreconError(
            f"The job's input {here} is gone",
            "Bring it back; if the project was moved, go on from the folder that stands for "
            f"{base} now",
        )
    return here


def _base_of(record: dict[str, Any]) -> Path:
    """Where the job was begun; the current directory if the project was moved there."""
    base, given = Path(record["directory"]), Path(record["input"])
    moved = not given.is_absolute() and not (base / given).is_file() and given.is_file()
    return Path.cwd() if moved else base


def _at_home(options: Options, base: Path) -> Options:
    """Where images are named relative to the directory that the job was begun in."""
    away = base != Path.cwd() and getattr(options, "project", None) is None
    return dataclasses.replace(options, project=base) if away else options  # type: ignore[type-var]


def _tell_differences(record: dict[str, Any], console: Console, ranks: Ranks) -> None:
    """What may make the result differ from an uninterrupted run's in the last digits."""
    now = {
        "program": f"cryorecon {__version__}",
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "processes": ranks.count,
    }
    for name, value in now.items():
        if record.get(name, 1) != value:
            _tell(
                console,
                f"WARNING: begun with {name} {record.get(name)}, now {value}: the result may "
                "differ in its last digits from an uninterrupted run's",
            )


def _tell(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def from_plain(kind: type[Options], values: dict[str, Any], base: Path) -> Options:
    """A dataclass from what YAML made of it; relative paths are relative to `base`.

    Raises
    ------
    TypeError, ValueError
        If the values are not of this dataclass.
    """
    hints = get_type_hints(kind)
    if unknown := set(values) - set(hints):
        raise ValueError(", ".join(sorted(unknown)))
    return kind(**{name: _value(hints[name], value, base) for name, value in values.items()})


def _kind_of(kinds: list[Any], values: dict[str, Any]) -> Any:
    """The dataclass that some settings are of; those that are newer than the job are its defaults.

    Raises
    ------
    ValueError
        Naming the settings that it does not have.
    """
    names = {kind: {f.name for f in dataclasses.fields(kind)} for kind in kinds}
    if not kinds:
        raise ValueError(", ".join(values))
    kind = min(kinds, key=lambda kind: len(names[kind] ^ set(values)))
    if unknown := set(values) - names[kind]:
        raise ValueError(", ".join(sorted(unknown)))
    return kind


def _value(hint: Any, value: Any, base: Path) -> Any:
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, dict):
        return from_plain(
            _kind_of([c for c in choices if dataclasses.is_dataclass(c)], value), value, base
        )
    if Path in choices and isinstance(value, str):
        path = Path(value)
        return path if path.is_absolute() or base == Path.cwd() else base / path
    return tuple(value) if isinstance(value, list) else value
