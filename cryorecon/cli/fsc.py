"""``cryorecon fsc``: how far two maps agree."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cryorecon.cli.command import COMPUTE, INPUT, OUTPUT, examples
from cryorecon.cli.console import console, print_json, use_threads
from cryorecon.cli.options import Json, JsonFile, Plot, Threads, argument, option

if TYPE_CHECKING:
    from cryorecon.run.compare_maps import MapComparison
    from cryorecon.run.curves import FscCurve

_MOST_ROWS = 32
EXAMPLES = examples(
    (
        "two half maps, with a picture",
        "cryorecon fsc run_half1_class001_unfil.mrc run_half2_class001_unfil.mrc --plot fsc.png",
    ),
    (
        "a first map against a known one, whatever its orientation and hand",
        "cryorecon fsc job001/initial_model.mrc known.mrc --align --mask mask.mrc",
    ),
    (
        "the resolution alone, for a script",
        "cryorecon fsc half1.mrc half2.mrc --json | jq '.resolution_angst.\"0.143\"'",
    ),
)


def fsc(
    map1: Annotated[Path, argument("MRC map; --align moves it onto the second.", "MAP1")],
    map2: Annotated[Path, argument("MRC map of the same box and voxel size.", "MAP2")],
    mask: Annotated[
        Path | None, option(INPUT, "MRC mask, 0 to 1, in the frame of MAP2.", metavar="FILE")
    ] = None,
    align: Annotated[
        bool, option(COMPUTE, "Find rotation, shift and hand of MAP1 first.", "--align")
    ] = False,
    threads: Threads = None,
    aligned_map: Annotated[
        Path | None,
        option(OUTPUT, "Write MAP1 as aligned (.mrc); implies --align.", metavar="FILE"),
    ] = None,
    star: Annotated[
        Path | None, option(OUTPUT, "Write the curve as RELION does.", metavar="FILE")
    ] = None,
    xml: Annotated[
        Path | None, option(OUTPUT, "Write the curve for the EMDB.", metavar="FILE")
    ] = None,
    plot: Plot = None,
    json: Json = False,
    json_file: JsonFile = None,
) -> None:
    """Fourier shell correlation of two maps, and the resolutions where it crosses 0.5 and 0.143.

    0.143 is meant for two independent half maps, 0.5 for a map against a known structure.
    Without --align the maps are compared where they lie.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.io.files import refuse_to_replace, require_folders
    from cryorecon.io.mrc import write_map
    from cryorecon.run.compare_maps import compare_maps, comparison_as_dict
    from cryorecon.run.curves import write_fsc_star, write_fsc_xml, write_json

    use_threads(threads)
    if plot is not None:
        from cryorecon.run.plots import fsc_figure, picture_kind, save_figure

        picture_kind(plot)  # Before the work: an ending that cannot be drawn is refused.
    outputs = [aligned_map, star, xml, plot, json_file]
    require_folders(outputs)
    refuse_to_replace(outputs, [map1, map2, mask])
    result = compare_maps(map1, map2, mask, align=align or aligned_map is not None)
    # Files first: whoever reads the output may stop reading early.
    if aligned_map is not None:
        write_map(aligned_map, result.moved.numpy(), result.curve.pixel_size_angst)
    if star is not None:
        write_fsc_star(star, result.curve)
    if xml is not None:
        write_fsc_xml(xml, result.curve)
    if json_file is not None:
        write_json(json_file, comparison_as_dict(result))
    if plot is not None:
        save_figure(fsc_figure({result.curve.maps: result.curve}), plot)
    if json:
        print_json(comparison_as_dict(result))
    else:
        _tell(result, console)


def _tell(result: MapComparison, out: Console) -> None:
    from cryorecon.run.curves import THRESHOLDS

    out.print(_shell_table(result.curve))
    if result.alignment is not None:
        out.print(result.alignment_text)
    for threshold in THRESHOLDS:
        conditions = escape(result.curve.conditions)
        out.print(f"[bold]{result.curve.resolution_text(threshold)}[/] ({conditions})")


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
