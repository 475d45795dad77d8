"""``cryorecon fsc``: how far two maps agree."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cryorecon.cli.console import console

if TYPE_CHECKING:
    from cryorecon.run.curves import FscCurve

_MOST_ROWS = 32


def fsc(
    map1: Annotated[Path, typer.Argument(help="MRC map; moved onto the second by --align.")],
    map2: Annotated[Path, typer.Argument(help="MRC map of the same box and voxel size.")],
    mask: Annotated[
        Path | None, typer.Option(help="MRC mask, 0 to 1, in the frame of MAP2.")
    ] = None,
    align: Annotated[
        bool, typer.Option("--align", help="Find rotation, shift and hand of MAP1 first.")
    ] = False,
    aligned_map: Annotated[
        Path | None, typer.Option(help="Write MAP1 as aligned; implies --align.")
    ] = None,
    star: Annotated[Path | None, typer.Option(help="Write the curve as RELION does.")] = None,
    xml: Annotated[Path | None, typer.Option(help="Write the curve for the EMDB.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write curve and crossings.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curve: .png, .svg or .pdf.")] = None,
) -> None:
    """Fourier shell correlation of two maps, with its 0.5 and 0.143 crossings in angstrom.

    0.143 is meant for two independent half maps, 0.5 for a map against a known structure.
    Without --align the maps are compared where they lie.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.io.mrc import write_map
    from cryorecon.run.compare_maps import compare_maps, comparison_as_dict
    from cryorecon.run.curves import THRESHOLDS, write_fsc_star, write_fsc_xml, write_json

    result = compare_maps(map1, map2, mask, align=align or aligned_map is not None)
    console.print(_shell_table(result.curve))
    if result.alignment is not None:
        console.print(result.alignment_text)
    for threshold in THRESHOLDS:
        conditions = escape(result.curve.conditions)
        console.print(f"[bold]{result.curve.resolution_text(threshold)}[/] ({conditions})")
    if aligned_map is not None:
        write_map(aligned_map, result.moved.numpy(), result.curve.pixel_size_angst)
    if star is not None:
        write_fsc_star(star, result.curve)
    if xml is not None:
        write_fsc_xml(xml, result.curve)
    if json is not None:
        write_json(json, comparison_as_dict(result))
    if plot is not None:
        from cryorecon.run.plots import fsc_figure, save_figure

        save_figure(fsc_figure({result.curve.maps: result.curve}), plot)


def _shell_table(curve: FscCurve) -> Table:
    table = Table(title=escape(f"FSC of {curve.maps}\n{curve.conditions}"), title_justify="left")
    table.add_column("shell", justify="right")
    table.add_column("resolution (A)", justify="right")
    table.add_column("FSC", justify="right")
    table.add_column("")
    step = math.ceil((len(curve.values) - 1) / _MOST_ROWS)
    angst = curve.shells_angst()
    for shell in range(1, len(curve.values), step):
        value = float(curve.values[shell])
        bar = "#" * round(20 * max(value, 0.0))
        table.add_row(str(shell), f"{angst[shell]:.2f}", f"{value:.4f}", bar)
    return table
