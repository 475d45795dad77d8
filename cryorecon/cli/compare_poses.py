"""``cryorecon compare-poses``: how far two sets of poses agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from rich.table import Table

from cryorecon.cli.command import INPUT, MOLECULE, examples
from cryorecon.cli.console import console, messages, print_json
from cryorecon.cli.options import Json, JsonFile, Plot, argument, option

if TYPE_CHECKING:
    from cryorecon.maps.poses import PoseComparison

EXAMPLES = examples(
    (
        "poses of a job against refined ones",
        "cryorecon compare-poses job001/run_data.star Refine3D/job020/run_data.star",
    ),
    (
        "of the particles that are in both files, with a histogram",
        "cryorecon compare-poses a.star b.star --common --plot errors.png",
    ),
    (
        "of a symmetric particle, from a job that ran with --symmetry C4",
        "cryorecon compare-poses job002/run_data.star refined.star --symmetry C4",
    ),
    (
        "the median error alone, for a script",
        "cryorecon compare-poses a.star b.star --json | jq .median_deg",
    ),
)


def compare_poses(
    first: Annotated[Path, argument("Particles with poses (STAR).", "A.star")],
    second: Annotated[Path, argument("The same particles with other poses.", "B.star")],
    common: Annotated[
        bool, option(INPUT, "Compare only the particles that are in both files.", "--common")
    ] = False,
    symmetry: Annotated[
        str,
        option(MOLECULE, "Point group of A's map, on its axes: C1, C4, D2, ...", metavar="GROUP"),
    ] = "C1",
    plot: Plot = None,
    json: Json = False,
    json_file: JsonFile = None,
) -> None:
    """Differences between the poses of two files, after one common rotation, hand included.

    Images are matched by rlnImageName. The global rotation, the hand and the shift of the map
    that bring the second set closest to the first are found robustly and taken out. With a
    symmetry the nearest of A's equal poses counts.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.io.files import refuse_to_replace, require_folders
    from cryorecon.run.compare_poses import compare_pose_files, poses_as_dict, turned_text
    from cryorecon.run.curves import write_json

    if plot is not None:
        from cryorecon.run.plots import picture_kind, pose_error_figure, save_figure

        picture_kind(plot)  # Before the work: an ending that cannot be drawn is refused.
    require_folders([plot, json_file])
    refuse_to_replace([plot, json_file], [first, second])
    comparison = compare_pose_files(first, second, common_only=common, symmetry=symmetry)
    # Files first: whoever reads the output may stop reading early.
    if json_file is not None:
        write_json(json_file, poses_as_dict(comparison))
    if plot is not None:
        save_figure(pose_error_figure(comparison, f"{first.name} and {second.name}"), plot)
    if json:
        print_json(poses_as_dict(comparison))
    else:
        console.print(_summary(f"{first.name} and {second.name}", comparison))
    doubt = turned_text(comparison)
    if doubt is not None:
        messages(json).print(doubt, markup=False)


def _summary(title: str, comparison: PoseComparison) -> Table:
    from cryorecon.maps.poses import FRACTION_LIMITS_DEG

    table = Table(title=escape(f"Poses of {title}, after global alignment"), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("images", f"{len(comparison.angles_deg):,}")
    table.add_row("hand", "mirrored" if comparison.flipped else "same")
    table.add_row("median error (degrees)", f"{comparison.median_deg:.3f}")
    table.add_row("mean error (degrees)", f"{comparison.mean_deg:.3f}")
    for limit in FRACTION_LIMITS_DEG:
        table.add_row(f"within {limit:g} degrees", f"{comparison.fraction_within(limit):.1%}")
    if comparison.shift_angst is None:
        table.add_row("origins", "not in both files")
        return table
    shift = ", ".join(f"{float(value):.2f}" for value in comparison.shift_angst)
    table.add_row("shift of the map, taken out (A)", f"({shift})")
    table.add_row("median origin error (A)", f"{comparison.median_offset_angst:.3f}")
    return table
