"""The command reference, ``docs/commands.md``, made from the commands themselves.

``python -m cryorecon.cli.reference > docs/commands.md`` writes it anew.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from cryorecon.cli.command import COMMAND_PANELS, OPTION_PANELS, own_params, panel_of, record
from cryorecon.cli.main import app

_HEAD = """# Commands

Made from the program's own help by `python -m cryorecon.cli.reference`.

`cryorecon` alone lists the commands, `cryorecon COMMAND --help` shows options and examples, and
`--help-all` also the options that are rarely needed, marked * here. Units are in brackets.
`cryorecon --install-completion` teaches the shell to complete commands and options.

**Scripts.** With `--json` a command prints one JSON object on stdout (a dry run of all
engines one each), and all messages on stderr.
Where the output is no terminal there are no progress bars and no colours; nor are there colours
where `NO_COLOR` is set. Exit status: 0 done, 1 failed, 2 wrong usage, 3 interrupted.

**Settings.** What has no option is set by `--set key=value`, or by a YAML file and `--config`; a
key that does not exist is answered with the nearest one that does.

**In RELION.** `abinitio`, `abinitio-rmfn`, `abinitio-amortized` and `reconstruct` are External
jobs as they stand: give `cryorecon abinitio`, with its full path, as the executable, particles (and
a mask or a 3D reference) as inputs, and options by name as parameters: label `diameter`, value
`120`. RELION's names are understood: `--o`, `--in_parts`, `--in_mask`, `--in_3dref`, `--j`, and
underscores in place of hyphens. The job leaves RELION's markers and output nodes.

**Former names.** `--shift` (now `--offset-range`), `--radius` (`--max-radius`), `--decoder`
(`--volume`), `--first-angst` and `--last-angst` (`--first-resolution`, `--last-resolution`),
`reconstruct --halves` (`--half-maps`) and `--json FILE.json` (`--json-file FILE.json`) still work.
"""


def commands(group: Any = None, ctx: Any = None) -> Iterator[tuple[Any, Any]]:
    """Every command that does something, with the context it is called in."""
    if group is None:
        group = get_command(app)
        ctx = group.context_class(group, info_name="cryorecon")
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        inner = command.context_class(command, info_name=name, parent=ctx)
        if hasattr(command, "list_commands"):
            yield from commands(command, inner)
        else:
            yield command, inner


def reference() -> str:
    """The page as Markdown."""
    pages: dict[str, list[str]] = {panel: [] for panel in COMMAND_PANELS}
    for command, ctx in commands():
        top = ctx.parent.command if ctx.parent.parent is not None else command
        pages[top.rich_help_panel].append(_page(command, ctx))
    parts = [f"## {panel}\n\n" + "\n".join(found) for panel, found in pages.items() if found]
    return _HEAD + "\n" + "\n".join(parts)


def _page(command: Any, ctx: Any) -> str:
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    lines = [f"### {ctx.command_path}", "", inspect.cleandoc(command.help or ""), ""]
    lines += ["```", usage, "", *command.epilog.splitlines(), "```", "", "| | option | |"]
    lines += ["|---|---|---|"]
    for panel in OPTION_PANELS:
        mine = [p for p in own_params(command, ctx) if panel_of(p) == panel]
        for number, param in enumerate(mine):
            names, text = (cell.replace("|", "\\|") for cell in record(param, ctx))
            star = " *" if getattr(param, "hidden", False) else ""
            lines.append(f"| {panel if number == 0 else ''} | `{names}`{star} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
