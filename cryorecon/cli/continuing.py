"""``--continue DIR``: the option that takes all others from the job it goes on with."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import typer

from cryorecon.cli.command import INSTEAD
from cryorecon.cli.console import messages, print_job, use_threads


def continue_job_callback(context: typer.Context, folder: Path | None) -> None:
    """Let the command go on with a job instead of beginning one."""
    if folder is not None and not context.resilient_parsing:
        context.meta[INSTEAD] = partial(_go_on, context, folder)
        # The job says what is missing here.
        context.resilient_parsing = True


def _go_on(context: typer.Context, folder: Path) -> None:
    """Go on with a job; options that contradict it are refused.

    Raises
    ------
    typer.BadParameter
        For another option whose value is not the job's.
    """
    # torch takes seconds to load: only when a job goes on.
    from cryorecon.ranks import joined
    from cryorecon.run.continuing import begun_with, continue_job, is_of_moments, threads_of

    given = _given(context, sys.argv)
    json = given.pop("json", None) is not None
    allowed = is_of_moments(folder) and given.pop("allow_ambiguous", None) is not None
    before = _given(context, begun_with(folder)) if given else {}
    for name, value in given.items():
        _refuse_other(context.command, name, value, before, folder)
    use_threads(threads_of(folder))
    with joined() as ranks:
        continue_job(folder, messages(json), ranks, allow_ambiguous=allowed)
    print_job(folder, json)


def _given(context: Any, words: list[str]) -> dict[str, str]:
    """Parameters on a command line of this program, by name, as they were typed."""
    command, rest = context.find_root().command, words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    if hasattr(command, "commands"):
        return {}
    rest = command.todays_names(rest)
    # The parser alone: it asks for nothing and runs nothing.
    values, _, _ = command.make_parser(type(context)(command)).parse_args(list(rest))
    typed = {p.name: values[p.name] for p in command.params if p.name in values}
    typed.pop("continue_job", None)
    plain = {name: value for name, value in typed.items() if isinstance(value, (str, list, bool))}
    return {name: str(value) for name, value in plain.items()}


def _refuse_other(
    command: Any, name: str, value: str, before: dict[str, str], folder: Path
) -> None:
    parameter = next(p for p in command.params if p.name == name)
    told = before.get(name, str(parameter.default))
    same_folder = name == "output" and Path(value).resolve() == folder.resolve()
    if told != value and not same_folder:
        shown = parameter.opts[0] if parameter.param_type_name == "option" else name.upper()
        raise typer.BadParameter(
            f"{shown} {value} contradicts the job in {folder}, begun with {told}: leave it out, or "
            "start anew in another folder"
        )
