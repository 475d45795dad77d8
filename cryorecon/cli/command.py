"""How every command groups its options, shows its help and examples, and reads its arguments."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand, TyperGroup

# Groups of options, in the order in which help shows them.
INPUT, MOLECULE, COMPUTE, OUTPUT, EXPERT = "Input", "Molecule", "Compute", "Output", "Expert"
OPTION_PANELS = (INPUT, MOLECULE, COMPUTE, OUTPUT, EXPERT)
# Groups of commands, by what a user wants to do.
START, SOLVE, INSPECT = "Start", "Find a map", "Inspect and compare"
CONVERT, METHODS = "Reconstruct and convert", "Methods on their own"
COMMAND_PANELS = (START, SOLVE, INSPECT, CONVERT, METHODS)
# Help fits a terminal of 80 columns.
WIDTH = 80
_LEFT_COLUMN = 22
_ALL = "cryorecon.help_all"
# Where an option leaves what is to be done instead of the command.
INSTEAD = "cryorecon.instead"
# What RELION's External job calls options, and names that options had before.
_OTHER_NAMES = {
    "--o": "--output",
    "--in_mask": "--mask",
    "--in_3dref": "--init-map",
    "--j": "--threads",
    "--halves": "--half-maps",
    "--shift": "--offset-range",
    "--radius": "--max-radius",
    "--decoder": "--volume",
    "--first-angst": "--first-resolution",
    "--last-angst": "--last-resolution",
}


def examples(*pairs: tuple[str, str]) -> str:
    """The end of a command's help: what is wanted, and the command line that does it."""
    lines: list[str] = []
    for purpose, command in pairs:
        lines += [f"# {purpose}", *_folded(command)]
    return "\n".join(lines)


def _folded(command: str) -> list[str]:
    """A command line as the shell takes it, broken before options where it is too long."""
    lines, room = [""], WIDTH - 6
    for word in command.split(" -"):
        part = word if not lines[0] else f"-{word}"
        if lines[-1] and len(lines[-1]) + len(part) + 1 > room:
            lines[-1] += " \\"
            lines.append("  " + part)
        else:
            lines[-1] = f"{lines[-1]} {part}".lstrip() if len(lines) == 1 else f"{lines[-1]} {part}"
    return lines


def record(param: Any, ctx: Any) -> tuple[str, str]:
    """Names and value of a parameter, and what its help says."""
    value = param.metavar
    if value is None and not getattr(param, "is_flag", False):
        value = param.display_type(ctx).strip("<>")
    if param.param_type_name == "argument":
        names = value + ("..." if param.nargs == -1 and not value.endswith("...") else "")
        if not param.required:
            names = f"[{names}]"
    else:
        names = ", ".join(sorted(param.opts, key=len))
        if param.secondary_opts:
            names += " / " + ", ".join(param.secondary_opts)
        elif value is not None:
            names += f" {value}"
    notes = [_default(param), _range(param), "required" if _needed(param) else ""]
    note = "; ".join(n for n in notes if n)
    return names, f"{param.help or ''} ({note})" if note else param.help or ""


def _needed(param: Any) -> bool:
    return param.required and param.param_type_name == "option"


def _default(param: Any) -> str:
    shown, value = param.show_default, param.default
    if isinstance(shown, str):
        return f"default: {shown}"
    if not shown or value is None or value is False or param.required:
        return _negated(param) if value is False and param.secondary_opts else ""
    if value is True:
        return f"default: {param.opts[0]}"
    value = getattr(value, "value", value)
    return f"default: {value:g}" if isinstance(value, float) else f"default: {value}"


def _negated(param: Any) -> str:
    return f"default: {param.secondary_opts[0]}"


def _range(param: Any) -> str:
    low, high = getattr(param, "min", None), getattr(param, "max", None)
    # That a count is not negative goes without saying.
    parts = [f"at least {low}"] if low is not None and low > 1 else []
    parts += [f"at most {high}"] if high is not None else []
    return ", ".join(parts)


def panel_of(param: Any) -> str:
    """The group that a parameter is shown in."""
    return getattr(param, "rich_help_panel", None) or EXPERT


def own_params(command: Any, ctx: Any) -> list[Any]:
    """A command's parameters but for ``--help``."""
    return [p for p in command.get_params(ctx) if p.name != "help"]


