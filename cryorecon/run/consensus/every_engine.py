"""Every engine on the same particles, a folder each, before they are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cryorecon.errors import CryoreconError
from cryorecon.io.files import METHODS_LOCK, METHODS_PLAN, locked, replacing, sha256_of
from cryorecon.io.particles import read_particles
from cryorecon.run.checkpoint import NAME
from cryorecon.run.continuing import continue_job
from cryorecon.run.moments.estimate import state_path

Engine = Callable[[Path], None]


def run_engines(
    engines: Mapping[str, Engine],
    star: Path,
    output: Path,
    plan: Mapping[str, Any],
    console: Console,
    *,
    overwrite: bool,
) -> tuple[list[Path], dict[str, str]]:
    """Run engines one after the other; what was finished or begun earlier is not repeated.

    Parameters
    ----------
    engines : mapping of name to callable
        Runs one engine into the folder it is given; a name is the folder's below `output`.
    star : Path
        Particles; read once before anything is run.
    plan : mapping
        All that decides what engines do, as plain data; kept in ``methods.yaml``.
    overwrite : bool
        Run all engines, whatever the folder holds.

    Returns
    -------
    list of Path
        Job directories that have something to say.
    dict of str
        Why the others failed, by name.

    Raises
    ------
    CryoreconError
        If the particles cannot be read, the folder was begun with another plan, or is being
        worked in.
    """
    read_particles(star, plan.get("project"))
    whole = yaml.safe_load(yaml.safe_dump({**plan, "input_sha256": sha256_of(star)}))
    with locked(output, METHODS_LOCK):
        try:
            if not overwrite:
                _refuse_other(output, whole)
            with replacing(output / METHODS_PLAN) as temporary:
                temporary.write_text(yaml.safe_dump(whole, sort_keys=False), "utf-8")
            return _in_turn(engines, output, console, overwrite=overwrite)
        finally:
            (output / METHODS_LOCK).unlink(missing_ok=True)


def _in_turn(
    engines: Mapping[str, Engine], output: Path, console: Console, *, overwrite: bool
) -> tuple[list[Path], dict[str, str]]:
    """Jobs that have something to say, and why the others failed."""
    folders: list[Path] = []
    failed: dict[str, str] = {}
    for name, engine in engines.items():
        folder = output / name
        if not overwrite and finished(folder):
            console.print(f"engine {name}: finished before, {folder}", markup=False)
            folders.append(folder)
            continue
        goes_on = not overwrite and _begun(folder)
        told = "goes on, " if goes_on else ""
        console.print(f"engine {name}: {told}{folder}", markup=False)
        reason = _tried(partial(continue_job, console=console) if goes_on else engine, folder)
        if reason is None or finished(folder):
            folders.append(folder)
        else:
            failed[name] = reason
        if reason is not None:
            console.print(f"WARNING: engine {name} gave no map: {reason}", markup=False)
    return folders, failed


def finished(folder: Path) -> bool:
    """Whether a job has said all it has to say: a map, or that moments determine none."""
    if (folder / "RELION_JOB_EXIT_SUCCESS").exists():
        return True
    return (folder / "RELION_JOB_EXIT_FAILURE").exists() and (folder / "starts.star").exists()


def _begun(folder: Path) -> bool:
    """Whether a job has left a state that it goes on from."""
    states = (folder / NAME, state_path(folder / "moments.h5"))
    return (folder / "job.yaml").exists() and any(path.exists() for path in states)


def _tried(engine: Engine, folder: Path) -> str | None:
    """Run an engine; why it failed, if it did."""
    try:
        engine(folder)
    except CryoreconError as error:
        return error.problem
    except (RuntimeError, ArithmeticError, MemoryError) as error:
        return (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}"
        )
    return None


def _refuse_other(output: Path, plan: dict[str, Any]) -> None:
    if not (output / METHODS_PLAN).is_file():
        return
    try:
        before = yaml.safe_load((output / METHODS_PLAN).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        before = None
    before = before if isinstance(before, dict) else {}
    changed = sorted(key for key in {*before, *plan} if before.get(key) != plan.get(key))
    if changed:
        raise CryoreconError(
            f"{output} was begun with other {', '.join(changed)}",
            "Give the same options to go on, another folder, or --overwrite to begin anew",
        )
