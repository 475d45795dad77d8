"""``cryorecon export``: results in the formats of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cryorecon.cli.command import COMPUTE, INPUT, OUTPUT, examples
from cryorecon.cli.console import messages, print_json
from cryorecon.cli.options import Json, Overwrite, Project, argument, option
from cryorecon.cli.options import output as output_option

if TYPE_CHECKING:
    from cryorecon.run.export import MapEdits, Source

_TABLE_FORMATS = ("relion", "cryosparc", "cryodrgn")
_SUFFIXES = {
    "relion": (".star",),
    "cryosparc": (".cs",),
    "chimerax": (".cxc",),
    "mrc": (".mrc", ".map"),
}
EXAMPLES = examples(
    ("for RELION 3.0", "cryorecon export job001 -o particles.star --to relion --relion30"),
    (
        "a cryoSPARC job for RELION",
        "cryorecon export J12/particles.cs --passthrough J12/passthrough.cs -o p.star --to relion",
    ),
    ("poses and CTFs for cryoDRGN", "cryorecon export job001 -o drgn --to cryodrgn"),
    (
        "the map of the other hand, at 3 A a voxel",
        "cryorecon export job001 -o other_hand.mrc --to mrc --flip --resample 3 --crop 128",
    ),
)


def export_command(
    source: Annotated[
        Path,
        argument("Job directory of abinitio, a STAR or .cs file, or an MRC map.", "JOB_OR_FILE"),
    ],
    output: Annotated[Path, output_option("File to write; for cryodrgn a folder.", "PATH")],
    to: Annotated[
        Literal["relion", "cryosparc", "cryodrgn", "chimerax", "mrc"],
        option(OUTPUT, "STAR; .cs; poses.pkl and ctf.pkl; .cxc script; MRC map.", "--to"),
    ],
    flip: Annotated[
        bool,
        option(COMPUTE, "The other hand: of poses, and of maps (not chimerax).", "--flip"),
    ] = False,
    relion30: Annotated[
        bool,
        option(OUTPUT, "relion: columns of RELION 3.0, no optics table.", "--relion30"),
    ] = False,
    resample: Annotated[
        float | None,
        option(COMPUTE, "mrc: new voxel size [A/px].", metavar="A", min=1e-3),
    ] = None,
    lowpass: Annotated[
        float | None,
        option(COMPUTE, "mrc: low-pass, half gain at this resolution [A].", metavar="A", min=0.0),
    ] = None,
    crop: Annotated[
        int | None,
        option(COMPUTE, "mrc: new box side, after --resample [px].", metavar="PX", min=2),
    ] = None,
    invert: Annotated[bool, option(COMPUTE, "mrc: contrast inverted.", "--invert")] = False,
    project: Project = None,
    passthrough: Annotated[
        Path | None,
        option(INPUT, "More fields of the same particles (.cs), joined by uid.", metavar="FILE"),
    ] = None,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Write particles, poses and maps for RELION, cryoSPARC, cryoDRGN or ChimeraX."""
    _check_usage(to, flip, relion30, [resample, lowpass, crop, invert or None], passthrough)
    if output.suffix not in _SUFFIXES.get(to, (output.suffix,)):
        raise typer.BadParameter(
            f"--to {to} writes {' or '.join(_SUFFIXES[to])} files, not {output}"
        )
    # torch takes seconds to load: only when the command runs.
    from cryorecon.run import export

    found = export.find_source(source)
    if to == "chimerax":
        level = export.to_chimerax(found, output, overwrite=overwrite)
        lines = [f"{output}  contour level {level:.4g}"]
        figures: dict[str, Any] = {"files": [output], "contour_level": level}
    elif to == "mrc":
        edits = export.MapEdits(invert, flip, lowpass, resample, crop)
        lines, figures = _export_map(found, output, edits, project, overwrite)
    else:
        read = project, passthrough
        lines, figures = _export_table(found, output, to, flip, relion30, *read, overwrite)
    for line in lines:
        messages(json).print(line, markup=False)
    if json:
        print_json(figures)


def _check_usage(
    to: str, flip: bool, relion30: bool, edits: list[object], passthrough: Path | None
) -> None:
    if relion30 and to != "relion":
        raise typer.BadParameter("--relion30 goes with --to relion")
    if any(edit is not None for edit in edits) and to != "mrc":
        raise typer.BadParameter("--resample, --lowpass, --crop and --invert go with --to mrc")
    if flip and to == "chimerax":
        raise typer.BadParameter("--flip does not go with --to chimerax; export the map first")
    if passthrough is not None and to not in _TABLE_FORMATS:
        raise typer.BadParameter("--passthrough goes with particle formats")


def _export_map(
    source: Source, output: Path, edits: MapEdits, project: Path | None, overwrite: bool
) -> tuple[list[str], dict[str, Any]]:
    """The map and half maps, and for the other hand the poses that belong to it."""
    from cryorecon.io.files import refuse_to_replace
    from cryorecon.io.table_alone import read_with_or_without_images
    from cryorecon.run import export

    star = output.with_suffix(".star")
    # Before anything is written: poses that cannot be read must not leave a lone map.
    particles, warning = None, ""
    if edits.flip and source.table:
        particles, warning = read_with_or_without_images(source.table, project)
    refuse_to_replace([star] if particles else [], [source.table], overwrite=overwrite)
    written = export.to_mrc(source, output, edits, overwrite=overwrite)
    lines = [str(path) for path in written]
    if particles is not None:
        old = not particles.has_optics_table
        export.to_relion(particles, star, flip=True, old=old, overwrite=overwrite)
        lines.append(f"{star}  poses for the map of this hand")
        lines += [f"WARNING: {warning}."] if warning else []
        written = [*written, star]
    return lines, {"files": written}


def _export_table(
    source: Source,
    output: Path,
    to: str,
    flip: bool,
    relion30: bool,
    project: Path | None,
    passthrough: Path | None,
    overwrite: bool,
) -> tuple[list[str], dict[str, Any]]:
    from cryorecon.io.table_alone import read_with_or_without_images
    from cryorecon.run import export

    particles, warning = read_with_or_without_images(source.need_table(), project, passthrough)
    count, order = f"{len(particles)} particles", ""
    written = [output]
    if to == "relion":
        export.to_relion(particles, output, flip=flip, old=relion30, overwrite=overwrite)
    elif to == "cryosparc":
        export.to_cryosparc(particles, output, flip=flip, overwrite=overwrite)
    else:
        written = export.to_cryodrgn(particles, output, flip=flip, overwrite=overwrite)
        order = f", in the order of {particles.path}"
    lines = [f"{path}  {count}{order}" for path in written]
    lines += [f"WARNING: {warning}."] if warning else []
    return lines, {"files": written, "particles": len(particles)}