class Command(TyperCommand):
    """A command with grouped options, examples as they are typed, and names of old."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_with_short_help_option(kwargs))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read arguments; RELION's names and former ones are taken for today's."""
        words = self.todays_names(args)
        if "--help-all" in words:
            ctx.meta[_ALL], words = True, ["--help"]
        with _suggesting(self, ctx):
            return super().parse_args(ctx, words)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, or what one of its options does in its place."""
        instead = ctx.meta.get(INSTEAD)
        return super().invoke(ctx) if instead is None else instead()

    def todays_names(self, args: Sequence[str]) -> list[str]:
        """Arguments with RELION's names and former ones replaced."""
        own = {name for p in self.params for name in (*p.opts, *p.secondary_opts)}
        takes_particles = any(p.name == "particles" for p in self.params)
        first: list[str] = []
        rest: list[str] = []
        words = iter(args)
        for word in words:
            name, equals, value = word.partition("=")
            if word == "--":
                rest += [word, *words]
            elif name == "--json" and not equals and "--json-file" in own:
                _json(words, rest)
            elif name in own or not name.startswith("--"):
                rest.append(word)
            elif name == "--in_parts" and takes_particles:
                first += [value] if equals else [w for w in [next(words, None)] if w is not None]
            elif name == "--pipeline_control":
                # RELION adds it to commands that hold its name; markers go to --o.
                _ = equals or next(words, None)
            else:
                new = _OTHER_NAMES.get(name, name.replace("_", "-"))
                rest.append(new + equals + value if new in own else word)
        return first + rest

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Names of arguments as they are."""
        return [
            piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)
        ]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write options, group by group."""
        everything = ctx.meta.get(_ALL, False)
        params = own_params(self, ctx)
        shown = [p for p in params if everything or not getattr(p, "hidden", False)]
        rows = {p.name: record(p, ctx) for p in shown}
        # One column for all groups.
        width = max([len(r[0]) for r in rows.values() if len(r[0]) <= _LEFT_COLUMN], default=0)
        for panel in OPTION_PANELS:
            mine = [rows[p.name] for p in shown if panel_of(p) == panel]
            if mine:
                with formatter.section(panel):
                    padded = [(names.ljust(width), text) for names, text in mine]
                    formatter.write_dl(padded, col_max=width)
        hidden = len(params) - len(shown)
        if hidden:
            formatter.write_paragraph()
            more = "1 more option" if hidden == 1 else f"{hidden} more options"
            formatter.write(f"{more}: {ctx.command_path} --help-all\n")

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write the examples as they are."""
        _write_epilog(self, formatter)


class Group(TyperGroup):
    """A group whose commands are shown by what a user wants to do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_with_short_help_option(kwargs))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read options of the group itself."""
        with _suggesting(self, ctx):
            return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, then the options of the group itself."""
        write_commands(self, ctx, formatter)
        rows = [record(p, ctx) for p in own_params(self, ctx) if not getattr(p, "hidden", False)]
        if rows:
            with formatter.section("Options"):
                formatter.write_dl(rows, col_max=_LEFT_COLUMN)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write the examples as they are."""
        _write_epilog(self, formatter)


def write_commands(group: Any, ctx: Any, formatter: Any) -> None:
    """The commands of a group, by what they are for, each with its first words."""
    commands = [(name, group.get_command(ctx, name)) for name in group.list_commands(ctx)]
    seen = [c.rich_help_panel or "Commands" for _, c in commands]
    width = max(len(name) for name, _ in commands)
    for panel in sorted(dict.fromkeys(seen), key=_place):
        with formatter.section(panel):
            rows = [
                (name.ljust(width), c.get_short_help_str(WIDTH))
                for name, c in commands
                if (c.rich_help_panel or "Commands") == panel and not c.hidden
            ]
            formatter.write_dl(rows)


@contextmanager
def _suggesting(command: Any, ctx: Any) -> Iterator[None]:
    """Of an unknown option, name the nearest known one instead of all that are somewhat alike."""
    try:
        yield
    except Exception as error:
        name = getattr(error, "option_name", None)
        if name is not None and hasattr(error, "possibilities"):
            known = [o for p in command.get_params(ctx) for o in (*p.opts, *p.secondary_opts)]
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"See {ctx.command_path} --help-all."
            error.possibilities = None
            error.message = f"No such option: {name}. {hint}"  # type: ignore[attr-defined]
        raise


def _with_short_help_option(settings: dict[str, Any]) -> dict[str, Any]:
    context = {"help_option_names": ["--help", "-h"], **(settings.get("context_settings") or {})}
    return {**settings, "context_settings": context}


def _place(panel: str) -> int:
    return COMMAND_PANELS.index(panel) if panel in COMMAND_PANELS else len(COMMAND_PANELS)


def _json(words: Any, rest: list[str]) -> None:
    """``--json`` alone, or with the name of a file as it was once asked for."""
    after = next(words, None)
    if after is None:
        rest.append("--json")
    elif after.endswith(".json"):
        rest += ["--json-file", after]
    else:
        rest += ["--json"]
        rest.append(after)


def _write_epilog(command: Any, formatter: Any) -> None:
    if command.epilog:
        with formatter.section("Examples"):
            for line in inspect.cleandoc(command.epilog).splitlines():
                formatter.write(f"  {line}\n")
