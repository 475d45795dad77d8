"""``cryorecon compare-poses``: how far two sets of poses agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cryorecon.cli.console import console

if TYPE_CHECKING:
    from cryorecon.maps.poses import PoseComparison


def compare_poses(
    first: Annotated[Path, typer.Argument(metavar="A.star", help="Particles with poses.")],
    second: Annotated[Path, typer.Argument(metavar="B.star", help="The same images.")],
    common: Annotated[
        bool, typer.Option("--common", help="Compare the images that are in both files.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the summary.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the histogram of errors: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Pose errors between two particle files after one global alignment, hand included.

    Images are matched by rlnImageName. The global rotation, the hand and the shift of the map
    that bring the second set closest to the first are found robustly and taken out.
    """
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run.compare_poses import compare_pose_files, poses_as_dict
    from cryorecon.run.curves import write_json

    comparison = compare_pose_files(first, second, common_only=common)
    console.print(_summary(f"{first.name} and {second.name}", comparison))
    if json is not None:
        write_json(json, poses_as_dict(comparison))
    if plot is not None:
        from cryorecon.run.plots import pose_error_figure, save_figure

        save_figure(pose_error_figure(comparison, f"{first.name} and {second.name}"), plot)


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
